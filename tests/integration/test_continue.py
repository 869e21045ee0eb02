"""A training that is done goes on: more steps, more data, from its last checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from storage.artifact import ArtifactRef
from storage.maintenance import find_garbage
from storage.promoted import promoted
from storage.store import ArtifactStore
from tasks.presentation.tracking import METRICS_FILE, read_metrics
from tasks.rounds.round_record import read_rounds
from tests.command import kdflow
from tests.integration.test_nightly import rows

pytestmark = [pytest.mark.ranks, pytest.mark.prefect]

CONSTANT = {"lr_schedule": "constant", "warmup_fraction": 0.0, "keep_final": True}


def test_a_training_that_is_done_goes_on(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(rows(0, 10))
    recipe = str(make_recipe(max_steps=3, **CONSTANT))
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path / "scratch"))
    places = ["--root", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")]
    goes_on = "student.start=continue"

    def run(*overrides: str, code: int = 0, name: str = "short") -> str:
        source = f"data.sources.0.path={data}"
        return kdflow("run", recipe, source, f"name={name}", *overrides, code=code)

    def newest(name: str = "short") -> ArtifactRef:
        record = promoted(store, name)
        assert record is not None
        found = store.find_named(record.student)
        assert found is not None
        return found

    assert "promoted" in run(goes_on), "the first of its name begins with the recipe's model"
    first = newest()
    assert "served from cache" in run(goes_on), "nothing is new"
    assert newest() == first
    assert f"checkpoints/{first.name}" not in {
        garbage.what for garbage in find_garbage(store, older_than_s=0)
    }

    # More steps: at a constant rate it is the training that was that long from the start.
    said = run(goes_on, "student.max_steps=5")
    assert f"going on with the training of {first.name}, of which 3 steps are done" in said
    longer = newest()
    run("student.max_steps=5", name="whole")
    weights, expected = (
        load_file(store.local_copy(student) / "model" / "model.safetensors")
        for student in (longer, newest("whole"))
    )
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert longer.counts == newest("whole").counts
    steps = [r["step"] for r in read_metrics(store.local_copy(longer) / METRICS_FILE)]
    assert steps == [1, 2, 3, 4, 5]
    assert "served from cache" in run(goes_on, "student.max_steps=5")

    # More data.
    data.write_text(rows(0, 12))
    run(goes_on, "student.max_steps=7")
    assert newest().counts["steps"] == 7
    assert newest().counts["tokens"] > longer.counts["tokens"]

    # What does not fit is said beforehand.
    for override, said in (
        ("student.max_steps=7", "has 7 steps, which student.max_steps=7 counts, too"),
        ("student.lora.rank=2", "student.lora: None, now {"),
        ("student.optimizer.type=muon", "student.optimizer: {'type': 'adamw'"),
        ("student.continues=student/00", "student.continues: student/00 is not in"),
    ):
        assert said in run(goes_on, "student.max_steps=9", "student.lr=1e-4", override, code=1)

    # By name, also with a newer one there; and what was trained without `keep_final`, not.
    named = f"student.continues={first.name}"
    run(goes_on, named, "student.max_steps=6", "student.keep_final=false")
    said = run(goes_on, "student.max_steps=9", code=1)
    assert f"has no last checkpoint of {newest().name}, which was trained without" in said

    # It is damaged, or goes with its student.
    (checkpoint,) = (tmp_path / "store" / "checkpoints" / first.name).glob("step-*")
    file = next(checkpoint.glob("__0_*"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    said = run(goes_on, named, "student.max_steps=8", code=1)
    assert f"the last checkpoint of {first.name} is damaged" in said
    kdflow("store", *places, "rm", "--yes", first.name)
    assert not checkpoint.exists()


def test_rounds_go_on(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """At a constant rate they are those of a run that had as many from the start, also where they
    replay answers that another run has; twice in a row.
    """
    section = {"rounds": 1, "prompts_per_round": 8, "max_new_tokens": 8, "heldout_sequences": 4}
    recipe = str(make_recipe(max_steps=None, **CONSTANT, start="continue"))
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path / "scratch"))

    def run(name: str, rounds: int, *overrides: str, code: int = 0) -> str:
        own = section | {"rounds": rounds, "replay": {"rounds": 2, "ratio": 1.0}}
        settings = ("mode=onpolicy", f"on_policy={json.dumps(own)}", f"name={name}")
        return kdflow("run", recipe, *settings, *overrides, code=code)

    def newest(name: str) -> ArtifactRef:
        record = promoted(store, name)
        assert record is not None
        found = store.find_named(record.student)
        assert found is not None
        return found

    run("short", 1)
    first = newest("short")
    said = run("short", 2)
    assert f"going on with the training of {first.name}, of which 1 steps are done" in said
    assert "round 1 of 2" not in said
    run("short", 4)
    run("whole", 4)
    longer, whole = newest("short"), newest("whole")
    weights, expected = (
        load_file(store.local_copy(student) / "model" / "model.safetensors")
        for student in (longer, whole)
    )
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert longer.counts == whole.counts
    records, others = (read_rounds(store.local_copy(student)) for student in (longer, whole))
    assert [record.number for record in records] == [1, 2, 3, 4]
    assert [record.loss for record in records] == [record.loss for record in others]
    assert "served from cache" in run("short", 4)

    for rounds, override, message in (
        (4, "student.lr=1e-4", "has 4 rounds, which on_policy.rounds=4 counts, too; raise it"),
        (6, "on_policy.steps_per_round=2", "has 4 rounds of 1 steps, and those of this run have 2"),
    ):
        assert message in run("short", rounds, override, code=1)
    offpolicy = kdflow("run", recipe, "name=short", "student.max_steps=9", code=1)
    assert "was trained in rounds, which are no part of `mode: offpolicy`" in offpolicy
