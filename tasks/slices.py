"""What of a run's config and inputs identifies each stage's output.

Sizes of batches, numbers of ranks and paths stand outside.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from configs.patience import patient
from configs.schema.algorithm import MultiTeacherConfig
from configs.schema.data import HubSource, Source
from configs.schema.generation import Engine
from configs.schema.models import GgufModel, LayerDropModel, PretrainedModel
from configs.schema.on_policy import OnPolicyConfig
from configs.schema.run import RunConfig
from configs.schema.teacher import Teacher
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

OPERATIONAL_STUDENT_FIELDS = {
    "model",
    "chat_template",
    "activation_checkpointing",
    "micro_batch_tokens",
    "num_ranks",
    "vocabulary_parallel",
    "sleep",
    "checkpoint_every",
    "keep_checkpoints",
}

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


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


def gguf_slice(model: GgufModel) -> dict[str, Any]:
    """Of a converted model."""
    gguf_path(model)
    return {"type": "gguf", "sha256": model.sha256, "dtype": model.dtype}


def model_identity(
    model: PretrainedModel | GgufModel | LayerDropModel,
    prepared: str | None,
    prints: Fingerprints,
) -> str:
    """By the files that loading it opens; of a model that a stage makes, that artifact's digest."""
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
    model: PretrainedModel | GgufModel, prepared: str | None, prints: Fingerprints
) -> str:
    """By the tokenizer's files alone, so that models of one family share tokens and states."""
    if prepared is not None:
        return prepared
    assert isinstance(model, PretrainedModel)
    folder = resolve_folder(model.path, model.revision, weights=False)
    return digest({name: prints.file(folder / name) for name in tokenizer_files(folder)})


def tokens_inputs(
    run: RunConfig, prepared: Mapping[str, str], prints: Fingerprints
) -> dict[str, str]:
    """What the tokens are made of; `prepared` are the digests of models made, by side."""
    teacher = run.teacher.model
    tokenizer = tokenizer_identity(teacher, prepared.get("teacher"), prints)
    inputs = {"teacher_tokenizer": tokenizer, "student_tokenizer": tokenizer}
    student = run.student.model
    if not isinstance(student, LayerDropModel):  # else it has the teacher's tokenizer
        inputs["student_tokenizer"] = tokenizer_identity(student, prepared.get("student"), prints)
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
    """Of the token ids."""
    data = run.data.model_dump(
        mode="json", exclude={"sources", "max_length", "max_malformed_fraction", "answers"}
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
        "student_ends": _declared_ends(run.student.model),
        "teacher_ends": _declared_ends(run.teacher.model),
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


def _declared_ends(model: PretrainedModel | GgufModel | LayerDropModel) -> list[int]:
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
    """Of a teacher's states, of some data sources (None: all); `run` has it as its own."""
    fields: dict[str, Any] = {
        "teacher": _results_slice(run.teacher),
        "splits": list(state_splits(run)),
        "shard_rows": run.storage.shard_rows,
        "chunk_rows": run.storage.chunk_rows,
        "codec": run.storage.codec,
    }
    return fields if sources is None else fields | {"sources": sorted(sources)}


def answers_slice(run: RunConfig) -> dict[str, Any]:
    """Of the answers that a model writes to the training prompts."""
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
    """Of the evaluation."""
    return {
        "eval": run.eval.model_dump(mode="json", exclude={"tokens_per_batch"}),
        "dtype": run.student.compute_dtype,
        "teacher_dtype": run.teacher.dtype,
    }


def training_slice(run: RunConfig) -> dict[str, Any]:
    """Of the trained student. What an algorithm does not use is no part of it."""
    algorithm = run.algorithm.model_dump(mode="json", exclude={"teachers"})
    if isinstance(run.algorithm, MultiTeacherConfig):
        shares = run.algorithm.teachers.items()
        algorithm["teachers"] = {
            name: share.model_dump(mode="json", exclude={"teacher"}) for name, share in shares
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
    if run.on_policy is not None:
        fields["on_policy"] = _on_policy_slice(run, run.on_policy)
    return fields


def _on_policy_slice(run: RunConfig, config: OnPolicyConfig) -> dict[str, Any]:
    """A reward function is known by its name alone here; its file is an input."""
    fields = config.model_dump(mode="json", exclude={"rollout", "reward", "checkpoint_rounds"})
    fields["rollout"] = _results_slice(config.rollout)
    if config.reward is not None:
        reward = config.reward.model_dump(mode="json", exclude={"function"})
        fields["reward"] = reward | {"function": config.reward.name}
    return fields | {"max_length": run.data.max_length}


def reward_input(run: RunConfig, prints: Fingerprints) -> dict[str, str]:
    """The file of a run's reward function, as an input. Raises DataError when it is not there."""
    if run.on_policy is None or run.on_policy.reward is None:
        return {}
    path = Path(run.on_policy.reward.path)
    if not path.is_file():
        raise DataError(f"on_policy.reward.function: there is no file {path}")
    return {"reward": digest({path.name: prints.file(path)})}
