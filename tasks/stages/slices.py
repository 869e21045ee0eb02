"""Which parts of a run's config and inputs identify each stage's output: a function for each stage.

Batch sizes, numbers of ranks and paths are left out.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from configs.patience import patient
from configs.schema.algorithm import MultiTeacherConfig
from configs.schema.base import file_and_name
from configs.schema.data import HubSource, Source
from configs.schema.engines import Engine
from configs.schema.models import (
    BpeFiles,
    GgufModel,
    LayerDropModel,
    NewVocabularyModel,
    PretrainedModel,
)
from configs.schema.on_policy import OnPolicyConfig
from configs.schema.run import REWARD, VERIFIER, RunConfig
from configs.schema.teacher import Teacher
from configs.secrets import public_config
from kdflow_core.errors import DataError, ModelError
from kdflow_core.models.checkpoints import read_checkpoint
from kdflow_core.models.folders import (
    context_length,
    declared_end_ids,
    resolve_folder,
    tokenizer_files,
)
from storage.digest import digest
from storage.fingerprint import Fingerprints
from tasks.stages.identity import StageIdentity, of_teacher, run_of_teacher

OPERATIONAL_STUDENT_FIELDS = {
    "model",
    "start",
    "continues",
    "chat_template",
    "activation_checkpointing",
    "compile",
    "micro_batch_tokens",
    "packing",
    "num_ranks",
    "replicas",
    "reshard_after_forward",
    "reduce_gradients",
    "vocabulary_parallel",
    "offload",
    "sleep",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "log_every",
    "keep_final",
}

CURVE_FIELDS = {"every_steps", "curve_sequences", "keep_best", "patience"}
# A verifier counts by its name and its file.
NO_SCORE_FIELDS = CURVE_FIELDS | {"tokens_per_batch", "verifier", "lm_eval"}
FUNCTION_INPUTS = {REWARD: "reward", VERIFIER: "verifier"}

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MadeModel = LayerDropModel | NewVocabularyModel
Side = Literal["teacher", "student"]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What identifies one artifact of a stage: of the config, and the digests of its inputs; and
    which of the run's teachers it is about.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    teacher: str = "teacher"


class Known:
    """What a plan knows so far: the run, and the digests of what its stages make, by output."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.prints = Fingerprints(run.storage.scratch)
        self._made: dict[str, str] = {}

    def add(self, identity: StageIdentity) -> None:
        """One more artifact."""
        self._made[identity.output] = identity.digest

    def made(self, output: str) -> str | None:
        """The digest of an artifact that the plan has; None for one that it has not."""
        return self._made.get(output)

    def teacher_model(self, name: str = "teacher") -> str:
        """What identifies the model of one of the teachers."""
        model = run_of_teacher(self.run, name).teacher.model
        return model_identity(model, self.made(of_teacher("teacher_model", name)), self.prints)

    def student_model(self) -> str:
        """What identifies the student's initial weights."""
        return model_identity(self.run.student.model, self.made("student_model"), self.prints)

    def data(self) -> dict[str, str]:
        """The token artifacts, as inputs."""
        made = {name: self.made(name) for name in ("tokens", "answers")}
        return {name: value for name, value in made.items() if value is not None}

    def taught(self) -> dict[str, str]:
        """Data, all teachers with their states, and the student's initial weights, as inputs."""
        inputs = self.data()
        for name in self.run.teacher_names:
            states = self.made(of_teacher("states", name))
            if states is not None:
                inputs[of_teacher("states", name)] = states
            inputs[of_teacher("teacher_model", name)] = self.teacher_model(name)
        return inputs | {"student_model": self.student_model()}


def teacher_models(known: Known) -> Iterator[Slice]:
    """The teachers' models that are not Hugging Face folders yet."""
    for name in known.run.teacher_names:
        model = run_of_teacher(known.run, name).teacher.model
        if isinstance(model, GgufModel):
            yield Slice(config=gguf_slice(model), inputs={}, teacher=name)


