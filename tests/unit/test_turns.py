"""Student, teacher and rollout engine on one device take turns, from the start."""

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from configs.load import load_run
from configs.schema.rollout import SglangRollout
from kdflow_core.rollout.sglang import SglangRolloutEngine
from kdflow_core.student.optim import Optimizers
from kdflow_core.student.sleeping import StudentOffload
from kdflow_core.workers.base import Launcher, Placement
from tasks.forecast.memory import memory_phases
from tasks.rounds.processes import RoundProcesses
from tasks.rounds.weight_swap import WeightSwap
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages

CACHE_TOKENS = 1000
RAY = {"type": "ray"}


class Device:
    """Counts the bytes that parts hold on it."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.held: dict[str, int] = {}
        self.most = 0
        self.log: list[str] = []

    def take(self, part: str, size: int) -> None:
        self.held[part] = size
        self.most = max(self.most, sum(self.held.values()))
        self.log.append(f"{part} comes")

    def leave(self, part: str) -> None:
        if self.held.pop(part, 0):
            self.log.append(f"{part} leaves")


class Weights(torch.nn.Module):
    """A student whose weights, and what an optimizer keeps of them, are counted only."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        super().__init__()
        self._device, self._sizes = device, sizes
        self.to(torch.device("cuda"))

    def to(self, device: torch.device) -> "Weights":  # type: ignore[override] # of one kind
        if device.type == "cuda":
            self._device.take("student", self._sizes["student"])
        else:
            self._device.leave("student")
        return self


class CountedOffload(StudentOffload):
    """Moves no tensors."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        self._counted, self._sizes = device, sizes
        super().__init__(Weights(device, sizes), Optimizers([]), torch.device("cuda"))
        self._move_states(torch.device("cuda"))

    def _move_states(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._counted.take("moments", self._sizes["moments"])
        else:
            self._counted.leave("moments")


class Trainer:
    """As `TrainerHost` does it: the student is built and leaves, then the teacher."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        self._device, self._sizes = device, sizes
        self._student = CountedOffload(device, sizes)
        self._student.sleep()
        device.take("teacher", sizes["teacher"])
        device.leave("teacher")

    def gpus(self) -> int:
        return self._device.count

    def score(self, **_: Any) -> dict[str, int]:
        self._student.sleep()
        self._device.take("teacher", self._sizes["teacher"])
        self._device.take("states", self._sizes["states"])
        self._device.leave("teacher")
        return {}

    def train(self, **_: Any) -> dict[str, int]:
        self._student.wake()
        for part in ("gradients", "logits"):
            self._device.take(part, self._sizes[part])
        for part in ("gradients", "logits", "states"):
            self._device.leave(part)
        return {}

    def progress(self) -> dict[str, int]:
        return {"step": 1, "buckets": 1, "bytes": 1}

    def open_weights(self) -> None:
        self._student.bring_weights()

    def bucket(self, number: int) -> dict[str, Any]:
        self._device.take("buckets", self._sizes["buckets"])
        return {"number": number}

    def close_weights(self) -> None:
        self._device.leave("buckets")
        self._student.sleep()


class Memory:
    """What SGLang's engine has on the device, by its own names."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        self._device = device
        self._parts = {"weights": "engine", "kv_cache": "cache", "cuda_graph": "graphs"}
        self._sizes = sizes | {"graphs": 0}
        self.resume_memory_occupation(list(self._parts))

    def release_memory_occupation(self, tags: list[str]) -> None:
        for tag in tags:
            self._device.leave(self._parts[tag])

    def resume_memory_occupation(self, tags: list[str]) -> None:
        for tag in tags:
            assert self._parts[tag] not in self._device.held, "what is awake cannot wake"
            self._device.take(self._parts[tag], self._sizes[self._parts[tag]])

    def begin_weight_update(self) -> tuple[bool, str]:
        return True, ""

    end_weight_update = begin_weight_update

    def collective_rpc(self, *_: Any, **__: Any) -> None:
        assert "engine" in self._device.held


class Rollout:
    """As `RolloutHost` does it, with the real engine over memory that is counted."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from kdflow_core.sglang_runtime.engine import GenerationEngine
        inner = object.__new__(GenerationEngine)
        inner._engine = Memory(device, sizes)
        inner._asleep = frozenset()
        self._device = device
        self._engine = object.__new__(SglangRolloutEngine)
        self._engine._engine, self._engine._sleeps = inner, True
        self._engine.version, self._engine._has_weights = 0, True

    def roll_out(self, **_: Any) -> dict[str, Any]:
        self._engine.wake()
        assert self._engine._has_weights
        assert {"engine", "cache"} <= self._device.held.keys()
        self._engine.sleep()
        return {}

    def begin_weights(self) -> None:
        self._engine.begin_weights()

    def load_bucket(self, **_: Any) -> None:
        self._engine._running().load_weights({})

    def end_weights(self, version: int) -> int:
        self._engine.end_weights(version)
        return self._engine.version


