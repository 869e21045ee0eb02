"""The job that scores teacher and student."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from configs.schema.run import VERIFIER
from kdflow_core.contracts import Example, TeacherAtHand
from kdflow_core.errors import AlignmentError
from kdflow_core.eval.distribution import (
    Aligned,
    Judged,
    ModelAtHand,
    StatesAtHand,
    score_distributions,
    state_difference,
)
from kdflow_core.eval.greedy import accepted, exact_match, generate_greedily
from kdflow_core.eval.sample_sums import SampleSums
from kdflow_core.functions import Judge, load_function
from kdflow_core.models.tokenizers import true_vocabulary_size
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.jobs import aligning, chats, parts
from tasks.jobs.reference import state_limit
from tasks.jobs.stage_run import SIDES, StageRun, job
from tasks.jobs.stored import StoredStates, TokenExamples, evenly_spread
from tasks.jobs.student_module import build_comparison
from tasks.jobs.whole_models import load_model, why_no_answers, why_no_teacher
from tasks.presentation.results import EVALUATION_FILE
from tasks.presentation.sample_scores import write_sums
from tasks.stages.slices import Side

CHECKED_SEQUENCES = 4


@job("evaluate")
def evaluate_student(stage: StageRun) -> ArtifactRef:
    """Held-out scores of the teacher and of the student before and after training."""
    table = stage.tables()["heldout"]
    examples = TokenExamples(table)
    chosen = evenly_spread(range(len(examples)), stage.run.eval.max_generations)
    shown = [examples[i] for i in chosen]
    folders = {
        "teacher": stage.model_folder("teacher"),
        "student before": stage.model_folder("student"),
        "student after": stage.store.local_copy(stage.spec.inputs["student"]) / "model",
    }
    teachers = _teachers(stage, table)
    aligned = _aligned(stage, table)
    tokenizer = chats.tokenizer(stage, "teacher")
    prompts = [str(tokenizer.decode(example.teacher.prompt_ids_T)) for example in shown]
    verifier = _verifier(stage, prompts, shown)
    models, answers, sums = {}, {}, {}
    for title, folder in folders.items():
        models[title], answers[title], sums[title] = _judge(
            stage, title, folder, (examples, shown), teachers, aligned
        )
    samples = [
        {
            "source": example.source,
            "prompt": prompt,
            "label": example.label,
            **{title: texts[number] for title, texts in answers.items() if texts is not None},
        }
        for number, (example, prompt) in enumerate(zip(shown, prompts, strict=True))
    ]
    for title, texts in answers.items():
        for source, found in _judged_answers(verifier, texts or [], prompts, shown).items():
            models[title].setdefault(source, {}).update(found)
    path = stage.workdir / EVALUATION_FILE
    result = {"models": models, "samples": samples}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    write_sums(stage.workdir, sums)
    return stage.publish(
        counts={"heldout_sequences": len(examples), "generations": len(shown)}, info={}
    )


def _verifier(stage: StageRun, prompts: list[str], shown: list[Example]) -> Judge | None:
    """The run's own function that judges answers, if it has one. It is asked for the data's own
    answer to a prompt of each source, before models are: what fails then would fail after them.
    """
    if stage.run.eval.verifier is None:
        return None
    verifier = load_function(stage.run.eval.verifier, VERIFIER)
    sources = [example.source for example in shown]
    for source in dict.fromkeys(sources):
        number = sources.index(source)
        label = shown[number].label
        accepted(verifier, [label or ""], [prompts[number]], [label], [source], field=VERIFIER)
    return verifier


def _teachers(stage: StageRun, table: TokenTable) -> dict[str, TeacherAtHand[StoredStates]]:
    """The teachers that models are compared with, by data source; `all` is the run's own."""
    signals = {}
    for name in stage.run.teacher_names:
        view = parts.view_of(table, name)
        signals[name] = parts.stored_teacher(stage.of_teacher(name), view)
    teachers = {"all": signals["teacher"]}
    for name, signal in signals.items():
        teachers |= dict.fromkeys(stage.run.sources_of(name) or (), signal)
    return teachers


