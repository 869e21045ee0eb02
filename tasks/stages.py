"""The stages of a run and what identifies each: computed without a server and without a model.

A stage's digest is over its kind, its code version, the slice of the config that can change its
output, and the digests of its inputs. Sizes of batches, numbers of ranks and paths stand outside.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.schema.data import HubSource, Source
from configs.schema.models import GgufModel, LayerDropModel, PretrainedModel
from configs.schema.run import RunConfig
from kdflow_core.errors import DataError, ModelError
from kdflow_core.models.folders import TOKENIZER_FILES, context_length, resolve_folder
from storage.artifact import ArtifactRef, Manifest
from storage.digest import artifact_digest, digest
from storage.fingerprint import Fingerprints
from storage.store import ArtifactStore
from tasks.estimate import estimate_slice, prospect, read_estimate, with_source

# Raise a stage's number whenever its code would give another output for the same config.
CODE_VERSIONS = {
    "model": 1,
    "tokens": 1,
    "states": 3,
    "estimate": 1,
    "student": 1,
    "evaluation": 1,
    "report": 1,
}
OPERATIONAL_STUDENT_FIELDS = {
    "model",
    "chat_template",
    "activation_checkpointing",
    "micro_batch_tokens",
    "num_ranks",
    "checkpoint_every",
    "keep_checkpoints",
}


Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

# Under which name later stages find a stage's artifact.
OUTPUTS = {
    "prepare-teacher": "teacher_model",
    "prepare-student": "student_model",
    "tokenize": "tokens",
    "estimate": "estimate",
    "extract": "states",
    "train": "student",
    "evaluate": "evaluation",
    "report": "report",
}


class StageIdentity(BaseModel):
    """What a stage's artifact is addressed by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    output: str
    kind: str
    code_version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def digest(self) -> str:
        """The artifact's digest. The names of stage and output are not part of it."""
        return artifact_digest(
            kind=self.kind,
            code_version=self.code_version,
            config=self.config,
            inputs=self.inputs,
        )


class Share(BaseModel):
    """One of `of` parts of a stage's work, counted from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    of: int


class StageSpec(BaseModel):
    """All that a stage gets: its identity, the run, and the artifacts made so far, by name.

    With a `share`, it does that part of the work, and leaves the artifact uncommitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    run: RunConfig
    inputs: dict[str, ArtifactRef]
    share: Share | None = None


class StageStatus(BaseModel):
    """What `kdflow plan` says about a stage: cached, or what changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    cached: bool
    reasons: tuple[str, ...]


def open_store(run: RunConfig) -> ArtifactStore:
    """The run's artifact store."""
    return ArtifactStore(root=run.storage.root, scratch=run.storage.scratch)


def gguf_path(model: GgufModel) -> Path:
    """Where a GGUF file lies. Raises ModelError when it does not."""
    if model.path is not None:
        path = Path(model.path)
    else:
        # Found without importing it: the package's own dependencies need not be installed.
        spec = find_spec(str(model.package))
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"the package '{model.package}', which carries the model, is not installed; "
                "`make install` installs the quick start's"
            )
        path = Path(spec.submodule_search_locations[0]) / str(model.file)
    if not path.is_file():
        raise ModelError(f"there is no GGUF file {path}")
    return path


