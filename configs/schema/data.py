"""Data sources, how they blend, and how conversations become supervised token sequences."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, PathText, StrictModel
from configs.schema.engines import Engine, TransformersEngine
from configs.secrets import public

Layout = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "prompt"]
Column = Literal[
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "system",
    "tools",
    "answer",
]
FileFormat = Literal["jsonl", "parquet", "arrow"]


class _Source(StrictModel):
    """What all sources share.

    `weight` is this source's share of the blend; give it to all sources or to none. `columns`
    maps kdflow's column names to the ones in the data; a column that is mapped to one name is not
    read under another. `layout: prompt` has no answers: they are written, as `data.answers` says.
    """

    name: str | None = None
    layout: Layout = "auto"
    columns: dict[Column, str] = Field(default_factory=dict)
    weight: float | None = Field(default=None, gt=0)
    max_samples: int | None = Field(default=None, gt=0, le=MOST)


class FilesSource(_Source):
    """JSON lines (or one JSON array), also compressed as .gz, .bz2, .zst or .lz4, Parquet or Arrow
    files: a local path, a folder, a glob, or an fsspec URL. A path that names a file is no glob.
    """

    type: Literal["files"] = "files"
    path: PathText
    format: FileFormat | None = None

    @property
    def resolved_format(self) -> FileFormat | None:
        """The format given, else the one the suffix names, else None."""
        if self.format is not None:
            return self.format
        suffixes: dict[str, FileFormat] = {
            ".jsonl": "jsonl",
            ".json": "jsonl",
            ".parquet": "parquet",
            ".arrow": "arrow",
        }
        name = public(self.path)
        for packed in (".gz", ".bz2", ".zst", ".lz4"):
            name = name.removesuffix(packed)
        return next((fmt for end, fmt in suffixes.items() if name.endswith(end)), None)

    @model_validator(mode="after")
    def _known_format(self) -> "FilesSource":
        if self.resolved_format is None:
            raise ValueError(
                f"cannot tell the format of '{self.path}' from its suffix; "
                "set `format` to jsonl, parquet or arrow"
            )
        return self


class SavedSource(_Source):
    """A folder written by `datasets.Dataset.save_to_disk`."""

    type: Literal["save_to_disk"] = "save_to_disk"
    path: PathText


class HubSource(_Source):
    """A data set of the Hugging Face hub. Pin `revision`, or every plan asks the hub."""

    type: Literal["hub"] = "hub"
    path: PathText
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


Source = Annotated[FilesSource | SavedSource | HubSource, Field(discriminator="type")]


class AnswersConfig(StrictModel):
    """Answers that a model writes, in place of those of the training data.

    `by` the teacher: sequence-level distillation; by the student: on-policy distillation, one
    round. A `fraction` of the prompts is answered anew, chosen by content. Tokens are sampled at
    `temperature` from the smallest set with probability `top_p`; temperature 0 takes the most
    probable one. An answer that reaches `max_new_tokens` has no end that is learned. An `engine` of
    each rank writes them; a stage that is killed goes on behind the last whole `prompts_per_part`.
    Prompts without an answer get one in any case, held-out ones too; in an on-policy run these are
    all that is written, and of the training data only where the student does not answer itself.
    """

    by: Literal["teacher", "student"]
    fraction: float = Field(default=1.0, gt=0, le=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, gt=0, le=MOST)
    engine: Engine = Field(default_factory=TransformersEngine)
    prompts_per_part: int = Field(default=256, gt=0, le=MOST)


class DataConfig(StrictModel):
    """The data of a run.

    Over-long samples are dropped and counted, never cut. `max_malformed_fraction` is the share of
    samples of a source that may be dropped for any other reason (broken JSON, missing columns, a
    chat template that does not fit) before the stage refuses. The split goes by prompt: samples
    with the same one are all held out, or none is. `supervise: last` trains on the last assistant
    turn only.
    """

    sources: tuple[Source, ...] = Field(min_length=1, strict=False)
    max_samples: int | None = Field(default=None, gt=0, le=MOST)
    max_length: int = Field(default=2048, gt=1, le=MOST)
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    max_malformed_fraction: float = Field(default=0.01, ge=0, le=1)
    supervise: Literal["all", "last"] = "all"
    answers: AnswersConfig | None = None

    @model_validator(mode="after")
    def _weights_and_names(self) -> "DataConfig":
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("`weight` stands on some sources only; give it to all or to none")
        names = self.source_names
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {', '.join(names)}; set `name`")
        if "all" in names:
            raise ValueError("a source is called 'all', which stands for all sources; set `name`")
        return self

    @property
    def source_names(self) -> tuple[str, ...]:
        """The name of each source: the given one, else the last part of its path."""
        return tuple(s.name or public(s.path).rstrip("/").rsplit("/", 1)[-1] for s in self.sources)
