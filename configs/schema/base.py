"""The base of every schema: frozen, strict, and helpful about misspelt keys."""

import difflib
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST = 10**9  # of anything that is counted: more is a slip of the pen
MOST_RANKS = 1024
SEEDS = 2**32
KEYLESS = {"s3", "s3a", "gs", "gcs"}  # schemes whose URLs have no place for a user
MAX_NAME_BYTES = 255  # of a file, on every file system in use
MAX_PATH_BYTES = 4096


def _possible_path(path: str) -> str:
    """A path that a file system can hold. Raises ValueError."""
    if any(ord(sign) < 32 for sign in path):
        raise ValueError("it holds control characters; a path has none")
    scheme, colon, rest = path.partition("://")
    if colon:
        if scheme.rpartition("::")[2] in KEYLESS and "@" in rest.split("/")[0]:
            raise ValueError(
                "credentials do not belong into it; give them as the environment, a profile or the "
                f"provider's config file has them, and here {scheme}://bucket/..."
            )
        return path
    longest = max(len(part.encode()) for part in path.split("/"))
    if longest > MAX_NAME_BYTES or len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError(
            f"it is too long: a name has at most {MAX_NAME_BYTES} bytes, a path {MAX_PATH_BYTES}"
        )
    return path


# A Python function, as `file.py:name`.
PythonFunction = Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible_path)]


def file_and_name(function: str) -> tuple[str, str]:
    """The two parts of a `PythonFunction`."""
    file, _, name = function.rpartition(":")
    return file, name


def nearest(name: str, allowed: list[str]) -> str:
    """Say which allowed names there are, the most similar one first."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}allowed: {', '.join(sorted(allowed))}"


class StrictModel(BaseModel):
    """A frozen section of the config that refuses unknown keys and wrong types by name.

    Types are strict; tuples alone are declared with `strict=False`, as YAML and JSON have lists.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

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
