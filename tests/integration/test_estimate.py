"""`kdflow estimate` and `delivery: auto`, as users start them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_run
from tasks.forecast.estimate import prospect, prospect_here, read_estimate
from tasks.forecast.known_states import known_states
from tasks.stages.explanation import decided, stage_status
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages
from tests.command import kdflow
from tests.conftest import run_inline
from tests.integration.test_nightly import rows

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]


def test_an_estimate_foretells_the_stored_states(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(make_recipe())
    output = kdflow("estimate", recipe, "planned_runs=3")
    assert "3 runs planned" in output
    assert re.search(r"states as raw \(chosen\) .* bytes per supervised token", output)
    assert re.search(r"delivery: auto +│ (live|replay): ", output)
    config = load_run(recipe)
    auto = plan_stages(config.model_copy(update={"delivery": "auto"}))["estimate"]
    store = open_store(config)
    ref = store.find(auto.kind, auto.digest)
    assert ref is not None
    found = read_estimate(store, ref)
    states = run_inline(config, until="extract")["states"]
    assert (found.sequences, found.rows) == (states.counts["sequences"], states.counts["rows"])
    files = [p for p in Path(states.uri).rglob("states.zarr/*/c/**/*") if p.is_file()]
    foretold = prospect(config, found, None).stored_bytes["raw"]
    assert foretold == pytest.approx(sum(p.stat().st_size for p in files), rel=0.1)
    assert found.steps == 6
    assert found.teacher_rate > 0
    assert found.student_rate > 0


def test_auto_takes_the_cheaper_delivery_and_says_so(make_recipe: Callable[..., Path]) -> None:
    """Six steps of eight sequences are fewer than there are: live has less to do."""
    recipe = str(make_recipe())
    output = kdflow("run", recipe, "delivery=auto")
    assert "delivery: auto is live here" in output
    for delivery in ("auto", "live"):
        again = load_run(recipe, {"delivery": delivery})
        assert all(s.cached for s in stage_status(again, plan_stages(again)))
    often = load_run(recipe, {"delivery": "auto", "planned_runs": 50})
    estimate = plan_stages(often)["estimate"]  # the same one
    store = open_store(often)
    ref = store.find(estimate.kind, estimate.digest)
    assert ref is not None
    found = read_estimate(store, ref)
    assert prospect(often, found, None).delivery == "replay"
    # A student that was trained is not trained again in another way.
    assert decided(often, ref).delivery == "live"
    assert "its student is trained" in prospect_here(often, found).reason


def test_states_that_are_stored_are_replayed(make_recipe: Callable[..., Path]) -> None:
    """Even where live would have less to do than storing them, and whatever room is left."""
    recipe = str(make_recipe())
    stored = load_run(recipe)
    run_inline(stored, until="extract")
    auto = load_run(recipe, {"delivery": "auto"})
    estimate = run_inline(auto, until="estimate", launched={"estimate"})["estimate"]
    found = read_estimate(open_store(auto), estimate)
    assert prospect(auto, found, 0).delivery == "live"
    outcome = prospect_here(auto, found)
    assert (outcome.delivery, outcome.extract_s, outcome.fits) == ("replay", 0.0, True)
    assert decided(auto, estimate).delivery == "replay"


def test_states_that_other_runs_have_count_as_there(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A night with some more rows asks the teacher for these alone, and what is there already takes
    no room again.
    """
    data = tmp_path / "nights.jsonl"
    data.write_text(rows(0, 10))
    recipe, source = str(make_recipe()), {"data.sources.0.path": str(data)}
    run_inline(load_run(recipe, source), until="extract")
    data.write_text(rows(0, 11))
    auto = load_run(recipe, source | {"delivery": "auto"})
    estimate = run_inline(auto, until="estimate", launched={"estimate"})["estimate"]
    found = read_estimate(open_store(auto), estimate)
    anew, outcome = prospect(auto, found, None), prospect_here(auto, found)
    assert (anew.known, 0.8 < outcome.known < 1) == (0, True)
    assert outcome.extract_s == pytest.approx(anew.extract_s * (1 - outcome.known))
    room = anew.stored_bytes["raw"] // 3
    assert not prospect(auto, found, room).fits
    plan = plan_stages(load_run(recipe, source))
    assert prospect(auto, found, room, known_states(auto, plan)).fits
    other = load_run(recipe, source | {"storage.codec": "int8"})  # which takes room of its own
    assert known_states(other, plan_stages(other)).rows == 0
    assert known_states(other, plan_stages(other)).tokens == pytest.approx(outcome.known)
