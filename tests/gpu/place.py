"""Where a smoke run works: a folder, a device, and small models and data that it makes there."""

import json
import logging
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from configs.load import validate_run
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from tasks.presentation.tracking import read_metrics
from tasks.stages.catalogue import CATALOGUE
from tests.conftest import make_tokenizer, run_inline

LOG = logging.getLogger("smoke")
ROWS = 240


@dataclass(frozen=True)
class Place:
    """`on_gpu` says whether the parts that a CPU lacks are tried."""

    folder: Path
    on_gpu: bool

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU."""
        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def model(self, name: str, *, layers: int, seed: int) -> Path:
        """A random Qwen3, larger on a GPU."""
        folder = self.folder / name
        if not folder.is_dir():
            width = 512 if self.on_gpu else 64
            torch.manual_seed(seed)
            config = Qwen3Config(
                vocab_size=448,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=width // 4,
                max_position_embeddings=1024,
                initializer_range=0.1,
            )
            Qwen3ForCausalLM(config).save_pretrained(folder)
            make_tokenizer(folder, texts=list(topics.values()))
        return folder

    @cached_property
    def data(self) -> Path:
        """Sums, and answers of many lengths."""
        path, draw = self.folder / "data.jsonl", random.Random(0)
        rows = [
            {
                "prompt": f"{a} plus {a % 7}?",
                "completion": f"It is {a + a % 7}. " * draw.randint(1, 9),
            }
            for a in range(ROWS)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def run(self, store: str, **overrides: Any) -> RunConfig:
        """A run over these, in a store of its own; sections are merged."""
        pretrained = {"type": "pretrained"}
        config: dict[str, Any] = {
            "name": "smoke",
            "data": {
                "sources": [{"type": "files", "path": str(self.data)}],
                "max_length": 512,
                "heldout_fraction": 0.2,
            },
            "teacher": {
                "type": "sglang",
                "model": pretrained | {"path": str(self.model("teacher", layers=3, seed=1))},
                "dtype": "bfloat16",
                "tokens_per_batch": 2048,
                "memory_fraction": 0.2,
            },
            "student": {
                "model": pretrained | {"path": str(self.model("student", layers=2, seed=2))},
                "compute_dtype": "bfloat16" if self.on_gpu else "float32",
                "lr": 1e-3,
                "max_steps": 20,
                "global_batch_size": 24,
                "micro_batch_tokens": 512,
                "checkpoint_every": 5,
            },
            "loss": {"logits_memory_mb": 4, "kd_ratio": 1.0},
            "eval": {"max_generations": 2, "max_new_tokens": 8},
            "storage": {
                "root": str(self.folder / store),
                "scratch": str(self.folder / f"{store}-scratch"),
            },
            "tracking": {"tensorboard": False},
        }
        for section, fields in overrides.items():
            merged = isinstance(fields, dict) and section in config
            config[section] = config[section] | fields if merged else fields
        return validate_run(config)


def through(run: RunConfig, *, until: str) -> dict[str, ArtifactRef]:
    """The stages before and including `until`, each in ranks of its own."""
    return run_inline(run, until=until, launched=CATALOGUE.keys())


def losses(done: dict[str, ArtifactRef]) -> list[float]:
    """The loss of every step of a trained student."""
    return [r["loss"] for r in read_metrics(Path(done["student"].uri) / "metrics.jsonl")]