def student_model(known: Known) -> Iterator[Slice]:
    """The student's model, where it is not a Hugging Face folder yet."""
    model = known.run.student.model
    if isinstance(model, GgufModel):
        yield Slice(config=gguf_slice(model), inputs={})
    elif isinstance(model, LayerDropModel):
        config = {"type": "layer_drop", "drop_layers": sorted(model.drop_layers)}
        yield Slice(config=config, inputs={"teacher_model": known.teacher_model()})
    elif isinstance(model, NewVocabularyModel):
        base = (
            known.teacher_model()
            if model.of is None
            else model_identity(model.of, None, known.prints)
        )
        config = {"type": "new_vocabulary", "start": model.start, "dtype": model.dtype}
        inputs = {"base": base, "tokenizer": _new_tokenizer_identity(model.tokenizer, known.prints)}
        if isinstance(model.tokenizer, BpeFiles):
            config["end"] = model.tokenizer.end
        yield Slice(config=config, inputs=inputs)


def tokens(known: Known) -> Iterator[Slice]:
    """The token ids, in a view for each teacher that reads otherwise than the run's own.

    Raises ModelError for answers that a model is to write for more than one such view.
    """
    run = known.run
    inputs, config = tokens_inputs(run, known), tokens_slice(run)
    views = _views(known)
    if views:
        if run.data.answers is not None:
            raise ModelError(
                f"data.answers are written in the tokens of one teacher, and algorithm.teachers."
                f"{next(iter(views))} reads others; leave `data.answers` out, or give the teachers "
                "one tokenizer and chat template"
            )
        config["views"] = {name: reading for name, (reading, _) in views.items()}
        inputs |= {f"{name}_tokenizer": tokenizer for name, (_, tokenizer) in views.items()}
    yield Slice(config=config, inputs=inputs)


def _views(known: Known) -> dict[str, tuple[dict[str, Any], str]]:
    """The teachers that read otherwise than the run's own: how, and by which tokenizer."""

    def reading(name: str) -> tuple[dict[str, Any], str]:
        own = run_of_teacher(known.run, name)
        made = known.made(of_teacher("teacher_model", name))
        return _teacher_reading(own), tokenizer_identity(own.teacher.model, made, known.prints)

    found = {name: reading(name) for name in known.run.teacher_names}
    return {name: own for name, own in found.items() if own != found["teacher"]}


def _teacher_reading(run: RunConfig) -> dict[str, Any]:
    """How the run's own teacher reads a text, beside its tokenizer."""
    return {
        "teacher_template": run.teacher.chat_template.model_dump(mode="json"),
        "teacher_ends": _declared_ends(run.teacher.model),
        "teacher_limit": _length_limit(run, run.teacher.model),
    }


def answers(known: Known) -> Iterator[Slice]:
    """The answers that a model writes to the training prompts, where one does."""
    if known.run.data.answers is None:
        return
    by = known.run.data.answers.by
    writer = known.teacher_model() if by == "teacher" else known.student_model()
    yield Slice(config=answers_slice(known.run), inputs=known.data() | {f"{by}_model": writer})


def estimate(known: Known) -> Iterator[Slice]:
    """The probe that decides on `delivery: auto`, identified by all that is run, and where."""
    run = known.run
    if run.delivery != "auto":
        return
    config = {
        "teacher": run.teacher.model_dump(mode="json"),
        "student": run.student.model_dump(mode="json"),
        "loss": run.loss.model_dump(mode="json"),
        "seed": run.seed,
        "machine": {"name": platform.node(), "cores": os.cpu_count()},
    }
    models = {"teacher_model": known.teacher_model(), "student_model": known.student_model()}
    yield Slice(config=config, inputs=models | known.data())


def states(known: Known) -> Iterator[Slice]:
    """Every teacher's states."""
    views = _views(known)
    for name in known.run.teacher_names:
        config = states_slice(run_of_teacher(known.run, name), known.run.sources_of(name))
        yield Slice(
            config=config | {"view": name} if name in views else config,
            inputs=known.data() | {"teacher_model": known.teacher_model(name)},
            teacher=name,
        )