def _aligned(stage: StageRun, table: TokenTable) -> dict[Side, dict[str, Aligned]]:
    """By side and view, what scoring needs where student and teacher have different tokens."""
    found: dict[Side, dict[str, Aligned]] = {side: {} for side in SIDES}
    for name in stage.run.teacher_names:
        view = parts.view_of(table, name)
        if view in found["student"]:
            continue  # by another teacher that reads it
        pair = aligning.pair(stage.of_teacher(name), view)
        if pair is None:
            continue
        # Students that were trained by other maps are judged by the same one.
        folding = build_comparison(pair, "folded", parts.device(stage))
        for side, own, is_shared_V in zip(SIDES, pair.vocabularies, pair.is_shared, strict=True):
            if side == "student" or view == "teacher":
                found[side][view] = Aligned(
                    folding=folding, length_V=own.tokens.length_V, is_shared_V=is_shared_V
                )
    return found


def _judge(
    stage: StageRun,
    title: str,
    folder: Path,
    data: tuple[TokenExamples, list[Example]],
    teachers: Mapping[str, TeacherAtHand[StoredStates]],
    aligned: Mapping[Side, Mapping[str, Aligned]],
) -> tuple[dict[str, dict[str, Any]], list[str] | None, SampleSums]:
    """A model's scores by source, with their intervals; its greedy answers to the shown examples'
    prompts, None where it is not asked for any; and what scores are made of.
    """
    side: Literal["teacher", "student"] = "teacher" if title == "teacher" else "student"
    examples, shown = data
    chat = chats.chat(stage, side)
    reason = why_no_teacher(stage, folder) if side == "teacher" else None
    model = load_model(stage, side, folder) if reason is None else None
    judged: Judged
    if model is None:
        stage.reporter.message(
            f"the teacher is scored by its stored states, and answers no prompts: {reason}"
        )
        judged = StatesAtHand(teachers["all"])
    else:
        judged = ModelAtHand(model, true_vocabulary_size(chat.tokenizer))
        if side == "teacher":
            _check_own_states(stage, model, examples, teachers["all"])
    sums = score_distributions(
        judged=judged,
        examples=examples,
        teachers=teachers,
        tokens_per_batch=stage.run.eval.tokens_per_batch,
        reporter=stage.reporter,
        title=title,
        side=side,
        end_ids=chat.end_ids,
        aligned=aligned[side],
    )
    intervals = sums.intervals()
    by_source: dict[str, dict[str, Any]] = {
        name: asdict(own) | {"intervals": intervals.get(name, {})}
        for name, own in sums.scores(aligned=bool(aligned[side])).items()
    }
    if model is None:
        return by_source, None, sums
    if (slow := why_no_answers(model)) is not None:
        stage.reporter.message(f"the {title} answers no prompts: {slow}")
        return by_source, None, sums
    texts = generate_greedily(
        model=model,
        chat=chat,
        sequences=[e.teacher if side == "teacher" else e.student for e in shown],
        max_new_tokens=stage.run.eval.max_new_tokens,
        reporter=stage.reporter,
        title=title,
    )
    return by_source, texts, sums


def _judged_answers(
    verifier: Judge | None,
    texts: Sequence[str],
    prompts: Sequence[str],
    shown: Sequence[Example],
) -> dict[str, dict[str, float]]:
    """By source, which shares of a model's answers are right; nothing where it gave none."""
    if not texts:
        return {}
    labels, sources = [e.label for e in shown], [e.source for e in shown]
    shares = {"exact_match": exact_match(texts, labels, sources)}
    if verifier is not None:
        shares["accepted"] = accepted(verifier, texts, prompts, labels, sources, field=VERIFIER)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for kind, by_source in shares.items():
        for source, share in by_source.items():
            found[source][kind] = share
    return found


def _check_own_states(
    stage: StageRun,
    model: PreTrainedModel,
    examples: TokenExamples,
    teacher: TeacherAtHand[StoredStates],
) -> None:
    """Refuse a teacher whose states are not those that were stored. Raises AlignmentError."""
    chosen = examples.of_sources(stage.run.sources_of("teacher"))
    sequences = [examples[i].teacher for i in chosen[:CHECKED_SEQUENCES]]
    if not sequences:
        return  # none of the held-out ones is this teacher's
    difference = state_difference(model, sequences, teacher.signals)
    limit = state_limit(stage.run.teacher)
    if not difference < limit:
        raise AlignmentError(
            f"the teacher's states as transformers computes them are far from those that "
            f"teacher.type={stage.run.teacher.type} has stored (median relative difference "
            f"{difference:.2f}, limit {limit}): one of the two has not read the weights in "
            f"{stage.model_folder('teacher')} as they are. Check the checkpoint; then delete "
            f"{stage.spec.inputs['states'].uri} and run again"
        )
