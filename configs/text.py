"""YAML text as plain values: nothing that it says can hang, blow up or change a run in silence."""

import datetime as dt
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 reads numbers (`1e-4` is a float) and booleans (`true` and `false`;
    `no`, `off` and `y` are text), without duplicate keys, and without aliases that stand for
    themselves or for more than `MAX_VALUES` values.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document, when it can be built."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, known: dict[int, int | None]) -> int:
        """How many values a node stands for, each alias counted as what it repeats."""
        if id(node) in known:
            size = known[id(node)]
            if size is None:
                raise yaml.MarkedYAMLError(
                    problem="an alias stands inside what it repeats", problem_mark=node.start_mark
                )
            return size
        known[id(node)] = None
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(self._measure(n, known) for pair in node.value for n in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._measure(n, known) for n in node.value)
        if size > MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"it stands for more than {MAX_VALUES:,} values",
                problem_mark=node.start_mark,
            )
        known[id(node)] = size
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping in which every key stands once."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' stands twice; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain values. Raises ConfigError with the line when it cannot be used."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_reason(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply") from error
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise ConfigError(f"{where} holds a value that cannot be read: {error}") from error


def _reason(error: yaml.YAMLError) -> str:
    """The error on one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, context = error.problem_mark, f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"


def read_text(path: Path) -> str:
    """A small text file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes; a recipe is a small file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def as_json(value: Any) -> Any:
    """What JSON has no form for, as text: dates. Raises TypeError for anything else."""
    if isinstance(value, dt.date):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")
