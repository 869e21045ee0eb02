"""How settings of another program become a recipe.

Each setting has one row of a table: what it is called here, or why it has no name here. What is not
given has the other program's default, so that the recipe trains alike.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from string import Template
from typing import Any, NamedTuple

from configs.errors import ConfigError
from configs.text import parse_yaml

Flags = Mapping[str, Any]
# `NAME=value` or `export NAME="value"` on a line of its own, of a value that holds no flags.
ASSIGNED = re.compile(r"""^\s*(?:export\s+)?(\w+)=["']?([^"'\s]+)["']?\s*$""", re.MULTILINE)
MOST_NESTED = 4  # variables that are made of others


class Row(NamedTuple):
    """What a setting of theirs becomes: a field with its value, or words."""

    theirs: str
    ours: str


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A recipe, how it came about, and what a person has to look at."""

    program: str
    recipe: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def set(self, theirs: str, path: str, value: Any) -> None:
        """Give a field a value, and say so."""
        *sections, name = path.split(".")
        at = self.recipe
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
        self.rows.append(Row(theirs, f"{path}={json.dumps(value)}"))


class Rule(NamedTuple):
    """A field, and how its value is made of theirs."""

    path: str
    convert: Callable[[Any], Any]


def read_settings(text: str, name: str) -> dict[str, Any]:
    """The settings in a file: a mapping of YAML or JSON, or the flags of a shell script. Raises
    ConfigError.
    """
    if not name.endswith((".yaml", ".yml", ".json")):
        return _flags(text)
    tree = parse_yaml(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} does not hold a mapping of settings")
    return tree


def _flags(script: str) -> dict[str, Any]:
    """`--name value`, `--name=value` and lone `--name` of a script, also inside of its strings,
    with the variables that it sets. Raises ConfigError.
    """
    lines = [line.partition(" #")[0] for line in script.splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    for _ in range(MOST_NESTED):
        text = Template(text).safe_substitute(dict(ASSIGNED.findall(text)))
    text = re.sub(r"""^\s*\w+\+?=["'](.*)["']\s*$""", r"\1", text, flags=re.MULTILINE)
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=False)
    except ValueError as error:
        raise ConfigError(f"the script cannot be read as a shell would ({error})") from error
    found: dict[str, Any] = {}
    for word, following in pairwise([*words, "--"]):
        if not word.startswith("--") or len(word) == 2:
            continue
        flag, equals, value = word[2:].partition("=")
        if not equals:
            value = "true" if following.startswith("--") else following
        found[flag.replace("-", "_")] = parse_yaml(value, f"the value of --{flag}")
    return found


@dataclass(frozen=True, kw_only=True)
class Program:
    """Another program: settings that it alone has, its defaults, what its settings are called here,
    why others are left out, and what is made of several together.
    """

    name: str
    marks: frozenset[str]
    defaults: Flags
    rules: Mapping[str, Rule]
    left_out: Mapping[str, str]
    together: Callable[[Flags, Imported], set[str]]


def made(program: Program, settings: Flags) -> Imported:
    """The recipe of a program's settings."""
    given = {**program.defaults, **{k: v for k, v in settings.items() if v is not None}}
    found = Imported(program=program.name, recipe={"name": "imported"})
    used = program.together(given, found)
    for name, value in given.items():
        if "$" in str(value):
            found.warnings.append(f"{name}={value}: the script does not set that variable")
        theirs = f"{name}={value}" + ("" if name in settings else " (default)")
        if name in program.rules:
            rule = program.rules[name]
            try:
                found.set(theirs, rule.path, rule.convert(value))
            except (TypeError, ValueError, KeyError) as error:
                found.warnings.append(f"{theirs} was not understood ({error}): set {rule.path}")
        elif name in program.left_out:
            found.rows.append(Row(theirs, f"left out: {program.left_out[name]}"))
        elif name not in used:
            found.warnings.append(f"{theirs} has no counterpart that this command knows")
    return found


def pretrained(name: Any) -> dict[str, str]:
    """A model by its folder or hub name."""
    return {"type": "pretrained", "path": str(name)}


def schedule(name: Any) -> str:
    """A learning rate's schedule by transformers' name. Raises KeyError."""
    known = {
        "linear": "linear",
        "cosine": "cosine",
        "cosine_with_min_lr": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
        "warmup_stable_decay": "wsd",
        "cosine_with_restarts": "cosine_with_restarts",
        "polynomial": "polynomial",
        "inverse_sqrt": "inverse_sqrt",
    }
    return known[str(name)]


def source(path: Any, **more: Any) -> dict[str, Any]:
    """Data by a file or a hub name."""
    files = str(path).endswith((".jsonl", ".json", ".parquet", ".arrow")) or "*" in str(path)
    return {"type": "files" if files else "hub", "path": str(path)} | {
        key: value for key, value in more.items() if value is not None and not files
    }


def whole(value: Any) -> int:
    """A number of something. Raises ValueError."""
    if float(value) != int(float(value)):
        raise ValueError("no whole number")
    return int(float(value))


def named(text: Any) -> str:
    """A run's name of theirs."""
    return re.sub(r"[^a-z0-9._-]+", "-", str(text).lower())


def rounds_of(found: Imported, prompts: int) -> None:
    """A number of rounds, where theirs is of epochs."""
    found.recipe["on_policy"]["rounds"] = 100
    found.warnings.append(
        "on_policy.rounds=100 stands for their epochs: set it to epochs x samples / "
        f"{prompts} prompts of a round"
    )


# What transformers calls them, and other programs after it.
SHARED_RULES = {
    "learning_rate": Rule("student.lr", float),
    "weight_decay": Rule("student.weight_decay", float),
    "seed": Rule("seed", whole),
    "bf16": Rule("student.compute_dtype", lambda v: "bfloat16" if v else "float32"),
    "gradient_checkpointing": Rule("student.activation_checkpointing", bool),
    "logging_steps": Rule("student.log_every", whole),
}
SHARED_LEFT_OUT = {
    "attn_implementation": "student.attention is sdpa, packed",
}