def log_probs(known: Known) -> Iterator[Slice]:
    """The teacher's log-probabilities of the training split's tokens, where training reads them in
    place of states.
    """
    if not known.run.stores_log_probs:
        return
    config = {"teacher": _results_slice(known.run.teacher)}
    yield Slice(config=config, inputs=known.data() | {"teacher_model": known.teacher_model()})


def student(known: Known) -> Iterator[Slice]:
    """The trained student."""
    run = known.run
    inputs = {
        key: value
        for key, value in known.taught().items()
        # Elsewhere stored states are of the held-out sequences alone, for a curve if there is one.
        if run.stores_training_states or run.measures_heldout or not key.startswith("states")
    }
    if run.student.continues is not None:
        inputs["continues"] = run.student.continues.partition("/")[2]
    scored = known.made("log_probs")
    if scored is not None:
        inputs["log_probs"] = scored
    reward = function_input(run, REWARD, known.prints)
    yield Slice(config=training_slice(run), inputs=inputs | reward)


def evaluation(known: Known) -> Iterator[Slice]:
    """The scores of teacher and student."""
    verifier = function_input(known.run, VERIFIER, known.prints)
    inputs = _of_trained(known, "student") | verifier
    yield Slice(config=evaluation_slice(known.run), inputs=inputs)


def report(known: Known) -> Iterator[Slice]:
    """The report, which shows the whole config."""
    inputs = _of_trained(known, "student", "evaluation", "teacher_benchmarks", "student_benchmarks")
    yield Slice(config={"run": public_config(known.run)}, inputs=inputs)


def _of_trained(known: Known, *outputs: str) -> dict[str, str]:
    made = {name: known.made(name) for name in outputs}
    return known.taught() | {name: value for name, value in made.items() if value is not None}


def _package_folder(package: str, carried: str) -> Path:
    """The folder of an installed package. Raises ModelError."""
    # Found without importing it: the package's own dependencies need not be installed.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package '{package}', which carries {carried}, is not installed; `make install` "
            "installs the quick start's"
        )
    return Path(spec.submodule_search_locations[0])


def gguf_path(model: GgufModel) -> Path:
    """Where a GGUF file lies. Raises ModelError when it does not."""
    if model.path is not None:
        path = Path(model.path)
    else:
        path = _package_folder(str(model.package), "the model") / str(model.file)
    if not path.is_file():
        raise ModelError(f"there is no GGUF file {path}")
    return path


def _new_tokenizer_identity(tokenizer: PretrainedModel | BpeFiles, prints: Fingerprints) -> str:
    """The tokenizer that a student gets, by its files. Raises ModelError where they are not."""
    if isinstance(tokenizer, PretrainedModel):
        return tokenizer_identity(tokenizer, None, prints)
    return digest({path.name: prints.file(path) for path in bpe_files(tokenizer)})


def bpe_files(tokenizer: BpeFiles) -> tuple[Path, Path]:
    """The two files of a tokenizer. Raises ModelError."""
    folder = _package_folder(tokenizer.package, "a tokenizer")
    paths = (folder / tokenizer.vocab, folder / tokenizer.merges)
    for path in paths:
        if not path.is_file():
            raise ModelError(f"student.model.tokenizer: there is no file {path}")
    return paths


def gguf_slice(model: GgufModel) -> dict[str, Any]:
    """What identifies a converted model."""
    gguf_path(model)
    return {"type": "gguf", "sha256": model.sha256, "dtype": model.dtype}


def model_identity(
    model: PretrainedModel | GgufModel | MadeModel,
    prepared: str | None,
    prints: Fingerprints,
) -> str:
    """A model by the files that loading it opens; one that a stage makes, by that artifact."""
    if prepared is not None:
        return prepared
    assert isinstance(model, PretrainedModel)
    folder = resolve_folder(model.path, model.revision, weights=False)
    if not Path(model.path).is_dir():  # a name on the hub, whose cache has folders by commit
        return digest({"hub": model.path, "commit": folder.name})
    names = ["config.json", *read_checkpoint(folder).files]
    if model.trust_remote_code:
        names += sorted(path.name for path in folder.glob("*.py"))
    return digest({"files": {name: prints.file(folder / name) for name in names}})


