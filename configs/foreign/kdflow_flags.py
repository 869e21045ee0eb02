"""Flags of KDFlow (arXiv 2603.01875), as its scripts have them."""

from collections.abc import Callable, Mapping
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

DIVERGENCES: Mapping[str, Callable[[Flags], dict[str, Any]]] = {
    "kl": lambda _: {"type": "forward_kl"},
    "rkl": lambda _: {"type": "reverse_kl"},
    # Theirs is the weight of KL(student || mixture).
    "jsd": lambda g: {"type": "generalized_jsd", "beta": 1 - float(g["jsd_beta"])},
    "skl": lambda g: {"type": "skewed_kl", "alpha": float(g["skew_lambda"])},
    "srkl": lambda g: {"type": "skewed_reverse_kl", "alpha": float(g["skew_lambda"])},
    # Theirs is the mass of the tail.
    "akl": lambda g: {"type": "adaptive_kl", "head_mass": 1 - float(g["adaptive_alpha"])},
    "tvd": lambda _: {"type": "total_variation"},
    "hrl": lambda g: {"type": "hierarchical_ranking", "top_k": whole(g["hrl_topk"])},
}


def _kdflow(given: Flags, found: Imported) -> set[str]:
    """KDFlow: divergence, data, ranks, mode."""
    name, made = str(given["kd_loss_fn"]), DIVERGENCES.get(str(given["kd_loss_fn"]))
    if made is None:
        found.warnings.append(f"kd_loss_fn={name} is not known here: set loss.divergence")
    else:
        divergence = made(given) | {"temperature": float(given["kd_temperature"])}
        found.set(f"kd_loss_fn={name}", "loss.divergence", divergence)
    path, split = given.get("train_dataset_path"), given["train_split"]
    if path is None:
        found.warnings.append("no train_dataset_path: set data.sources")
    else:
        paths = str(path).split(",")
        sources = [source(own, split=split) | _columns(given) for own in paths]
        weights = str(given.get("train_dataset_probs") or "").split(",")
        if len(weights) == len(paths) > 1:
            sources = [own | {"weight": float(w)} for own, w in zip(sources, weights, strict=True)]
        found.set(f"train_dataset_path={path}", "data.sources", sources)
    gpus = whole(given["num_nodes"]) * whole(given["num_gpus_per_node"])
    found.set("num_nodes x num_gpus_per_node", "student.num_ranks", gpus)
    found.set("num_nodes x num_gpus_per_node", "teacher.num_ranks", gpus)
    found.set("the teacher runs in SGLang", "teacher.type", "sglang")
    if given["enable_thinking"] is not None:
        arguments = {"enable_thinking": bool(given["enable_thinking"])}
        for side in ("teacher", "student"):
            found.set("enable_thinking", f"{side}.chat_template.args", arguments)
    if whole(given["lora_rank"]):
        lora = {"rank": whole(given["lora_rank"]), "alpha": whole(given["lora_alpha"])}
        found.set("lora_rank, lora_alpha", "student.lora", lora)
    ratio = float(given["min_lr"]) / float(given["learning_rate"])
    found.set(f"min_lr={given['min_lr']}", "student.min_lr_ratio", ratio)
    if given.get("use_wandb") and given.get("wandb_project"):
        found.set("wandb_project", "tracking.wandb_project", str(given["wandb_project"]))
    if given.get("use_dynamic_bsz") and whole(given.get("max_token_len_per_gpu", 0)):
        most = whole(given["max_token_len_per_gpu"])
        found.set("max_token_len_per_gpu", "student.micro_batch_tokens", most)
    _kdflow_mode(given, found)
    return {
        "kd_loss_fn", "kd_temperature", "jsd_beta", "skew_lambda", "adaptive_alpha", "hrl_topk",
        "train_dataset_path", "train_dataset_probs", "train_split", "input_key", "output_key",
        "label_key", "num_nodes", "num_gpus_per_node", "enable_thinking", "lora_rank", "lora_alpha",
        "min_lr", "use_wandb", "wandb_project", "use_dynamic_bsz", "max_token_len_per_gpu",
        "rollout_num_engines", "rollout_batch_size", "n_samples_per_prompt", "generate_max_len",
        "temperature", "top_p", "rollout_tp_size", "rollout_mem_fraction_static", "num_epochs",
        "rollout_enable_sleep", "enable_sleep", "train_enable_sleep", "teacher_enable_sleep",
    }  # fmt: skip


def _columns(given: Flags) -> dict[str, Any]:
    key, answer, label = (given.get(f"{name}_key") for name in ("input", "output", "label"))
    columns = {} if label in (None, "answer") else {"answer": label}
    if answer is not None:
        columns |= {"prompt": key, "completion": answer}
    elif key not in (None, "messages", "conversations"):
        columns |= {"messages": key}
    return {"columns": columns} if columns else {}


