"""What a student of another tokenizer learns by each way of comparing it with its teacher.

`python -m tests.benchmarks.cross_tokenizer`. SmolLM2-135M-Instruct teaches its own body under
GPT-2's vocabulary (the recipe `quickstart-cross-tokenizer`), the same steps each way and for each
seed, and is judged by the bits per byte of text of another kind: what packages that are installed
say of themselves.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.load import load_run
from tests.benchmarks.subjects import work_folder
from tests.conftest import run_inline

WAYS: Mapping[str, Mapping[str, Any]] = {
    "cross-entropy": {"algorithm.type": "sft"},
    "folded classes": {},
    "spans": {"loss.span_share": 1.0},
    "both": {"loss.span_share": 0.5},
    "GOLD": {"algorithm.type": "gold"},
    "DSKD": {"algorithm.type": "dual_space"},
}
PACKAGES = """
    accelerate aiohttp anyio click datasets fastapi fsspec hypothesis httpx jinja2 matplotlib mypy
    numpy pandas peft pillow pluggy prefect psutil pyarrow pydantic pytest rich safetensors scipy
    sqlalchemy starlette tokenizers torch transformers trl typer uvicorn zarr
"""
# What lists, tables, code and links have.
MARKS = ("|", "<", ">>>", "](", "`", "==", "* ", "::", " - ")
LEAST, MOST, PARAGRAPHS = 200, 800, 48  # characters of a paragraph, and how many are read


def paragraphs() -> list[str]:
    """Prose, without tables, lists, code and links."""
    found = []
    for package in PACKAGES.split():
        text = str(metadata.metadata(package).get_payload())
        found += [
            text
            for part in text.split("\n\n")
            if LEAST <= len(text := " ".join(part.split())) <= MOST
            and not text.startswith("- ")
            and not any(mark in text for mark in MARKS)
        ]
    return found[:PARAGRAPHS]


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> float:
    """Of all tokens of a text but the first."""
    nats, size = 0.0, 0
    for text in texts:
        ids_BT = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        log_probs_TV = model(ids_BT).logits[0, :-1].float().log_softmax(-1)
        nats -= log_probs_TV.gather(-1, ids_BT[0, 1:, None]).double().sum().item()
        size += len(text.encode()) - len(tokenizer.decode(ids_BT[0, :1]).encode())
    return nats / math.log(2) / size


def of_folder(folder: Path, texts: Sequence[str]) -> float:
    """Of a model that is saved there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return bits_per_byte(model, AutoTokenizer.from_pretrained(folder), texts)


def trained(
    way: str, seed: int, steps: int, folder: Path, texts: Sequence[str]
) -> dict[str, float]:
    """Bits per byte of the teacher, and of the student before and after."""
    overrides = {
        "seed": seed,
        "student.max_steps": steps,
        "storage.root": str(folder / "store"),
        "storage.scratch": str(folder / "scratch"),
    }
    run = load_run("quickstart-cross-tokenizer", overrides | dict(WAYS[way]))
    launched = {"prepare-teacher", "prepare-student", "tokenize", "extract", "train"}
    done = run_inline(run, until="train", launched=launched)
    return {
        "teacher": of_folder(Path(done["teacher_model"].uri), texts),
        "before": of_folder(Path(done["student_model"].uri), texts),
        "after": of_folder(Path(done["student"].uri) / "model", texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    texts = paragraphs()
    with work_folder(options.folder) as folder:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for seed in range(options.seeds):
            for way in options.ways:
                found[way].append(trained(way, seed, options.steps, folder, texts))
                sys.stderr.write(f"{seed} {way} {json.dumps(found[way][-1])}\n")
    packages = ("torch", "transformers", "sglang")
    report = {
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "bytes": sum(len(text.encode()) for text in texts),
        "teacher": found[options.ways[0]][0]["teacher"],
        "before": found[options.ways[0]][0]["before"],
        "bits_per_byte": {
            way: {
                "mean": statistics.fmean(own["after"] for own in seeds),
                "range": [min(own["after"] for own in seeds), max(own["after"] for own in seeds)],
            }
            for way, seeds in found.items()
        },
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
