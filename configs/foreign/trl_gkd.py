"""Settings of TRL's GKD trainer (1.16), as its config and script have them."""

from typing import Any

from configs.foreign.programs import (
    SHARED_LEFT_OUT,
    SHARED_RULES,
    Flags,
    Imported,
    Program,
    Rule,
    named,
    pretrained,
    rounds_of,
    schedule,
    source,
    whole,
)


def _trl(given: Flags, found: Imported) -> set[str]:
    """TRL's GKD: teacher, data, batch, mode."""
    if given.get("teacher_model_name_or_path") is None:
        found.warnings.append("no teacher_model_name_or_path: set teacher.model")
    ranks = whole(given.get("num_processes", 1))
    per_rank, passes = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    batch = whole(per_rank) * whole(passes) * ranks
    said = f"{per_rank} sequences x {passes} passes x {ranks} processes"
    found.set(said, "student.global_batch_size", batch)
    found.set(f"num_processes={ranks}", "student.num_ranks", ranks)
    used = {
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes",
        "dataset_name", "dataset_config", "dataset_train_split", "adam_beta1", "adam_beta2",
        "lmbda", "temperature", "max_new_tokens", "max_steps", "num_train_epochs", "seq_kd",
        "warmup_steps", "warmup_ratio", "use_peft", "lora_r", "lora_alpha", "lora_dropout",
        "lora_target_modules",
    }  # fmt: skip
    if given.get("dataset_name") is None:
        found.warnings.append("no dataset_name: set data.sources")
    else:
        split, subset = given.get("dataset_train_split"), given.get("dataset_config")
        own = source(given["dataset_name"], subset=subset, split=split)
        found.set(f"dataset_name={given['dataset_name']}", "data.sources", [own])
    betas = [float(given["adam_beta1"]), float(given["adam_beta2"])]
    found.set("adam_beta1, adam_beta2", "student.adam_betas", betas)
    warmup = whole(given["warmup_steps"])
    if warmup:
        found.set(f"warmup_steps={warmup}", "student.warmup_steps", warmup)
    else:
        ratio = float(given["warmup_ratio"])
        found.set(f"warmup_ratio={ratio}", "student.warmup_fraction", ratio)
    found.set("GKD has no cross-entropy", "loss.kd_ratio", 1.0)
    found.set("its rates end at 0", "student.min_lr_ratio", 0.0)
    found.set("its teacher runs in transformers", "teacher.type", "transformers")
    if given.get("use_peft"):
        lora: dict[str, Any] = {
            "rank": whole(given.get("lora_r", 16)),
            "alpha": whole(given.get("lora_alpha", 32)),
        }
        lora["dropout"] = float(given.get("lora_dropout", 0.05))
        targets = given.get("lora_target_modules")
        more = {} if targets in (None, "all-linear") else {"targets": list(targets)}
        found.set("use_peft", "student.lora", lora | more)
    _trl_mode(given, found, batch)
    return used


def _trl_mode(given: Flags, found: Imported, batch: int) -> None:
    """On whose answers it trains, and how long."""
    share, temperature = float(given["lmbda"]), float(given["temperature"])
    longest, most = whole(given["max_new_tokens"]), whole(given["max_steps"])
    if given.get("seq_kd"):
        answers = {"by": "teacher", "temperature": temperature, "max_new_tokens": longest}
        found.set("seq_kd", "data.answers", answers)
    if share == 0:
        if most > 0:
            found.set(f"max_steps={most}", "student.max_steps", most)
        else:
            epochs = float(given["num_train_epochs"])
            if epochs != int(epochs):
                found.warnings.append(f"num_train_epochs={epochs:g} is rounded up")
            found.set(f"num_train_epochs={epochs:g}", "student.epochs", int(-(-epochs // 1)))
        return
    found.recipe["mode"] = "onpolicy"
    fraction = {"type": "constant", "value": share}
    found.set(f"lmbda={share:g}", "on_policy.fraction", fraction)
    found.set(f"temperature={temperature:g}", "on_policy.temperature", temperature)
    found.set(f"max_new_tokens={longest}", "on_policy.max_new_tokens", longest)
    found.set("a round is one of its steps", "on_policy.prompts_per_round", batch)
    if most > 0:
        found.set(f"max_steps={most}", "on_policy.rounds", most)
    else:
        rounds_of(found, batch)


TRL = Program(
    name="TRL's GKD",
    marks=frozenset({"teacher_model_name_or_path", "lmbda", "seq_kd"}),
    defaults={
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3,
        "max_steps": -1,
        "seed": 42,
        "max_length": 1024,
        "beta": 0.5,
        "lmbda": 0.5,
        "temperature": 0.9,
        "max_new_tokens": 128,
        "bf16": True,
    },
    rules=SHARED_RULES
    | {
        "model_name_or_path": Rule("student.model", pretrained),
        "teacher_model_name_or_path": Rule("teacher.model", pretrained),
        "lr_scheduler_type": Rule("student.lr_schedule", schedule),
        "max_grad_norm": Rule("student.max_grad_norm", lambda v: float(v) or None),
        "max_length": Rule("data.max_length", whole),
        "beta": Rule("loss.divergence", lambda v: {"type": "generalized_jsd", "beta": float(v)}),
        "eval_steps": Rule("eval.every_steps", whole),
        "save_steps": Rule("student.checkpoint_every", whole),
        "save_total_limit": Rule("student.keep_checkpoints", whole),
        "run_name": Rule("name", named),
    },
    left_out=SHARED_LEFT_OUT
    | {
        "output_dir": "results are in storage.root, under the run's name",
        "packing": "student.packing packs where that is exact",
        "dtype": "weights train in float32 (student.weights_dtype)",
        "torch_dtype": "weights train in float32 (student.weights_dtype)",
        "fp16": "layers compute in bfloat16 or float32",
        "report_to": "tracking.tensorboard, wandb_project, mlflow_experiment, trackio_project",
        "save_strategy": "checkpoints are how a run goes on; the result is exported anyway",
        "eval_strategy": "eval.every_steps",
        "push_to_hub": "kdflow export --hub",
        "disable_dropout": "dropout is as the student's config has it",
        "deepspeed": "the student is sharded by FSDP2 over student.num_ranks",
        "config_file": "accelerate's; the student is sharded by FSDP2 over student.num_ranks",
        "ddp_timeout": "ranks are watched by their progress",
        "remove_unused_columns": "columns are recognized, see data.sources.layout",
        "per_device_eval_batch_size": "eval.tokens_per_batch",
    },
    together=_trl,
)
