"""Where a model's weights and tokenizer come from."""

from datetime import date as Date  # noqa: N812 - the field has that name
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from configs.schema.base import PathText, StrictModel

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


class PretrainedModel(StrictModel):
    """A Hugging Face model folder, or a name on the hub."""

    type: Literal["pretrained"] = "pretrained"
    path: PathText
    """A Hugging Face folder, or a name on the hub."""
    revision: str | None = None
    """A commit of a hub name; without one, the name is looked up at each plan, and a new commit
    upstream starts every stage anew.
    """
    trust_remote_code: bool = False
    """Run Python files that the model brings along."""


class GgufModel(StrictModel):
    """A GGUF file, dequantized once into a plain Hugging Face folder."""

    type: Literal["gguf"] = "gguf"
    path: PathText | None = None
    """The file; or give `package` and `file`."""
    package: str | None = None
    """An installed Python package that carries the file."""
    file: str | None = None
    """The file's path inside the package."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """What its content must be."""
    dtype: Dtype = "bfloat16"
    """The dtype of the converted weights."""

    @property
    def trust_remote_code(self) -> bool:
        """There is no code in such a file."""
        return False

    @model_validator(mode="after")
    def _one_location(self) -> "GgufModel":
        in_package = self.package is not None and self.file is not None
        if (self.path is not None) == in_package or (self.package is None) != (self.file is None):
            raise ValueError("give either `path`, or `package` together with `file`")
        return self


class LayerDropModel(StrictModel):
    """The teacher without some of its decoder layers."""

    type: Literal["layer_drop"] = "layer_drop"
    drop_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, strict=False)
    """The numbers of the teacher's decoder layers that are left out."""

    @model_validator(mode="after")
    def _distinct(self) -> "LayerDropModel":
        if len(set(self.drop_layers)) != len(self.drop_layers):
            raise ValueError(f"drop_layers names a layer twice: {list(self.drop_layers)}")
        return self


class BpeFiles(StrictModel):
    """A byte-level BPE tokenizer by GPT-2's two files, in an installed Python package."""

    type: Literal["bpe_files"] = "bpe_files"
    package: str
    """The package that carries the files."""
    vocab: str
    """The JSON file of tokens and ids, by its path inside the package."""
    merges: str
    """The file of merges, by its path inside the package."""
    end: str = "<|endoftext|>"
    """The special token that ends a text and a turn."""


class NewVocabularyModel(StrictModel):
    """A model under another tokenizer: tokens that both have keep their embeddings."""

    type: Literal["new_vocabulary"] = "new_vocabulary"
    of: PretrainedModel | None = None
    """The model whose weights it has; by default the teacher's."""
    tokenizer: Annotated[PretrainedModel | BpeFiles, Field(discriminator="type")]
    """The tokenizer that it gets: that of a folder or hub name, or of two files."""
    start: Literal["mean_of_all", "mean_of_pieces"] = "mean_of_all"
    """What other tokens' embeddings start from: the mean of all old ones, or of the old pieces that
    the token falls into.
    """
    dtype: Dtype = "bfloat16"
    """The dtype of the weights that it starts from."""


class ChatTemplate(StrictModel):
    """How a model's conversations are rendered."""

    template: str | None = None
    """Jinja text in place of the tokenizer's own template, or the name of one of its several. It
    may read `answer`, the sample's gold answer.
    """
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the template, for instance `enable_thinking: false`."""
    date: Date = Field(default=Date(2025, 1, 1), strict=False)
    """The day for a template that writes today's date, so that tokens do not depend on the day."""


TeacherModel = Annotated[PretrainedModel | GgufModel, Field(discriminator="type")]
StudentModel = Annotated[
    PretrainedModel | GgufModel | LayerDropModel | NewVocabularyModel, Field(discriminator="type")
]
