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
FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".bz2", ".zst", ".lz4")


class _Source(StrictModel):
    """What all sources share."""

    name: str | None = None
    """The source's name in reports; by default the last part of its path."""
    layout: Layout = "auto"
    """How a row holds a conversation; recognized by its columns by default. `prompt` has no
    answers: `data.answers` says who writes them.
    """
    columns: dict[Column, str] = Field(default_factory=dict)
    """kdflow's names of columns, mapped to the names in the data; a column mapped to one name is
    not read under another.
    """
    weight: float | None = Field(default=None, gt=0)
    """The source's share of the blend; give it to all sources that are trained on, or to none."""
    max_samples: int | None = Field(default=None, gt=0, le=MOST)
    """How many samples of the source are taken, at most."""
    heldout: bool = False
    """Whether it is for evaluation alone. Samples of other sources with a prompt that it has are
    held out, too.
    """


class FilesSource(_Source):
    """JSON lines (or one JSON array), also compressed as .gz, .bz2, .zst or .lz4, Parquet or Arrow
    files.
    """

    type: Literal["files"] = "files"
    path: PathText
    """A file, a folder, a glob or an fsspec URL. A path that names an existing file is not read as
    a glob.
    """
    format: FileFormat | None = None
    """The format, where the suffix does not tell."""

    @property
    def resolved_format(self) -> FileFormat | None:
        """The format given, else the one the suffix names, else None."""
        if self.format is not None:
            return self.format
        name = public(self.path)
        for packed in PACKED:
            name = name.removesuffix(packed)
        return next((fmt for end, fmt in FORMATS.items() if name.endswith(end)), None)

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
    """The folder."""


class HubSource(_Source):
    """A data set of the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    path: PathText
    """The name on the hub."""
    subset: str | None = None
    """The subset (configuration), where the data set has several."""
    split: str = "train"
    """The split."""
    revision: str | None = None
    """A commit; without one, every plan asks the hub for the newest."""


Source = Annotated[FilesSource | SavedSource | HubSource, Field(discriminator="type")]


class AnswersConfig(StrictModel):
    """Answers that a model writes, in place of those of the training data.

    Prompts without an answer get one in any case, held-out ones too; in an on-policy run these are
    all that is written, and of the training data only where the student does not answer itself.
    """

    by: Literal["teacher", "student"]
    """Who writes: the `teacher` (sequence-level distillation) or the `student` (on-policy
    distillation in one round).
    """
    fraction: float = Field(default=1.0, gt=0, le=1)
    """The share of the prompts that is answered anew, chosen by content. Prompts without an answer
    always get one.
    """
    temperature: float = Field(default=1.0, ge=0)
    """The sampling temperature; 0 takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    max_new_tokens: int = Field(default=256, gt=0, le=MOST)
    """The longest answer, in tokens; one that reaches it has no end that is learned."""
    engine: Engine = Field(default_factory=TransformersEngine)
    """What runs the model that writes, one copy per rank."""
    prompts_per_part: int = Field(default=256, gt=0, le=MOST)
    """How many prompts are answered between two points from which a killed stage goes on."""


class DataConfig(StrictModel):
    """The data of a run. The split goes by prompt: samples with the same one are all held out, or
    none is.
    """

    sources: tuple[Source, ...] = Field(min_length=1, strict=False)
    """JSONL, Parquet or Arrow files, `save_to_disk` folders, fsspec URLs or hub data sets."""
    max_samples: int | None = Field(default=None, gt=0, le=MOST)
    """How many samples are taken of all sources together, at most, but for those of `heldout`."""
    max_length: int = Field(default=2048, gt=1, le=MOST)
    """The longest sample, in tokens; longer ones are dropped and counted, never cut."""
    heldout_fraction: float = Field(default=0.02, ge=0, lt=1)
    """The share of the prompts that is kept for evaluation; it may be 0 where a source is
    `heldout`.
    """
    max_malformed_fraction: float = Field(default=0.01, ge=0, le=1)
    """The share of a source's samples that may be dropped because they cannot be used, before the
    stage refuses.
    """
    supervise: Literal["all", "last"] = "all"
    """Train on `all` assistant turns, or on the `last` one only."""
    answers: AnswersConfig | None = None
    """Learn from answers that a model writes, in place of the data's: `{by: teacher, temperature:
    0.0}` or `{by: student}`; with `engine: {type: sglang}` by continuous batching.
    """

    @model_validator(mode="after")
    def _weights_and_names(self) -> "DataConfig":
        if all(source.heldout for source in self.sources):
            raise ValueError("all sources are `heldout`; leave it out of one, to train on")
        if not self.heldout_fraction and not any(source.heldout for source in self.sources):
            raise ValueError(
                "`heldout_fraction` is 0 and no source is `heldout`: nothing would be left for "
                "evaluation; set one of the two"
            )
        if any(source.heldout and source.weight is not None for source in self.sources):
            raise ValueError("a `heldout` source is no part of the blend; leave its `weight` out")
        weighted = [source.weight is not None for source in self.trained_sources]
        if any(weighted) and not all(weighted):
            raise ValueError("`weight` stands on some sources only; give it to all or to none")
        names = self.source_names
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {', '.join(names)}; set `name`")
        if "all" in names:
            raise ValueError("a source is called 'all', which stands for all sources; set `name`")
        return self

    @property
    def trained_sources(self) -> tuple[Source, ...]:
        """Those that are not for evaluation alone."""
        return tuple(source for source in self.sources if not source.heldout)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The name of each source: the given one, else the last part of its path."""
        return tuple(s.name or public(s.path).rstrip("/").rsplit("/", 1)[-1] for s in self.sources)
