"""A student of 1.5 billion weights on ranks that each hold a part of it: loaded, a step with
adapters on its linear layers, and exported. Prints what each rank held at most, and the seconds.

Random weights in bfloat16, the frozen ones held so; a tiny teacher, with whose states any student
can be trained.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from configs.load import validate_run
from kdflow_core.models.checkpoints import read_checkpoint
from tests.benchmarks.peaks import watched_peaks
from tests.conftest import make_llama, make_tokenizer, run_inline
from tests.processes import RANK

ROWS = 65_536
PACKAGES = ("torch", "transformers", "peft", "safetensors")


def make_large(folder: Path, layers: int) -> None:
    """A Llama of 61 million weights a layer, written without being in memory as a whole."""
    make_tokenizer(folder, texts=list(topics.values()))
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=ROWS,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config).bfloat16()
    model.tie_weights()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    _write_shards(folder, shapes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _write_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Random matrices, and norms of one, a file for each layer."""
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    weight_map = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        for value in values.values():
            if value.ndim == 2:
                value.normal_(0, 0.02, generator=generator)
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=23)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), args.ranks, args.layers)
    found["versions"] = {name: metadata.version(name) for name in PACKAGES}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, ranks: int, layers: int) -> dict[str, object]:
    """The figures of a student with so many layers on so many ranks."""
    teacher, student = folder / "teacher", folder / "student"
    make_tokenizer(teacher, texts=list(topics.values()))
    make_llama(teacher, hidden=48, layers=2, rows=448, seed=1)
    make_large(student, layers)
    rows = [{"prompt": f"{n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = validate_run(
        {
            "name": "large",
            "data": {"sources": [{"type": "files", "path": str(folder / "data.jsonl")}]},
            "teacher": {
                "type": "transformers",
                "model": {"type": "pretrained", "path": str(teacher)},
            },
            "student": {
                "model": {"type": "pretrained", "path": str(student)},
                "lora": {"rank": 8},
                "num_ranks": ranks,
                "max_steps": 1,
                "global_batch_size": 4,
            },
            "storage": {"root": str(folder / "store"), "scratch": str(folder / "scratch")},
        }
    )
    run_inline(run, until="extract")
    start = time.perf_counter()
    with watched_peaks(RANK) as peaks:
        ref = run_inline(run, until="train", launched={"train"})["student"]
    seconds = time.perf_counter() - start
    parameters = read_checkpoint(student).num_parameters
    exported = read_checkpoint(Path(ref.uri) / "model")
    assert exported.num_parameters == parameters
    return {
        "parameters": parameters,
        "model_gb": 2 * parameters / 1e9,
        "ranks": ranks,
        "peak_gb_of_ranks": sorted(size / 1e9 for size in peaks.values()),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