def plan_stages(run: RunConfig) -> dict[str, StageIdentity]:
    """The stages of a run by name, in the order in which they run.

    Those of `source: auto` end with its estimate, which decides on what follows.

    Raises DataError, ModelError or StoreError for data or models that are not there.
    """
    prints = Fingerprints(run.storage.scratch)
    plan: dict[str, StageIdentity] = {}

    def add(
        stage: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> StageIdentity:
        plan[stage] = StageIdentity(
            stage=stage,
            output=OUTPUTS[stage],
            kind=kind,
            code_version=CODE_VERSIONS[kind],
            config=dict(config),
            inputs=dict(inputs),
        )
        return plan[stage]

    teacher, student = run.teacher.model, run.student.model
    if isinstance(teacher, GgufModel):
        add("prepare-teacher", "model", _gguf_slice(teacher), {})
    teacher_id = _model_identity(teacher, plan.get("prepare-teacher"), prints)
    if isinstance(student, GgufModel):
        add("prepare-student", "model", _gguf_slice(student), {})
    elif isinstance(student, LayerDropModel):
        dropped = {"type": "layer_drop", "drop_layers": sorted(student.drop_layers)}
        add("prepare-student", "model", dropped, {"teacher_model": teacher_id})
    student_id = _model_identity(student, plan.get("prepare-student"), prints)

    tokens = add("tokenize", "tokens", _tokens_slice(run), _tokens_inputs(run, plan, prints))
    extracted_from = {"tokens": tokens.digest, "teacher_model": teacher_id}
    if run.source == "auto":
        models = {"teacher_model": teacher_id, "student_model": student_id}
        add("estimate", "estimate", estimate_slice(run), models | {"tokens": tokens.digest})
        return plan
    states = add("extract", "states", _states_slice(run), extracted_from)
    upstream = {
        "tokens": tokens.digest,
        "states": states.digest,
        "teacher_model": teacher_id,
        "student_model": student_id,
    }
    before_training = {k: v for k, v in upstream.items() if k != "states" or run.source == "replay"}
    trained = add("train", "student", _training_slice(run), before_training)
    upstream["student"] = trained.digest
    evaluated = add("evaluate", "evaluation", _evaluation_slice(run), upstream)
    add(
        "report",
        "report",
        {"run": run.model_dump(mode="json")},
        upstream | {"evaluation": evaluated.digest},
    )
    return plan


def stage_status(run: RunConfig) -> list[StageStatus]:
    """For each stage: whether it would be served from cache, else why not."""
    store = open_store(run)
    statuses = []
    plan = plan_stages(run)
    estimate = plan.get("estimate")
    if estimate and (ref := store.find(estimate.kind, estimate.digest)):
        plan |= plan_stages(decided(run, ref))
    for identity in plan.values():
        absent = store.why_absent(identity.kind, identity.digest)
        reasons = () if absent is None else tuple(explain(identity, absent, store))
        statuses.append(StageStatus(identity=identity, cached=absent is None, reasons=reasons))
    return statuses


def decided(run: RunConfig, estimate: ArtifactRef) -> RunConfig:
    """The run with the source that its estimate chooses."""
    store = open_store(run)
    outcome = prospect(run, read_estimate(store, estimate), store.free_bytes())
    return with_source(run, outcome.source)


def explain(identity: StageIdentity, absent: str, store: ArtifactStore) -> list[str]:
    """Why a stage runs: its artifact is damaged, or what differs from the nearest finished one."""
    if absent != "never finished":
        return [absent]
    candidates = [_differences(identity, m) for m in store.manifests(identity.kind)]
    if not candidates:
        return ["no artifact of this kind yet"]
    return min(candidates, key=len)


def _differences(identity: StageIdentity, manifest: Manifest) -> list[str]:
    lines = []
    if identity.code_version != manifest.code_version:
        lines.append(f"code version: {manifest.code_version} -> {identity.code_version}")
    old, new = _flatten(manifest.config), _flatten(identity.config)
    lines += [
        f"{key}: {old.get(key, '(unset)')} -> {new.get(key, '(unset)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for name in sorted(manifest.inputs.keys() | identity.inputs.keys()):
        before, after = manifest.inputs.get(name, "none"), identity.inputs.get(name, "none")
        if before != after:
            lines.append(f"input {name}: {before[:12]} -> {after[:12]}")
    return lines or ["its manifest was removed"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flatten(inner, name).items()}


def _gguf_slice(model: GgufModel) -> dict[str, Any]:
    gguf_path(model)
    return {"type": "gguf", "sha256": model.sha256, "dtype": model.dtype}


def _model_identity(
    model: PretrainedModel | GgufModel | LayerDropModel,
    prepared: StageIdentity | None,
    prints: Fingerprints,
) -> str:
    if prepared is not None:
        return prepared.digest
    assert isinstance(model, PretrainedModel)
    folder = resolve_folder(model.path, model.revision, weights=False)
    if folder.parent.name == "snapshots":  # the hub's cache names folders by commit
        return digest({"hub": model.path, "commit": folder.name})
    wanted = {
        name: mark for name, mark in prints.files(str(folder)).items() if _is_model_file(name)
    }
    return digest({"files": wanted})


def _is_model_file(name: str) -> bool:
    return "/" not in name and name.endswith((".json", ".safetensors", ".jinja", ".model", ".txt"))


def _tokenizer_identity(
    model: PretrainedModel | GgufModel, prepared: StageIdentity | None, prints: Fingerprints
) -> str:
    """By the tokenizer's files alone, so that models of one family share tokens and states."""
    if prepared is not None:
        return prepared.digest
    assert isinstance(model, PretrainedModel)
    folder = resolve_folder(model.path, model.revision, weights=False)
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise ModelError(f"{folder} holds no tokenizer")
    return digest({name: prints.files(str(folder / name))[name] for name in present})


def _tokens_inputs(
    run: RunConfig, plan: Mapping[str, StageIdentity], prints: Fingerprints
) -> dict[str, str]:
    teacher = run.teacher.model
    tokenizer = _tokenizer_identity(teacher, plan.get("prepare-teacher"), prints)
    inputs = {"teacher_tokenizer": tokenizer, "student_tokenizer": tokenizer}
    student = run.student.model
    if not isinstance(student, LayerDropModel):  # else it has the teacher's tokenizer
        prepared = plan.get("prepare-student")
        inputs["student_tokenizer"] = _tokenizer_identity(student, prepared, prints)
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
            revision = HfApi().dataset_info(source.path).sha
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot look up the newest commit of data set '{source.path}': {error}; set "
                "`revision` to a commit to work offline"
            ) from error
    fields = {"hub": source.path, "subset": source.subset, "split": source.split}
    return digest(fields | {"revision": revision})


def _tokens_slice(run: RunConfig) -> dict[str, Any]:
    data = run.data.model_dump(
        mode="json", exclude={"sources", "max_length", "max_malformed_fraction"}
    )
    data["sources"] = [
        {"name": name} | source.model_dump(mode="json", include=set(_SOURCE_FIELDS))
        for name, source in zip(run.data.source_names, run.data.sources, strict=True)
    ]
    return {
        "data": data,
        "seed": run.seed,
        "student_template": run.student.chat_template.model_dump(mode="json"),
        "teacher_template": run.teacher.chat_template.model_dump(mode="json"),
        "student_limit": _length_limit(run, run.student.model),
        "teacher_limit": _length_limit(run, run.teacher.model),
    }


_SOURCE_FIELDS = ("layout", "columns", "weight", "max_samples", "format")


def _length_limit(run: RunConfig, model: PretrainedModel | GgufModel | LayerDropModel) -> int:
    """The shorter of the run's limit and the model's context, where that is known beforehand."""
    if not isinstance(model, PretrainedModel):
        return run.data.max_length
    folder = resolve_folder(model.path, model.revision, weights=False)
    return min(run.data.max_length, context_length(folder))


def _teacher_slice(run: RunConfig) -> dict[str, Any]:
    """What of the teacher's settings can change its states."""
    return run.teacher.model_dump(mode="json", include=set(run.teacher.RESULT_FIELDS))


def state_splits(run: RunConfig) -> tuple[Split, ...]:
    """The splits whose states are stored. A live run stores those that evaluation needs."""
    return SPLITS if run.source == "replay" else ("heldout",)


def _states_slice(run: RunConfig) -> dict[str, Any]:
    return {
        "teacher": _teacher_slice(run),
        "splits": list(state_splits(run)),
        "shard_rows": run.storage.shard_rows,
        "chunk_rows": run.storage.chunk_rows,
        "codec": run.storage.codec,
    }


def _evaluation_slice(run: RunConfig) -> dict[str, Any]:
    return {
        "eval": run.eval.model_dump(mode="json", exclude={"tokens_per_batch"}),
        "dtype": run.student.compute_dtype,
        "teacher_dtype": run.teacher.dtype,
    }


def _training_slice(run: RunConfig) -> dict[str, Any]:
    fields = {
        "student": run.student.model_dump(mode="json", exclude=OPERATIONAL_STUDENT_FIELDS),
        "loss": run.loss.model_dump(mode="json", exclude={"chunk_tokens"}),
        "seed": run.seed,
    }
    return fields if run.source == "replay" else fields | {"live_teacher": _teacher_slice(run)}