def tokenizer_identity(
    model: PretrainedModel | GgufModel | MadeModel, prepared: str | None, prints: Fingerprints
) -> str:
    """A tokenizer by its files alone, so that models of one family share tokens and states."""
    if prepared is not None:
        return prepared
    assert isinstance(model, PretrainedModel)
    folder = resolve_folder(model.path, model.revision, weights=False)
    return digest({name: prints.file(folder / name) for name in tokenizer_files(folder)})


def tokens_inputs(run: RunConfig, known: Known) -> dict[str, str]:
    """What the tokens are made of."""
    prints = known.prints
    tokenizer = tokenizer_identity(run.teacher.model, known.made("teacher_model"), prints)
    inputs = {"teacher_tokenizer": tokenizer, "student_tokenizer": tokenizer}
    model = run.student.model
    if not isinstance(model, LayerDropModel):  # else it has the teacher's tokenizer
        own = tokenizer_identity(model, known.made("student_model"), prints)
        inputs["student_tokenizer"] = own
    for name, source in zip(run.data.source_names, run.data.sources, strict=True):
        inputs[f"data {name}"] = _source_identity(source, prints)
    return inputs


def _source_identity(source: Source, prints: Fingerprints) -> str:
    if not isinstance(source, HubSource):
        return digest(prints.files(source.path))
    revision = source.revision
    if revision is None:
        from huggingface_hub import HfApi  # noqa: PLC0415 - only for unpinned hub data

        try:
            look_up = patient(f"data set {source.path}")
            revision = look_up(HfApi().dataset_info, source.path).sha
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot look up the newest commit of data set '{source.path}': {error}; set "
                "`revision` to a commit to work offline"
            ) from error
    fields = {"hub": source.path, "subset": source.subset, "split": source.split}
    return digest(fields | {"revision": revision})


def tokens_slice(run: RunConfig) -> dict[str, Any]:
    """The part of the config that identifies token ids."""
    data = run.data.model_dump(
        mode="json", exclude={"sources", "max_length", "max_malformed_fraction", "answers"}
    )
    data["sources"] = [
        {"name": name} | source.model_dump(mode="json", exclude=_IDENTIFIED)
        for name, source in zip(run.data.source_names, run.data.sources, strict=True)
    ]
    return {
        "data": data,
        "seed": run.seed,
        "student_template": run.student.chat_template.model_dump(mode="json"),
        "student_ends": _declared_ends(run.student.model),
        "student_limit": _length_limit(run, run.student.model),
        "alignment": run.alignment,
    } | _teacher_reading(run)


# Of a source, what its name and the identity of its rows say already.
_IDENTIFIED = {"name", "type", "path", "subset", "split", "revision"}


def _length_limit(run: RunConfig, model: PretrainedModel | GgufModel | MadeModel) -> int:
    """The shorter of the run's limit and the model's context, where that is known beforehand."""
    if not isinstance(model, PretrainedModel):
        return run.data.max_length
    folder = resolve_folder(model.path, model.revision, weights=False)
    return min(run.data.max_length, context_length(folder))


def _declared_ends(model: PretrainedModel | GgufModel | MadeModel) -> list[int]:
    """What a model's files say of the end of a turn; of one that is made, its tokenizer tells."""
    if not isinstance(model, PretrainedModel):
        return []
    return list(declared_end_ids(resolve_folder(model.path, model.revision, weights=False)))


def _results_slice(part: Teacher | Engine) -> dict[str, Any]:
    """What of the settings of a teacher or an engine can change what it makes."""
    return part.model_dump(mode="json", include=set(part.RESULT_FIELDS))


