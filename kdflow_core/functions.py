"""A user's Python function that judges answers: loaded, and asked."""

import importlib.util
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.schema.base import file_and_name
from kdflow_core.errors import DataError

Judge = Callable[[str, str, str | None], Any]


def load_function(function: str, field: str) -> Judge:
    """The function of a Python file, of `file.py:name`, which stands in a `field` of the config.
    Raises DataError when it is not there.
    """
    file, name = file_and_name(function)
    path = Path(file)
    spec = importlib.util.spec_from_file_location("kdflow_function", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"{field}: there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise DataError(f"{field}: {path} has no function '{name}'")
    checked: Judge = found
    return checked


def judged(function: Judge, prompt: str, answer: str, label: str | None, *, field: str) -> float:
    """What the function makes of one answer. Raises DataError when that is no finite number, or an
    error of the function's own.
    """
    try:
        value = function(prompt, answer, label)
    except Exception as error:  # a user's function may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{field} failed for the answer {answer[:80]!r} to the prompt {prompt[-80:]!r}: "
            f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{field} gave {value!r} for the answer {answer[:80]!r}; it must give a finite number"
        )
    return float(value)
