"""What a run wants of its models, and whether they can be used so: seconds, no GPU, no weights.

Loads torch; `checks.py` says when that is needed.
"""

from collections.abc import Mapping
from pathlib import Path

import transformers

from configs.schema.models import LayerDropModel, NewVocabularyModel
from configs.schema.run import RunConfig
from configs.schema.teacher import TransformersTeacher
from kdflow_core.errors import ModelError
from kdflow_core.models.families import architecture_of
from kdflow_core.models.inspection import Use, check_model, check_trainable
from kdflow_core.models.layer_drop import kept_config
from kdflow_core.models.loading import load_config
from kdflow_core.models.structure import meta_model
from kdflow_core.sglang_runtime.versions import check_architecture
from tasks.checks.chat_check import chat_format, check_pair, check_two_tokenizers
from tasks.checks.device_check import check_devices
from tasks.checks.room_check import check_room
from tasks.stages.identity import made_of, run_of_teacher


def use_of(run: RunConfig, side: str) -> Use:
    """How a run uses the model of a side; `run` has the teacher as its own."""
    answers, trained = run.data.answers, side == "student"
    engines = [answers.engine] if answers is not None and answers.by == side else []
    if run.on_policy is not None and trained:
        engines.append(run.on_policy.rollout)
    # Evaluation loads both models with the student's kind of attention.
    attentions = {run.student.attention}
    if isinstance(run.teacher, TransformersTeacher) and not trained:
        attentions.add(run.teacher.attention)
    attentions |= {engine.attention for engine in engines if engine.type == "transformers"}
    answers_in_sglang = any(engine.type == "sglang" for engine in engines)
    teaches_in_sglang = not trained and run.teacher.type == "sglang"
    lora = run.student.lora if trained else None
    return Use(
        attentions=tuple(sorted(attentions)),
        in_sglang=teaches_in_sglang or answers_in_sglang,
        answers_in_sglang=answers_in_sglang,
        trained=trained,
        packs_with=run.student.attention if trained and run.student.packing is True else None,
        lora_targets=None if lora is None else lora.targets or (),
        parameter_groups=run.student.parameter_groups if trained else (),
        router_weight=run.student.router_aux_loss_coef if trained else None,
        compiled=trained and run.student.compile,
        checkpointing=trained and run.student.activation_checkpointing,
        vocabulary_parallel=trained and run.student.vocabulary_parallel,
        trust_remote_code=made_of(run, side).trust_remote_code,
    )


def check_folders(run: RunConfig, folders: Mapping[str, Path]) -> None:
    """Check the models that are there: the student's and teachers' by name (`student`, `teacher`).

    Raises ModelError, which names the field.
    """
    check_devices(run)
    # Its reports of what is missing would come beside ours.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, folder in folders.items():
        side = "student" if name == "student" else "teacher"
        own = run if side == "student" else run_of_teacher(run, name)
        use = use_of(own, side)
        try:
            check_model(folder, use)
            if use.in_sglang:
                config = load_config(folder, trust_remote_code=use.trust_remote_code)
                check_architecture(architecture_of(config))
        except ModelError as error:
            field = name if name in ("student", "teacher") else f"algorithm.teachers.{name}.teacher"
            raise ModelError(f"{field}.model: {error}") from error
    check_room(run, folders)
    if "student" not in folders:
        _check_student_to_be_made(run, folders.get("teacher"))
    if "student" not in folders:
        return
    student = chat_format(run, "student", folders["student"])
    teachers = []
    for name in folders.keys() & set(run.teacher_names):
        own = run_of_teacher(run, name)
        teachers.append(chat_format(own, "teacher", folders[name]))
        try:
            check_pair(own, student, teachers[-1])
        except ModelError as error:
            if name == "teacher":
                raise
            raise ModelError(f"algorithm.teachers.{name}: {error}") from error
    if len(teachers) == len(run.teacher_names):
        check_two_tokenizers(run, student, teachers)


def _check_student_to_be_made(run: RunConfig, teacher: Path | None) -> None:
    """A student that a stage makes has the structure of what it is made of, as far as that is here.

    Raises ModelError.
    """
    made, base = run.student.model, teacher
    if isinstance(made, NewVocabularyModel) and made.of is not None:
        base = Path(made.of.path) if Path(made.of.path).is_dir() else None
    if base is None or not isinstance(made, LayerDropModel | NewVocabularyModel):
        return
    trust = made_of(run, "student").trust_remote_code
    config = (
        kept_config(base, made.drop_layers, trust_remote_code=trust)
        if isinstance(made, LayerDropModel)
        else load_config(base, trust_remote_code=trust)
    )
    use = use_of(run, "student")
    check_trainable(meta_model(config, trust_remote_code=trust), use)
    if use.in_sglang:
        check_architecture(architecture_of(config))
