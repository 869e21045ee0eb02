"""The job that makes tokens. Loads no model code."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from kdflow_core.alignment.coverage import Coverage, plain, summary
from kdflow_core.alignment.relation import relation
from kdflow_core.contracts import Example
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.many_cores import usable_cores
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.tokenization import Split, Tally, tokenize
from kdflow_core.models.folders import context_length, text_config
from kdflow_core.models.tokenizers import true_vocabulary_size
from storage.artifact import ArtifactRef
from storage.data_files import DataFiles
from storage.tokens import TokenTable, TokenWriter
from tasks.checks.chat_check import check_pair
from tasks.jobs.aligning import pair_of
from tasks.jobs.chats import chat
from tasks.jobs.stage_run import SIDES, StageRun, job
from tasks.jobs.stored import token_row
from tasks.stages.slices import SPLITS, Side


@job("tokenize")
def tokenize_data(stage: StageRun) -> ArtifactRef:
    """Text to token ids, once for both models."""
    run, folder = stage.run, stage.workdir
    folders = {side: stage.model_folder(side) for side in SIDES}
    chats = {side: chat(stage, side) for side in SIDES}
    check_pair(run, chats["student"], chats["teacher"])
    renderers = {side: Renderer(chats[side], supervise=run.data.supervise) for side in SIDES}
    inputs = stage.spec.identity.inputs
    same_tokenizer = inputs["teacher_tokenizer"] == inputs["student_tokenizer"]
    same_template = run.teacher.chat_template == run.student.chat_template
    same_ends = chats["teacher"].end_ids == chats["student"].end_ids
    if same_tokenizer and same_template and same_ends:
        renderers["teacher"] = renderers["student"]
    tally, aligner = Tally(), pair_of(stage, chats)
    examples = tokenize(
        config=run.data,
        seed=run.seed,
        files=DataFiles(),
        student=renderers["student"],
        teacher=renderers["teacher"],
        max_student_length=context_length(folders["student"]),
        max_teacher_length=context_length(folders["teacher"]),
        aligner=aligner,
        reporter=stage.reporter,
        tally=tally,
        cores=usable_cores(),
    )
    coverage: dict[str, Coverage] = {}
    _write_examples(folder, examples, coverage)
    counts = _counts(folder)
    dropped = {source: dict(reasons) for source, reasons in tally.dropped.items()}
    ignored = {side: dict(found) for side, found in tally.ignored.items()}
    tokenizers = _tokenizers(stage, chats, by_bytes=aligner is not None)
    stage.reporter.message("; ".join([tokenizers, *([summary(coverage)] if coverage else [])]))
    stage.reporter.message(
        f"{counts['train_sequences']} training and "
        f"{counts['heldout_sequences']} held-out samples; dropped: {dropped or 'none'}"
        + (f"; fields that the chat template leaves out: {ignored}" if ignored else "")
    )
    return stage.publish(
        counts=counts,
        info={
            "read": dict(tally.read),
            "prompts": dict(tally.prompts),
            "dropped": dropped,
            "first_dropped": tally.first_detail,
            "ignored": ignored,
            "tokenizers": tokenizers,
            "alignment": plain(coverage),
            "end_ids": {side: list(chat.end_ids) for side, chat in chats.items()},
        },
    )


def _tokenizers(stage: StageRun, chats: Mapping[Side, ChatFormat], *, by_bytes: bool) -> str:
    """How the two tokenizers stand to each other."""
    student, teacher = (chats[side].tokenizer for side in SIDES)
    # A config may leave out what is its architecture's default.
    rows = [
        int(text_config(stage.model_folder(side)).get("vocab_size", true_vocabulary_size(own)))
        for side, own in zip(SIDES, (student, teacher), strict=True)
    ]
    word, sentence = relation(student, teacher, (rows[0], rows[1]))
    if by_bytes and word in ("exact", "padded"):
        word = "bytes"  # asked for
    return f"alignment: {word}; {sentence}"


def _write_examples(
    folder: Path, examples: Iterable[tuple[Split, Example]], coverage: dict[str, Coverage]
) -> None:
    """Both splits' tables; what is aligned is counted by source."""
    with (
        TokenWriter(folder / "train.arrow") as train,
        TokenWriter(folder / "heldout.arrow") as heldout,
    ):
        writers = {"train": train, "heldout": heldout}
        for split, example in examples:
            writers[split].add(token_row(example))
            if example.alignments:
                coverage.setdefault(example.source, Coverage()).add(example)


def _counts(folder: Path) -> dict[str, int]:
    counts = {}
    for split in SPLITS:
        table = TokenTable(folder / f"{split}.arrow")
        counts[f"{split}_sequences"] = len(table)
        counts[f"{split}_tokens"] = int(table.lengths("student").sum())
        counts[f"{split}_supervised_tokens"] = int(table.supervised_counts("student").sum())
    return counts
