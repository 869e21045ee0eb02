"""The catalogue of stages: every record holds, a job refuses what is not its own, and the README's
example is a stage.
"""

import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, load_run
from configs.schema.run import RunConfig
from configs.schema.teacher import TransformersTeacher
from kdflow_core.errors import WorkerError
from tasks.execution.stage_tasks import STAGE_TASKS
from tasks.jobs.stage_host import job_of
from tasks.jobs.stage_run import StageRun, job
from tasks.stages import catalogue, slices
from tasks.stages.catalogue import CATALOGUE, ROUND_ARTIFACTS
from tasks.stages.identity import StageSpec, find, stage_spec
from tasks.stages.planning import plan_stages, round_identities
from tests.conftest import SilentReporter, run_inline
from tests.readme import ROOT

ON_POLICY = {
    "mode": "onpolicy",
    "student.max_steps": None,
    "on_policy": {"rounds": 2, "prompts_per_round": 8},
}


def test_every_record_holds() -> None:
    assert list(CATALOGUE) == list(STAGE_TASKS)
    versions: dict[str, int] = {}
    for name, stage in CATALOGUE.items():
        module, _, function = stage.job.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert name == stage.name
        # One kind, one code version: the stages that make a kind are one program.
        assert versions.setdefault(stage.kind, stage.code_version) == stage.code_version
    assert not versions.keys() & ROUND_ARTIFACTS.keys()


def spec_of(run: RunConfig, stage: str) -> StageSpec:
    return StageSpec(identity=plan_stages(run)[stage], run=run, inputs={})


@pytest.mark.parametrize("own", sorted(CATALOGUE))
def test_a_job_refuses_a_spec_of_another_stage(tiny_run: RunConfig, own: str) -> None:
    for stage in plan_stages(tiny_run):
        if CATALOGUE[stage].job != CATALOGUE[own].job:
            with pytest.raises(WorkerError, match=f"was given a spec of stage '{stage}'"):
                job_of(own)(StageRun(spec_of(tiny_run, stage), SilentReporter()))


def test_training_in_one_go_refuses_a_run_of_rounds(make_recipe: Callable[..., Path]) -> None:
    """It would publish weights that no round has trained."""
    run = load_run(str(make_recipe()), ON_POLICY)
    spec = spec_of(run, "train")
    with pytest.raises(WorkerError, match="mode=onpolicy rounds make the student"):
        job_of("train")(StageRun(spec, SilentReporter()))
    for identity in round_identities(spec.identity, run).values():
        other = spec.model_copy(update={"identity": identity})
        with pytest.raises(WorkerError, match="was given a spec of stage 'train' that makes"):
            job_of("train")(StageRun(other, SilentReporter()))


def test_a_spec_of_another_program_is_refused(tiny_run: RunConfig) -> None:
    spec = spec_of(tiny_run, "tokenize")
    old = spec.identity.model_copy(update={"code_version": 1})
    with pytest.raises(WorkerError, match="run different programs"):
        job_of("tokenize")(StageRun(spec.model_copy(update={"identity": old}), SilentReporter()))


def test_a_teacher_whose_signals_are_not_read_is_refused(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the config, before anything starts; what reads text alone takes any teacher."""
    monkeypatch.setattr(TransformersTeacher, "SIGNAL", "top_k")
    recipe = str(make_recipe())
    load_run(recipe, {"algorithm": {"type": "sft"}})
    with pytest.raises(ConfigError, match=r"vanilla_kd reads the signals \['hidden'\], .*top_k"):
        load_run(recipe)


def test_the_readmes_stage_is_a_stage(tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three pieces, as the README shows them, are planned, run and found again."""
    text = (ROOT / "tasks/README.md").read_text()
    record, own_slice, own_job = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = vars(slices) | {}
    exec(own_slice, names)
    monkeypatch.setattr(slices, "longest", names["longest"], raising=False)
    module = types.ModuleType("tasks.jobs.longest")
    exec(own_job, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    records = dict(vars(catalogue))
    exec(record, records)
    stage = records["LONGEST"]
    before = {name: identity.digest for name, identity in plan_stages(tiny_run).items()}
    monkeypatch.setitem(catalogue._BY_NAME, stage.name, stage)
    plan = plan_stages(tiny_run)
    assert {name: plan[name].digest for name in before} == before
    spec = stage_spec(plan["longest"], tiny_run, run_inline(tiny_run, until="tokenize"))
    made = job_of("longest")(StageRun(spec, SilentReporter()))
    assert made is not None
    assert made == find(tiny_run, plan["longest"])
    found = json.loads((Path(made.uri) / "longest.json").read_text())
    assert found["tokens"] == max(found["lengths"])


def test_a_decorated_job_keeps_its_name() -> None:
    @job("report")
    def mine(stage: StageRun) -> None:
        """Does nothing."""

    assert (mine.__name__, mine.__doc__) == ("mine", "Does nothing.")
