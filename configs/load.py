"""Recipes (YAML) and dotted overrides in, a validated `RunConfig` out."""

import copy
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from configs.text import as_json, parse_yaml, read_text

MAX_SHOWN = 120
RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that ship with kdflow."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by name or by path. Raises ConfigError when there is none."""
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.parent != Path():
        if os.path.isfile(path):  # False, too, for a name that no file can have
            return path
        raise ConfigError(f"there is no recipe file '{recipe}'")
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    close = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"no recipe '{recipe}'; {hint}shipped: {', '.join(recipe_names())}")


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`["student.lr=1e-4"]` as `{"student.lr": 1e-4}`; the values are YAML."""
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override '{assignment}' is not of the form section.field=value "
                "(for instance student.lr=1e-4)"
            )
        overrides[key] = parse_yaml(value, f"the value of {key}")
    return overrides


def load_run(recipe: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a recipe, apply dotted overrides, validate.

    A relative data or model path in a recipe starts at the recipe's folder; one in an override
    starts at the current directory.

    Raises:
        ConfigError: with field path, value and remedy, for anything that is not a valid run.
    """
    path = find_recipe(recipe)
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold a mapping of sections")
    tree = _with_absolute_paths(tree, path.parent.resolve())
    for key, value in (overrides or {}).items():
        _set(tree, key, copy.deepcopy(value))  # paths in it are made absolute in place
    return validate_run(_with_absolute_paths(tree, Path.cwd()))


def validate_run(tree: dict[str, Any]) -> RunConfig:
    """Plain values as a RunConfig. Raises ConfigError that lists every problem."""
    _refuse_non_finite(tree, "")
    try:
        text = json.dumps(tree, default=as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config holds a value that JSON cannot hold: {error}") from error
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        lines = [_describe(item, tree) for item in error.errors(include_url=False)]
        raise ConfigError("the config is not valid:\n" + "\n".join(lines)) from error


def _refuse_non_finite(value: Any, where: str) -> None:
    """Raises ConfigError for NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"the config is not valid:\n  {where} = {value}: give a finite number")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_non_finite(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _refuse_non_finite(inner, f"{where}.{number}")


def _describe(item: Any, tree: dict[str, Any]) -> str:
    parts: list[str | int] = []
    value: Any = tree
    for part in item["loc"]:
        # A discriminated union puts its tag into the location; the tag is not a key of the config.
        if isinstance(value, dict) and part not in value and value.get("type") == part:
            continue
        parts.append(part)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            value = None
    where = ".".join(str(part) for part in parts)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "unknown_key":
        return f"  {'.'.join(filter(None, [where, item['ctx']['key']]))}: {message}"
    if parts and parts[-1] == "[key]":
        return f"  {'.'.join(map(str, parts[:-2]))}: unknown key '{parts[-2]}'; {message}"
    shown = "" if isinstance(value, dict | list) or item["type"] == "missing" else _shown(value)
    return f"  {where or 'run'}{shown}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f" = {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}"


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    node: Any = tree
    *parents, last = dotted.split(".")
    if not all((*parents, last)):
        raise ConfigError(f"override '{dotted}': a part of the name is empty")
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[:depth]) or "run")
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, where)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override of '{where}.{part}': it holds {child!r}, not a section")
    return child


def _index(node: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override in '{where}': '{part}' is not an index below {len(node)}")
    return int(part)


def _with_absolute_paths(tree: dict[str, Any], base: Path) -> dict[str, Any]:
    """The tree with relative paths of data, GGUF files and Python functions, and model paths that
    start with a dot, made absolute. Other model paths may be names on the hub.
    """
    algorithm = tree.get("algorithm")
    teachers = algorithm.get("teachers") if isinstance(algorithm, dict) else None
    shares = teachers.values() if isinstance(teachers, dict) else []
    others = [share.get("teacher") for share in shares if isinstance(share, dict)]
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and source.get("type", "files") != "hub":
            _make_absolute(source, base)
    for part in (tree.get("teacher"), tree.get("student"), *others):
        model = part.get("model") if isinstance(part, dict) else None
        if isinstance(model, dict) and (
            model.get("type") == "gguf" or str(model.get("path", "")).startswith(".")
        ):
            _make_absolute(model, base)
    on_policy = tree.get("on_policy")
    reward = on_policy.get("reward") if isinstance(on_policy, dict) else None
    evaluation = tree.get("eval")
    lm_eval = evaluation.get("lm_eval") if isinstance(evaluation, dict) else None
    for section, field in (
        (reward, "function"),
        (evaluation, "verifier"),
        (lm_eval, "tasks_folder"),
    ):
        if isinstance(section, dict):
            _make_absolute(section, base, field)
    return tree


def _make_absolute(node: dict[str, Any], base: Path, key: str = "path") -> None:
    path = node.get(key)
    if isinstance(path, str) and path and "://" not in path and not Path(path).is_absolute():
        node[key] = str(base / path)
