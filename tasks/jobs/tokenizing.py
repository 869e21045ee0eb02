"""The job that makes tokens. Loads no model code."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kdflow_core.alignment.coverage import Coverage, plain, summary
from kdflow_core.alignment.relation import relation
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.many_cores import usable_cores
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.tokenization import Split, Tally, Tokenized, ViewReader, tokenize
from kdflow_core.models.folders import context_length, text_config
from kdflow_core.models.tokenizers import true_vocabulary_size
from storage.artifact import ArtifactRef
from storage.data_files import DataFiles
from storage.token_keys import keys_path, write_keys
from storage.tokens import TokenTable, TokenWriter
from tasks.checks.chat_check import check_pair, check_two_tokenizers
from tasks.jobs.aligning import pair_of
from tasks.jobs.chats import chat
from tasks.jobs.earlier_tokens import earlier_tokens
from tasks.jobs.stage_run import SIDES, StageRun, job
from tasks.jobs.stored import token_row
from tasks.stages.slices import SPLITS, Side


@job("tokenize")
def tokenize_data(stage: StageRun) -> ArtifactRef:
    """Text to token ids, once for all models."""
    run, folder = stage.run, stage.workdir
    student = chat(stage, "student")
    own = Renderer(student, supervise=run.data.supervise)
    readers = {
        "student": ViewReader(
            renderer=own, context_length=context_length(stage.model_folder("student"))
        )
    }
    tokenizers = {}
    for name in ("teacher", *stage.spec.identity.config.get("views", ())):
        readers[name], tokenizers[name] = _reader(stage, name, student, own)
    others = [reader.renderer.chat for view, reader in readers.items() if view != "student"]
    check_two_tokenizers(run, student, others)
    tally = Tally()
    examples = tokenize(
        config=run.data,
        seed=run.seed,
        files=DataFiles(),
        readers=readers,
        reporter=stage.reporter,
        tally=tally,
        cores=usable_cores(),
        known=earlier_tokens(stage),
    )
    coverage: dict[str, Coverage] = {}
    _write_examples(folder, examples, tuple(readers), coverage)
    counts = _counts(folder)
    dropped = {source: dict(reasons) for source, reasons in tally.dropped.items()}
    ignored = {side: dict(found) for side, found in tally.ignored.items()}
    nearly = tally.overlap.count()
    said = "; ".join(
        text if name == "teacher" else f"{name}: {text}" for name, text in tokenizers.items()
    )
    stage.reporter.message("; ".join([said, *([summary(coverage)] if coverage else [])]))
    stage.reporter.message(
        f"{counts['train_sequences']} training and "
        f"{counts['heldout_sequences']} held-out samples"
        + (f", of which {known} were tokenized before" if (known := tally.known.total()) else "")
        + f"; dropped: {dropped or 'none'}"
        + (
            f"; held out because a held-out source has their prompt: {dict(withheld)}"
            if (withheld := +tally.withheld)
            else ""
        )
        + (f"; fields that the chat template leaves out: {ignored}" if ignored else "")
        + (
            f"; {nearly} held-out prompts are those of training samples but for case, punctuation "
            "and white space"
            if nearly
            else ""
        )
    )
    return stage.publish(
        counts=counts,
        info={
            "read": dict(tally.read),
            "prompts": dict(tally.prompts),
            "dropped": dropped,
            "withheld": dict(+tally.withheld),
            "known": dict(+tally.known),
            "nearly_trained_on": nearly,
            "first_dropped": tally.first_detail,
            "ignored": ignored,
            "tokenizers": said,
            "aligned": [view for view, reader in readers.items() if reader.aligner is not None],
            "alignment": plain(coverage),
            "end_ids": {
                view: list(reader.renderer.chat.end_ids) for view, reader in readers.items()
            },
        },
    )


def _reader(
    stage: StageRun, name: str, student: ChatFormat, own: Renderer
) -> tuple[ViewReader, str]:
    """How one of the teachers reads, and how its tokenizer stands to the student's. Where it reads
    as the student does, it has the student's `own` renderer.
    """
    mine = stage.of_teacher(name)
    chats: dict[Side, ChatFormat] = {"student": student, "teacher": chat(mine, "teacher")}
    teacher = chats["teacher"]
    check_pair(mine.run, student, teacher)
    inputs = stage.spec.identity.inputs
    same_tokenizer = inputs[f"{name}_tokenizer"] == inputs["student_tokenizer"]
    same_template = mine.run.teacher.chat_template == mine.run.student.chat_template
    alike = same_tokenizer and same_template and teacher.end_ids == student.end_ids
    aligner = pair_of(mine, chats)
    reader = ViewReader(
        renderer=own if alike else Renderer(teacher, supervise=stage.run.data.supervise),
        context_length=context_length(mine.model_folder("teacher")),
        aligner=aligner,
    )
    return reader, _tokenizers(mine, chats, by_bytes=aligner is not None)


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
    folder: Path,
    examples: Iterable[Tokenized],
    views: Sequence[str],
    coverage: dict[str, Coverage],
) -> None:
    """Both splits' tables, and what samples are known by; what is aligned is counted by source, and
    by teacher where that is not the run's own.
    """
    keys: dict[Split, list[bytes | None]] = {split: [] for split in SPLITS}
    with (
        TokenWriter(folder / "train.arrow", views) as train,
        TokenWriter(folder / "heldout.arrow", views) as heldout,
    ):
        writers = {"train": train, "heldout": heldout}
        for split, example, key in examples:
            writers[split].add(token_row(example))
            keys[split].append(key)
            for view in example.alignments:
                counted = example.source if view == "teacher" else f"{example.source} ({view})"
                coverage.setdefault(counted, Coverage()).add(example, view)
    for split, own in keys.items():
        write_keys(keys_path(folder / f"{split}.arrow"), own)


def _counts(folder: Path) -> dict[str, int]:
    counts = {}
    for split in SPLITS:
        table = TokenTable(folder / f"{split}.arrow")
        counts[f"{split}_sequences"] = len(table)
        counts[f"{split}_tokens"] = int(table.lengths("student").sum())
        counts[f"{split}_supervised_tokens"] = int(table.supervised_counts("student").sum())
    return counts