class Group:
    """Ranks that are called here, at once."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def call(self, method: str, **arguments: Any) -> Any:
        reply = None if method == "ready" else getattr(self._host, method)(**arguments)

        class Done:
            def replies(self) -> list[Any]:
                return [reply]

        return Done()

    def end(self) -> None:
        """Nothing to end."""


class HereLauncher:
    """Starts hosts of this test."""

    one_machine = True

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        self._hosts = {"trainer": Trainer, "rollout": Rollout}
        self._device, self._sizes = device, sizes
        self.num_ranks: dict[str, int] = {}

    def start(self, _job: str, _spec: str, placement: Placement, *_: Any, **__: Any) -> Group:
        self._device.log.append(f"start of {placement.name}")
        self.num_ranks[placement.name] = placement.num_ranks
        return Group(self._hosts[placement.name](self._device, self._sizes))


@contextmanager
def untimed() -> Iterator[None]:
    yield


def test_three_parts_on_one_device_take_turns(make_recipe: Callable[..., Path]) -> None:
    """The peak of start, rounds and swaps is the one that was planned: no two of them are there at
    once but for the weights that are handed over.
    """
    rollout = {"type": "sglang", "sleep": True, "bucket_mb": 1, "cache_tokens": CACHE_TOKENS}
    section = {"rounds": 2, "prompts_per_round": 4, "rollout": rollout}
    more = {"student.sleep": True, "teacher.sleep": True}
    recipe = str(make_recipe(max_steps=None))
    run = load_run(recipe, {"mode": "onpolicy", "on_policy": section} | more)
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs={})
    phases = memory_phases(spec)
    sizes = {name: size for phase in phases for name, size in phase.parts.items()}
    device = Device()
    processes = RoundProcesses(
        spec,
        cast("Launcher", HereLauncher(device, sizes)),
        logging.getLogger("test"),
        starting=untimed,
        on_end=lambda: None,
    )
    config = run.on_policy
    assert config is not None
    assert isinstance(config.rollout, SglangRollout)
    swap = WeightSwap(config.rollout, processes, logging.getLogger("test"))
    for number in (1, 2):
        processes.replies(processes.rollout.roll_out(number, 1.0))
        processes.trainer.score({})
        processes.trainer.train({})
        swap.swap(number)
    assert device.log.index("start of trainer") < device.log.index("start of rollout")
    started = device.log[: device.log.index("start of rollout")]
    assert started[-1] == "teacher leaves"
    assert device.most == max(phase.total for phase in phases)
    assert device.held == {"engine": sizes["engine"]}  # its cache comes with the next answers


@pytest.mark.parametrize(
    ("gpus", "rollout", "workers", "engines"),
    [
        (0, {}, {}, 1),
        (1, {}, {}, 1),
        (8, {}, {}, 6),  # as many as there are prompts
        (4, {}, {}, 4),
        (4, {"first_gpu": 1}, {}, 3),
        (4, {"tensor_parallel": 2}, {}, 2),
        (4, {"tensor_parallel": 3}, {}, 1),
        (4, {"num_engines": 2}, {}, 2),
        (8, {}, RAY, 1),  # those of this machine are not all that there are
        (8, {"num_engines": 2}, RAY, 2),
        (1, {}, RAY | {"placement": "colocated"}, 5),  # as many as ranks that train
        (8, {"tensor_parallel": 2}, RAY | {"placement": "colocated"}, 2),
    ],
)
def test_every_gpu_has_an_engine(
    make_recipe: Callable[..., Path],
    gpus: int,
    rollout: dict[str, int],
    workers: dict[str, str],
    engines: int,
) -> None:
    section = {"rounds": 1, "prompts_per_round": 6, "rollout": {"type": "sglang"} | rollout}
    recipe = str(make_recipe(max_steps=None, num_ranks=5))
    more = {"workers": workers} if workers else {}
    run = load_run(recipe, {"mode": "onpolicy", "on_policy": section} | more)
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs={})
    launcher = HereLauncher(Device(gpus), defaultdict(int))
    processes = RoundProcesses(
        spec,
        cast("Launcher", launcher),
        logging.getLogger("test"),
        starting=untimed,
        on_end=lambda: None,
    )
    _ = processes.rollout
    assert launcher.num_ranks["rollout"] == processes.num_engines == engines


@pytest.mark.parametrize("part", ["student", "teacher", "cache"])
def test_who_stays_is_in_the_plan(make_recipe: Callable[..., Path], part: str) -> None:
    """In all phases but the start, where it is not yet there, or is alone."""
    rollout = {"type": "sglang", "sleep": part != "cache", "cache_tokens": CACHE_TOKENS}
    section = {"rounds": 2, "prompts_per_round": 4, "rollout": rollout}
    more = {"student.sleep": part != "student", "teacher.sleep": part != "teacher"}
    recipe = str(make_recipe(max_steps=None))
    run = load_run(recipe, {"mode": "onpolicy", "on_policy": section} | more)
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs={})
    start, *phases = memory_phases(spec)
    assert all(part in phase.parts for phase in phases)
    assert set(start.parts) == {"student", "moments"}
