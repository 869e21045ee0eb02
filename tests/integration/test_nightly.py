"""Nights that go on where the last one ended: which student a run begins with, and which counts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_run
from storage.maintenance import entries, find_garbage, remove_artifact
from storage.promoted import promoted
from storage.store import ArtifactStore
from tasks.checks.start import started
from tasks.presentation.sample_scores import read_sums
from tests.command import kdflow

pytestmark = [pytest.mark.ranks, pytest.mark.prefect]


def rows(first: int, last: int) -> str:
    made = [
        {"prompt": f"{a} plus {b}?", "completion": f"It is {a + b}."}
        for a in range(first, last)
        for b in range(10)
    ]
    return "".join(json.dumps(row) + "\n" for row in made)


def test_nights_go_on_where_the_last_one_ended(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "nights.jsonl"
    recipe = str(make_recipe(max_steps=3, start="latest"))
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path / "scratch"))
    places = ["--root", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")]
    source = f"data.sources.0.path={data}"

    def night(*overrides: str) -> tuple[str, str]:
        """What is said, and the run whose student counts then."""
        said = kdflow("run", recipe, source, "name=night", *overrides)
        last = promoted(store, "night")
        assert last is not None
        return said, last.run

    data.write_text(rows(0, 10))
    said, first = night()
    assert "promoted: student.start=latest goes on with this student" in said
    assert "served from cache" in night()[0], "nothing is new"

    data.write_text(rows(0, 14))
    said, second = night()
    assert second != first
    assert "served from cache" in night()[0]
    listed = {
        line["run"]: line
        for line in map(json.loads, kdflow("history", *places, "--json").splitlines())
    }
    one, two = (
        read_sums(Path(listed[run]["evaluation"]), title)
        for run, title in ((first, "student after"), (second, "student before"))
    )
    mine = {bytes(d): sums for d, sums in zip(one.digests_S16, one.sums_SC, strict=True)}
    common = [
        (mine[bytes(d)], sums)
        for d, sums in zip(two.digests_S16, two.sums_SC, strict=True)
        if bytes(d) in mine
    ]
    assert len(common) > 5
    np.testing.assert_allclose(*map(np.array, zip(*common, strict=True)), rtol=1e-4, atol=1e-5)

    said, again = night("--from", "evaluate")
    assert "made anew: evaluation/" in said
    assert "the student of " + second + " counts already" in said
    assert again == second

    data.write_text(rows(0, 16))
    said, third = night("promotion.metric=forward_kl", "student.lr=10")
    assert "not promoted: forward_kl is worse by" in said
    assert third == second
    assert f"{second} *" in kdflow("history", *places)
    record = promoted(store, "night")
    assert record is not None
    assert record.before == (first,)

    # What a night began with may go: the next one goes on all the same.
    kdflow("store", *places, "rm", "--yes", listed[first]["student"].rpartition("/")[2])
    assert started(load_run(recipe, {"data.sources.0.path": str(data), "name": "night"}))

    # A student that counts is kept though its run is forgotten; one that is gone is missed.
    kdflow("store", *places, "rm", second)
    (entry,) = [e for e in entries(store) if e.name == record.student]
    assert entry.runs == ("night (promoted)",)
    assert record.student not in {garbage.what for garbage in find_garbage(store, older_than_s=0)}
    remove_artifact(store, entry)
    said = kdflow("run", recipe, source, "name=night", code=1)
    assert f"the promoted student of {second}, {record.student}, is not in" in said
