"""What benchmarks measure when they are given nothing: the quick start's models and data."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from configs.load import load_run
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages

SUMS = Path(__file__).parents[2] / "configs/recipes/data/sums.jsonl"


def quickstart_model(side: str) -> Path:
    """The folder of the quick start's teacher or untrained student, made when it is not there."""
    run, done = load_run("quickstart"), dict[str, ArtifactRef]()
    for identity in plan_stages(run).values():
        if identity.kind == "model":
            ref = launch_stage(stage_spec(identity, run, done), logging.getLogger("benchmark"))
            done[identity.output] = ref
    return Path(done[f"{side}_model"].uri)


def save_untrained(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    layers: int,
    width: int,
    key_value_heads: int,
) -> LlamaForCausalLM:
    """A Llama of new weights with a tied head, and its tokenizer, in a folder."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def distillation(
    folder: Path, *, teacher: Path, student: Path, dtype: str, tokens_per_pass: int
) -> dict[str, Any]:
    """A recipe over `data.jsonl` of a folder, of forward KL alone, to be completed."""
    return {
        "data": {
            "sources": [{"type": "files", "path": str(folder / "data.jsonl")}],
            "max_length": 2048,
            "heldout_fraction": 0.1,
        },
        "teacher": {
            "type": "transformers",
            "model": {"type": "pretrained", "path": str(teacher.absolute())},
            "dtype": dtype,
            "tokens_per_batch": tokens_per_pass,
        },
        "student": {
            "model": {"type": "pretrained", "path": str(student.absolute())},
            "compute_dtype": dtype,
            "micro_batch_tokens": tokens_per_pass,
        },
        "loss": {"kd_ratio": 1.0},
        "storage": {"root": str(folder / "store"), "scratch": str(folder / "scratch")},
        "tracking": {"tensorboard": False},
    }


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, or a new one that is removed afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
