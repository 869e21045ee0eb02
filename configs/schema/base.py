"""The base of every schema: frozen, strict, and helpful about misspelt keys."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def nearest(name: str, allowed: list[str]) -> str:
    """Say which allowed names there are, the most similar one first."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}allowed: {', '.join(sorted(allowed))}"


class StrictModel(BaseModel):
    """A frozen section of the config that refuses unknown keys and wrong types by name.

    Types are strict; tuples alone are declared with `strict=False`, as YAML and JSON have lists.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if unknown:
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key '{key}'; {hint}",
                    {"key": unknown[0], "hint": nearest(unknown[0], list(cls.model_fields))},
                )
        return data
