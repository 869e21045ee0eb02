"""The job that makes models."""

import hashlib
from pathlib import Path

from configs.schema.models import BpeFiles, GgufModel, LayerDropModel, NewVocabularyModel
from kdflow_core.alignment.vocabulary_transfer import transfer_vocabulary
from kdflow_core.errors import ModelError
from kdflow_core.models.conversion import convert_gguf
from kdflow_core.models.folders import resolve_folder
from kdflow_core.models.inspection import check_model
from kdflow_core.models.layer_drop import drop_layers
from kdflow_core.models.loading import DTYPES
from kdflow_core.models.tokenizers import load_tokenizer, tokenizer_of_files
from storage.artifact import ArtifactRef
from tasks.checks.model_check import use_of
from tasks.jobs.stage_run import StageRun, job
from tasks.stages.slices import bpe_files, gguf_path


@job("prepare-teacher", "prepare-student")
def prepare_model(stage: StageRun) -> ArtifactRef:
    """A GGUF file converted, layers dropped, or a model under another tokenizer."""
    teacher_side = stage.spec.identity.stage == "prepare-teacher"
    model = stage.run.teacher.model if teacher_side else stage.run.student.model
    target = stage.workdir
    if isinstance(model, GgufModel):
        path = gguf_path(model)
        actual = _sha256(path)
        if actual != model.sha256:
            raise ModelError(f"{path} has SHA-256 {actual}, the config pins {model.sha256}")
        stage.reporter.message(f"converting {path.name} to safetensors")
        convert_gguf(path, target, dtype=DTYPES[model.dtype])
    elif isinstance(model, LayerDropModel):
        stage.reporter.message(f"dropping layers {sorted(model.drop_layers)} of the teacher")
        drop_layers(
            stage.model_folder("teacher"),
            target,
            model.drop_layers,
            trust_remote_code=stage.trusts("teacher"),
        )
    elif isinstance(model, NewVocabularyModel):
        _new_vocabulary(stage, model)
    check_model(target, use_of(stage.run, "teacher" if teacher_side else "student"))
    return stage.publish(counts={}, info={"model": model.model_dump(mode="json")})


def _new_vocabulary(stage: StageRun, model: NewVocabularyModel) -> None:
    """The student's model from another's weights, or the teacher's."""
    base = stage.model_folder("teacher")
    if model.of is not None:
        base = resolve_folder(model.of.path, model.of.revision)
    if isinstance(model.tokenizer, BpeFiles):
        vocab, merges = bpe_files(model.tokenizer)
        tokenizer = tokenizer_of_files(vocab, merges, end=model.tokenizer.end)
    else:
        folder = resolve_folder(model.tokenizer.path, model.tokenizer.revision, weights=False)
        trust = model.tokenizer.trust_remote_code
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    shared, size = transfer_vocabulary(
        base,
        tokenizer,
        stage.workdir,
        start=model.start,
        dtype=DTYPES[model.dtype],
        trust_remote_code=stage.trusts("student"),
    )
    stage.reporter.message(f"{shared:,} of {size:,} tokens keep their embedding")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
