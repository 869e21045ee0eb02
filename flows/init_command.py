"""`kdflow init`: a recipe from two models and data."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from configs.errors import ConfigError
from configs.load import load_run
from configs.schema.data import FORMATS, PACKED
from kdflow_core.workers.forking import has_accelerator

RECIPE = """\
# What each field means: kdflow config {file} --explain. What to choose: docs/choosing.md.
name: {name}
data:
  sources:
    - {source}
  max_length: 2048           # longer samples are dropped and counted, never cut
  heldout_fraction: 0.05
teacher:
  type: {engine}
  model: {teacher}
  dtype: {dtype}
  num_ranks: {ranks}               # copies of the teacher, one a GPU
student:
  model: {student}
  compute_dtype: {dtype}
  num_ranks: {ranks}               # one a GPU
  epochs: {epochs}
  lr: 2e-5
  global_batch_size: {batch}      # sequences of an optimizer step, over all ranks
  micro_batch_tokens: {tokens}   # lower it when memory runs out
loss:
  divergence: {{type: forward_kl}}
  kd_ratio: 0.9              # 0 is plain fine-tuning, 1 the divergence alone
  logits_memory_mb: {logits}
eval: {{every_steps: 100}}     # the held-out curve in the report
"""
SAVED = ("state.json", "dataset_dict.json")


def init(
    teacher: Annotated[
        str, typer.Option(prompt="The teacher (a folder, or a hub name)", help="The teacher.")
    ],
    student: Annotated[
        str, typer.Option(prompt="The student (a folder, or a hub name)", help="The student.")
    ],
    data: Annotated[
        str,
        typer.Option(
            prompt="The data (files, a folder, an fsspec URL, or the hub name of a data set)",
            help="The data.",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The recipe that is written.")] = Path("my.yaml"),
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs; by default 1 or none.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often training sees the data.")] = 3,
) -> None:
    """Write a recipe from two models and data, asking for what is not given."""
    if output.exists():
        raise ConfigError(f"{output} is there already; give another name, or remove it")
    gpus = int(has_accelerator()) if gpus is None else gpus
    ranks = max(1, gpus)
    text = RECIPE.format(
        file=output,
        name=_name(student),
        source=_flow(_source(data)),
        engine="sglang" if gpus else "transformers",
        teacher=_flow({"type": "pretrained", "path": _place(teacher)}),
        student=_flow({"type": "pretrained", "path": _place(student)}),
        dtype="bfloat16" if gpus else "float32",
        ranks=ranks,
        epochs=epochs,
        batch=max(32, 8 * ranks),
        tokens=8192 if gpus else 2048,
        logits=512 if gpus else 64,
    )
    output.write_text(text, encoding="utf-8")
    try:
        load_run(str(output), {})
    except ConfigError:
        output.unlink()
        raise
    typer.echo(f"{output} is written; now:\n  kdflow plan {output}\n  kdflow run {output}")


def _source(data: str) -> dict[str, str]:
    """What kind of data it is, by its looks. Raises ConfigError for a folder of something else."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in SAVED):
            raise ConfigError(
                f"{data} is a folder, and not of `save_to_disk`; name its files, as {data}/*.jsonl"
            )
        return {"type": "save_to_disk", "path": _place(data)}
    if "://" in data or "*" in data or data.endswith((*FORMATS, *PACKED)):
        return {"type": "files", "path": _place(data)}
    return {"type": "hub", "path": data, "split": "train"}


def _place(text: str) -> str:
    """What is here by its whole path: a recipe's relative paths start at its own folder."""
    path = Path(text).expanduser()
    return str(path.absolute()) if "://" not in text and path.exists() else text


def _name(student: str) -> str:
    """A run's name of a model's."""
    words = Path(student).name.lower()
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in words)
    return kept.strip("._-") or "my-run"


def _flow(value: dict[str, str]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
