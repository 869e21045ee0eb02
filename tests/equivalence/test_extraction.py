"""A teacher's stored states are the same bits however its work was cut."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_run
from tests.conftest import run_inline

pytestmark = pytest.mark.ranks
OVERRIDES = {"storage.shard_rows": 64, "teacher.tokens_per_batch": 96}


def shards(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("hidden/c/*/0/0/0"))
    }


@pytest.mark.parametrize("kept", [[], [0], [1, 3], [2, 4, 5, 6]])
def test_states_do_not_depend_on_which_shards_were_there(
    make_recipe: Callable[..., Path], tmp_path: Path, kept: list[int]
) -> None:
    """As after a kill: the padding of a batch moves the last bits of what is in it."""
    run = load_run(str(make_recipe()), OVERRIDES)
    folder = Path(run_inline(run, until="extract")["states"].uri)
    whole = shards(folder)
    assert len(whole) > 7
    (folder / "manifest.json").unlink()
    for number, name in enumerate(whole):
        if number not in kept:
            (folder / name).unlink()
            shard = name.split("/c/")[1].split("/")[0]
            (folder / f"commits/{int(shard):06d}.json").unlink()
    run_inline(run, until="extract")
    assert shards(folder) == whole


def test_states_do_not_depend_on_the_number_of_ranks(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = load_run(str(make_recipe()), OVERRIDES)
    whole = shards(Path(run_inline(run, until="extract")["states"].uri))
    places = {"storage.root": str(tmp_path / "other"), "storage.scratch": str(tmp_path / "s")}
    other = load_run(str(make_recipe()), OVERRIDES | places | {"teacher.num_ranks": 3})
    again = run_inline(other, until="extract", launched=["extract"])
    assert shards(Path(again["states"].uri)) == whole
