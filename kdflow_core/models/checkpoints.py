"""The weights of a model folder by their headers: one rule of which files they are, for every
reader.

A folder holds one checkpoint: `model.safetensors`, or `model.safetensors.index.json` with its
shards, beside `config.json`. Whatever two readers would read differently is refused.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdflow_core.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Mistral's own form of the same weights, which transformers and SGLang pass over.
CONSOLIDATED = "consolidated.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 10**8  # the limit of the format


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """A tensor's file, its dtype as safetensors names it (`BF16`), and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors by name, and the names of all files that loading opens."""

    tensors: dict[str, TensorHeader]
    files: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Values in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def exact_in(self, dtype: str) -> bool:
        """Whether weights that do not train are held in `dtype`, which a student computes in:
        narrower than float32, and what all tensors are in.
        """
        return dtype == "bfloat16" and {t.dtype for t in self.tensors.values()} == {"BF16"}


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a folder's weights. Raises ModelError, which names what is wrong with them."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json); merge it into its model "
            "(`merge_and_unload` of peft), and give the merged folder"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder)
        if SINGLE in others and set(weight_map.values()) != {SINGLE}:
            raise ModelError(
                f"{folder} holds two checkpoints, {SINGLE} and {INDEX} with its shards, and "
                "readers differ in which they take; remove one of them"
            )
        return _sharded(folder, weight_map)
    if SINGLE not in others:
        raise _no_weights(folder, others)
    extra = [name for name in others if name != SINGLE]
    if extra not in ([], [CONSOLIDATED]):
        raise ModelError(
            f"{folder} holds {', '.join(extra)} beside {SINGLE}, which some readers load too; "
            "remove what is not the model"
        )
    return Checkpoint(tensors=_tensors(folder / SINGLE), files=(SINGLE,))


def _no_weights(folder: Path, others: list[str]) -> ModelError:
    if others:
        return ModelError(
            f"{folder} holds {others[0]} but neither {SINGLE} nor {INDEX}; save the model with "
            "save_pretrained"
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} holds {pickles[0]}, which is not safetensors and may run code when it is "
            "opened; kdflow does not. Convert it where you trust it: AutoModelForCausalLM."
            "from_pretrained(...).save_pretrained(...)"
        )
    return ModelError(f"{folder} holds no safetensors weights; convert the checkpoint first")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / INDEX} is not an index of weights: {error!r}") from error
    for file in sorted(set(entries.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX} names '{file}'; shards are .safetensors files in the same folder"
            )
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder / INDEX} names {file}, which is not there: the download is not complete"
            )
    return entries


def _sharded(folder: Path, weight_map: dict[str, str]) -> Checkpoint:
    files = sorted(set(weight_map.values()))
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _tensors(folder / file).items():
            if weight_map.get(name) != file:
                raise ModelError(
                    f"{folder / file} holds '{name}', and {INDEX} has it "
                    f"{'in ' + weight_map[name] if name in weight_map else 'nowhere'}: they belong "
                    "to different checkpoints; download the model anew"
                )
            tensors[name] = header
    gone = sorted(weight_map.keys() - tensors.keys())
    if gone:
        raise ModelError(
            f"{folder / weight_map[gone[0]]} lacks '{gone[0]}', which {INDEX} says it holds "
            f"({len(gone)} such tensors): they belong to different checkpoints; download the model "
            "anew"
        )
    return Checkpoint(tensors=tensors, files=(INDEX, *files))


def _tensors(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file, and whether it is as long as they say. Raises ModelError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        tensors = {
            name: TensorHeader(
                path=path, dtype=str(entry["dtype"]), shape=tuple(map(int, entry["shape"]))
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error!r}") from error
    expected = LENGTH_BYTES + length + max(ends, default=0)
    actual = path.stat().st_size
    if actual != expected:
        raise ModelError(
            f"{path} has {actual:,} bytes, and {expected:,} by its header: it is cut or damaged; "
            "download it anew"
        )
    return tensors
