"""What each field of the config is for: by the fields' own docstrings."""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.schema.algorithm import TaughtPart
from configs.schema.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A field by its dotted `name`, followed by the types of its section that have it where not all
    do; its default in YAML (None: it has none and must be given); and what it is for.
    """

    name: str
    default: str | None
    text: str


def explain() -> list[Explained]:
    """All fields of a run, in their order."""
    return _of_models([RunConfig], "")


def description(name: str) -> str:
    """What a field is for, by its dotted name. Raises KeyError."""
    for field in explain():
        if field.name.split(" ")[0] == name:
            return field.text
    raise KeyError(name)


def _of_models(models: Sequence[type[BaseModel]], prefix: str) -> list[Explained]:
    """The fields of a section that is one of some models; what only some have, with their types."""
    found: dict[tuple[str, str], tuple[FieldInfo, list[str]]] = {}
    for model in models:
        for name, field in model.model_fields.items():
            if name != "type":
                entry = found.setdefault((name, _one_line(field.description)), (field, []))
                entry[1].append(str(getattr(model.model_fields.get("type"), "default", "")))
    explained = []
    for (name, text), (field, kinds) in found.items():
        dotted = f"{prefix}{name}"
        marked = dotted if len(kinds) == len(models) else f"{dotted} ({', '.join(kinds)})"
        explained.append(Explained(name=marked, default=_default(field), text=text))
        sections = _sections(field.annotation)
        if sections and models != [TaughtPart]:  # whose teacher is one like any other
            parts = {"tuple": "0.", "dict": "NAME."}
            kind = getattr(get_origin(field.annotation), "__name__", "")
            explained += _of_models(sections, f"{dotted}.{parts.get(kind, '')}")
    return explained


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, dict):
        return [model for part in get_args(annotation) for model in _sections(part)]
    return []


def _default(field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return None
    if isinstance(value, BaseModel):
        kind = getattr(value, "type", None)
        return f"{{type: {kind}}}" if kind else "{}"
    text = {None: "null", True: "true", False: "false"}
    return text[value] if value is None or isinstance(value, bool) else str(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def markdown_rows(names: Sequence[str]) -> list[str]:
    """Rows of a Markdown table: each field, and what it is for. Raises KeyError."""
    return [f"| `{name}` | {description(name)} |" for name in names]
