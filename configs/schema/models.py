"""Where a model's weights and tokenizer come from."""

from datetime import date as Date  # noqa: N812 - the field has that name
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from configs.schema.base import PathText, StrictModel

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


class PretrainedModel(StrictModel):
    """A Hugging Face model folder, or a name on the hub.

    Pin `revision` of a hub name to a commit: otherwise the name is looked up at each plan, and a
    new commit upstream starts every stage anew. With `trust_remote_code`, Python files that the
    model brings along are run.
    """

    type: Literal["pretrained"] = "pretrained"
    path: PathText
    revision: str | None = None
    trust_remote_code: bool = False


class GgufModel(StrictModel):
    """A GGUF file, dequantized once into a plain Hugging Face folder.

    The file is either `path`, or `file` inside the installed Python package `package`.
    `sha256` pins its content.
    """

    type: Literal["gguf"] = "gguf"
    path: PathText | None = None
    package: str | None = None
    file: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    dtype: Dtype = "bfloat16"

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
    """The teacher without some of its decoder layers (indices into the teacher's layers)."""

    type: Literal["layer_drop"] = "layer_drop"
    drop_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _distinct(self) -> "LayerDropModel":
        if len(set(self.drop_layers)) != len(self.drop_layers):
            raise ValueError(f"drop_layers names a layer twice: {list(self.drop_layers)}")
        return self


class ChatTemplate(StrictModel):
    """How a model's conversations are rendered.

    `template` is Jinja text that replaces the tokenizer's own, or the name of one of its several;
    `args` go to the template (for instance `enable_thinking: false`). A template may read `answer`,
    the sample's gold answer. One that writes the day's date gets `date`, so that the tokens do not
    depend on the day.
    """

    template: str | None = None
    args: dict[str, JsonValue] = Field(default_factory=dict)
    date: Date = Field(default=Date(2025, 1, 1), strict=False)


TeacherModel = Annotated[PretrainedModel | GgufModel, Field(discriminator="type")]
StudentModel = Annotated[PretrainedModel | GgufModel | LayerDropModel, Field(discriminator="type")]
