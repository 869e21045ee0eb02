"""`python -m kdflow_core.sglang_runtime.compare_versions WHEEL`: what another release of SGLang
changes of what kdflow uses of it.

Both are read as source, and nothing of the wheel is installed or run. What kdflow uses is read from
this package, too: the names that it imports, the attributes that it takes of them, the methods that
it calls or replaces, and the options that it sets. Bodies are not compared: a signature that stays
says that a call still fits, not that it still means the same.
"""

import argparse
import ast
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parent
OPTIONS = "sglang.srt.arg_groups.field_order"
GONE = "gone"
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass
class Release:
    """A release as definitions by name; `root` is the folder that holds its package, installed or
    in a wheel.
    """

    root: Path | zipfile.Path
    _modules: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        """A module's code, None where there is no such module."""
        if name not in self._modules:
            path = name.replace(".", "/")
            self._modules[name] = self._parsed(f"{path}.py") or self._parsed(f"{path}/__init__.py")
        return self._modules[name]

    def _parsed(self, path: str) -> ast.Module | None:
        file = self.root.joinpath(path)
        return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name of a module is defined, and as what; through imports of imports."""
        tree = self.module(module)
        found = None if tree is None else self._defined(tree, module, name)
        submodule = self.module(f"{module}.{name}")
        if found is None and submodule is not None:
            return f"{module}.{name}", submodule
        if found is None and tree is not None:
            # A module may make a name when it is asked for it.
            lazy = next((n for n in tree.body if getattr(n, "name", "") == "__getattr__"), None)
            found = None if lazy is None or name not in ast.unparse(lazy) else (module, lazy)
        return found

    def _defined(self, tree: ast.Module, module: str, name: str) -> tuple[str, ast.AST] | None:
        """A name as the statements of a module define or import it."""
        starred = []
        for node in _statements(tree):
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom) and node.module and node.module != module:
                given = {alias.asname or alias.name: alias.name for alias in node.names}
                if name in given:
                    return self.find(node.module, given[name])
                starred += [node.module] * ("*" in given)
        places = (self.find(other, name) for other in starred)
        return next((place for place in places if place is not None), None)

    def methods(self, module: str, node: ast.ClassDef) -> dict[str, ast.AST]:
        """The methods and fields of a class, and those of its bases."""
        found: dict[str, ast.AST] = {}
        for base in reversed(node.bases):
            where = self.find(module, ast.unparse(base).partition("[")[0])
            if where is not None and isinstance(where[1], ast.ClassDef) and where[1] is not node:
                found |= self.methods(where[0], where[1])
        for member in node.body:
            if isinstance(member, Function):
                found[member.name] = member
            elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                found[member.target.id] = member
        return found

    @cached_property
    def options(self) -> set[str]:
        """The options of a server."""
        tree = self.module(OPTIONS)
        constants = (
            () if tree is None else (n for n in ast.walk(tree) if isinstance(n, ast.Constant))
        )
        return {node.value for node in constants if isinstance(node.value, str)}


@dataclass(frozen=True)
class Used:
    """What kdflow uses: names by module, and all words that may be attributes or options."""

    names: set[tuple[str, str]]
    words: set[str]


def used_names() -> Used:
    """What the code of this package uses of SGLang."""
    names: set[tuple[str, str]] = set()
    words: set[str] = set()
    for file in sorted(PACKAGE.glob("*.py")):
        if file == Path(__file__):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
                names |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                words.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                words.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    return Used(names, words)


def compare(old: Release, new: Release, used: Used) -> Iterator[tuple[str, str]]:
    """What is used and differs: its name, and how."""
    for module, name in sorted(used.names):
        before = old.find(module, name)
        if before is not None:
            yield from _compare_name(old, new, (module, name), before, used.words)
    for option in sorted((old.options & used.words) - new.options):
        yield f"option {option}", GONE


def _compare_name(
    old: Release,
    new: Release,
    key: tuple[str, str],
    before: tuple[str, ast.AST],
    words: set[str],
) -> Iterator[tuple[str, str]]:
    title = ".".join(key)
    after = new.find(*key)
    if after is None:
        yield title, GONE
        return
    if isinstance(before[1], ast.Module):  # a module: what is taken of it
        for name in sorted(_names(before[1]) & words):
            inner = old.find(before[0], name)
            if inner is not None and not isinstance(inner[1], ast.Module):
                yield from _compare_name(old, new, (before[0], name), inner, words)
        return
    if isinstance(before[1], ast.ClassDef) and isinstance(after[1], ast.ClassDef):
        own, other = old.methods(*before), new.methods(*after)  # type: ignore[arg-type]
        for name in sorted(own.keys() & (words | {"__init__"})):
            if name not in other:
                yield f"{title}.{name}", GONE
            elif (change := _change(own[name], other[name])) is not None:
                yield f"{title}.{name}", change
    elif (change := _change(before[1], after[1])) is not None:
        yield title, change


def _change(before: ast.AST, after: ast.AST) -> str | None:
    """How a signature differs; None where it does not, or where there is none."""
    if not isinstance(before, Function):
        return None
    if not isinstance(after, Function):
        return f"({ast.unparse(before.args)}) -> no function"
    old, new = _plain(before.args), _plain(after.args)
    if old == new:
        return None
    gone, come = [a for a in old if a not in new], [a for a in new if a not in old]
    parts = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(come)}"] * bool(come)
    return "; ".join(parts) or f"in another order: {', '.join(new)}"


def _plain(arguments: ast.arguments) -> list[str]:
    """The arguments, each with its default and without its type."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = zip(positional, [*defaults, *arguments.defaults], strict=True)
    named = [*pairs, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    starred = (("*", arguments.vararg), ("**", arguments.kwarg))
    rest = [f"{stars}{a.arg}" for stars, a in starred if a]
    return [a.arg if d is None else f"{a.arg}={ast.unparse(d)}" for a, d in named] + rest


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements of a module, also those under its conditions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            waiting += list(ast.iter_child_nodes(node))


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _names(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, Definition):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= _targets(node)
    return found


def main(wheel: Path) -> int:
    """Print what differs; the exit code is 1 where something does."""
    spec = find_spec("sglang")
    if spec is None or spec.origin is None:
        sys.exit("SGLang is not installed, so there is nothing to compare with")
    with zipfile.ZipFile(wheel) as file:
        old, new = Release(Path(spec.origin).parents[1]), Release(zipfile.Path(file))
        used = used_names()
        differences = list(compare(old, new, used))
    lines = [f"{name}: {what}" for name, what in differences]
    count = f"{len(used.names)} names are used; {len(differences)} of what is used of them differ"
    sys.stdout.write("\n".join([*lines, count]) + "\n")
    return 1 if differences else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("wheel", type=Path, help="a wheel of another release of SGLang")
    sys.exit(main(parser.parse_args().wheel))