def _kdflow_mode(given: Flags, found: Imported) -> None:
    """On whose answers it trains, and how long."""
    sleeps = {name: bool(given.get(f"{name}_enable_sleep") or given.get("enable_sleep"))
              for name in ("teacher", "train", "rollout")}  # fmt: skip
    if sleeps["teacher"]:
        found.set("teacher_enable_sleep", "teacher.sleep", True)
    if not whole(given["rollout_num_engines"]):
        found.set("the teacher runs beside the student", "delivery", "live")
        found.set(f"num_epochs={given['num_epochs']}", "student.epochs", whole(given["num_epochs"]))
        return
    found.recipe["mode"] = "onpolicy"
    if sleeps["train"]:
        found.set("train_enable_sleep", "student.sleep", True)
    engine = {
        "type": "sglang",
        "num_engines": whole(given["rollout_num_engines"]),
        "tensor_parallel": whole(given["rollout_tp_size"]),
        "sleep": sleeps["rollout"],
    }
    if given.get("rollout_mem_fraction_static") is not None:
        engine["memory_fraction"] = float(given["rollout_mem_fraction_static"])
    found.set("rollout_num_engines, rollout_tp_size", "on_policy.rollout", engine)
    prompts, samples = whole(given["rollout_batch_size"]), whole(given["n_samples_per_prompt"])
    found.set(f"rollout_batch_size={prompts}", "on_policy.prompts_per_round", prompts)
    found.set(f"n_samples_per_prompt={samples}", "on_policy.samples_per_prompt", samples)
    longest = whole(given["generate_max_len"])
    found.set(f"generate_max_len={longest}", "on_policy.max_new_tokens", longest)
    for name in ("temperature", "top_p"):
        found.set(f"{name}={given[name]}", f"on_policy.{name}", float(given[name]))
    rounds_of(found, prompts)


KDFLOW = Program(
    name="KDFlow",
    marks=frozenset({"teacher_name_or_path", "student_name_or_path", "kd_loss_fn"}),
    defaults={
        "num_nodes": 1,
        "num_gpus_per_node": 8,
        "num_epochs": 1,
        "train_batch_size": 128,
        "learning_rate": 1e-6,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_ratio": 0.05,
        "min_lr": 1e-8,
        "max_norm": 1.0,
        "weight_decay": 0.0,
        "adam_betas": [0.9, 0.98],
        "seed": 42,
        "bf16": False,
        "kd_ratio": 0.5,
        "kd_temperature": 1.0,
        "kd_loss_fn": "kl",
        "kd_algorithm": "vanilla_kd",
        "jsd_beta": 0.5,
        "skew_lambda": 0.1,
        "adaptive_alpha": 0.5,
        "hrl_topk": 5,
        "train_split": "train",
        "input_key": "messages",
        "max_len": 4096,
        "lora_rank": 0,
        "lora_alpha": 16,
        "enable_thinking": False,
        "rollout_num_engines": 0,
        "rollout_tp_size": 1,
        "rollout_batch_size": 32,
        "n_samples_per_prompt": 1,
        "generate_max_len": 2048,
        "temperature": 1.0,
        "top_p": 1.0,
        "teacher_tp_size": 8,
    },
    rules=SHARED_RULES
    | {
        "student_name_or_path": Rule("student.model", pretrained),
        "teacher_name_or_path": Rule("teacher.model", pretrained),
        "train_batch_size": Rule("student.global_batch_size", whole),
        "lr_scheduler": Rule("student.lr_schedule", schedule),
        "lr_warmup_ratio": Rule("student.warmup_fraction", float),
        "max_norm": Rule("student.max_grad_norm", float),
        "adam_betas": Rule("student.adam_betas", lambda v: [float(x) for x in v]),
        "kd_ratio": Rule("loss.kd_ratio", float),
        "kd_algorithm": Rule(
            "algorithm.type",
            lambda v: {"vanilla_kd": "vanilla_kd", "dskd": "dual_space", "sft": "sft"}[str(v)],
        ),
        "max_len": Rule("data.max_length", whole),
        "max_samples": Rule("data.max_samples", whole),
        "eval_steps": Rule("eval.every_steps", lambda v: whole(v) if whole(v) > 0 else None),
        "teacher_tp_size": Rule("teacher.tensor_parallel", whole),
        "teacher_ep_size": Rule("teacher.expert_parallel", whole),
        "teacher_pp_size": Rule("teacher.pipeline_parallel", whole),
        "teacher_forward_n_batches": Rule("teacher.forward_batches", whole),
        "teacher_mem_fraction_static": Rule("teacher.memory_fraction", float),
        "teacher_quantization": Rule("teacher.quantization", str),
        "wandb_run_name": Rule("name", named),
    },
    left_out=SHARED_LEFT_OUT
    | {
        "save_path": "results are in storage.root, under the run's name",
        "ckpt_path": "checkpoints are in storage.scratch",
        "save_steps": "student.checkpoint_every, 100 by default",
        "backend": "FSDP2 is the only one",
        "micro_train_batch_size": "student.micro_batch_tokens counts tokens",
        "teacher_dp_size": "as many copies as teacher.num_ranks has room for",
        "teacher_offload_tags": "what sleeps leaves the device whole",
        "packing_samples": "student.packing packs where that is exact",
        "use_liger_kernel": "the loss is chunked here anyway",
        "chunked_loss_size": "loss.logits_memory_mb",
        "use_triton_loss": "the loss is compiled on GPUs",
        "apply_chat_template": "conversations are always rendered by the chat template",
        "prompt_max_len": "data.max_length is of the whole sample",
        "preprocess_num_workers": "tokenization takes all cores",
        "wandb_group": "the run's name and artifact say what belongs together",
        "wandb_mode": "WANDB_MODE",
        "wandb_dir": "WANDB_DIR",
        "target_modules": "student.lora.targets, all linear layers by default",
        "print_rollout_sample": "kdflow show rollouts",
        "eval_split": "data.heldout_fraction, or a source with heldout: true",
    },
    together=_kdflow,
)