def state_splits(run: RunConfig) -> tuple[Split, ...]:
    """The splits whose states are stored: where training reads none, those evaluation needs."""
    return SPLITS if run.stores_training_states else ("heldout",)


def states_slice(run: RunConfig, sources: frozenset[str] | None) -> dict[str, Any]:
    """The part that identifies the states of the run's own teacher, for some data sources (None:
    all).
    """
    fields: dict[str, Any] = {
        "teacher": _results_slice(run.teacher),
        "splits": list(state_splits(run)),
        "shard_rows": run.storage.shard_rows,
        "chunk_rows": run.storage.chunk_rows,
        "codec": run.storage.codec,
    }
    return fields if sources is None else fields | {"sources": sorted(sources)}


def answers_slice(run: RunConfig) -> dict[str, Any]:
    """The part that identifies the answers that a model writes."""
    assert run.data.answers is not None
    lacking = None if run.on_policy is None else {"heldout_only": run.on_policy.all_sampled}
    return {
        "lacking": lacking,
        "answers": run.data.answers.model_dump(mode="json", exclude={"engine"}),
        "engine": _results_slice(run.data.answers.engine),
        "max_length": run.data.max_length,
        "seed": run.seed,
    }


def evaluation_slice(run: RunConfig) -> dict[str, Any]:
    """The part that identifies the evaluation."""
    fields = run.eval.model_dump(mode="json", exclude=NO_SCORE_FIELDS)
    if run.eval.verifier is not None:
        fields["verifier"] = file_and_name(run.eval.verifier)[1]
    return {
        "eval": fields,
        "dtype": run.student.compute_dtype,
        "teacher_dtype": run.teacher.dtype,
    }


def training_slice(run: RunConfig) -> dict[str, Any]:
    """The part that identifies the trained student; what an algorithm does not use is left out."""
    algorithm = run.algorithm.model_dump(mode="json", exclude={"teachers"})
    if isinstance(run.algorithm, MultiTeacherConfig):
        parts = run.algorithm.teachers.items()
        algorithm["teachers"] = {
            name: part.model_dump(mode="json", exclude={"teacher"}) for name, part in parts
        }
    fields = {
        "student": run.student.model_dump(mode="json", exclude=OPERATIONAL_STUDENT_FIELDS),
        "algorithm": algorithm,
        "seed": run.seed,
    }
    if run.algorithm.type != "sft":
        fields["loss"] = run.loss.model_dump(mode="json", exclude={"logits_memory_mb"})
    if run.teacher_in_training:
        fields["live_teacher"] = _results_slice(run.teacher)
    if run.eval.every_steps is not None:  # the curve is part of the artifact
        fields["curve"] = run.eval.model_dump(mode="json", include=CURVE_FIELDS)
    if run.on_policy is not None:
        fields["on_policy"] = _on_policy_slice(run, run.on_policy)
        if run.eval.keep_best is not None:
            fields["keep_best"] = run.eval.keep_best
    return fields


def _on_policy_slice(run: RunConfig, config: OnPolicyConfig) -> dict[str, Any]:
    """A Python function is known by its name alone here; its file is an input."""
    fields = config.model_dump(mode="json", exclude={"rollout", "reward", "checkpoint_rounds"})
    fields["rollout"] = _results_slice(config.rollout)
    if config.reward is not None:
        fields["reward"] = config.reward.model_dump(mode="json")
        fields["reward"]["function"] = file_and_name(config.reward.function)[1]
    return fields | {"max_length": run.data.max_length}


def function_input(run: RunConfig, field: str, prints: Fingerprints) -> dict[str, str]:
    """The file of the Python function of a field, where the run names one, as an input. Raises
    DataError when it is not there.
    """
    if field not in run.functions:
        return {}
    path = Path(file_and_name(run.functions[field])[0])
    if not path.is_file():
        raise DataError(f"{field}: there is no file {path}")
    return {FUNCTION_INPUTS[field]: digest({path.name: prints.file(path)})}
