"""Checkpoints in the store: which of them count, what comes back, and who removes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from configs.load import load_run
from kdflow_core.student.checkpoint import CheckpointWriter, completed_steps
from storage.kept_checkpoints import KeptCheckpoints
from storage.lease import exclusive, lease_name
from storage.maintenance import find_garbage, remove_garbage
from storage.store import ArtifactStore
from tasks.stages.checkpoint_places import StoredCopies, checkpoints_folder, newest_checkpoint
from tasks.stages.identity import StageIdentity
from tasks.stages.planning import plan_stages
from tests.unit.test_checkpoint import Training, resumed


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture
def identity(make_recipe: Callable[..., Path]) -> StageIdentity:
    return plan_stages(load_run(str(make_recipe())))["train"]


def machine(tmp_path: Path, name: str) -> ArtifactStore:
    """The one store, as a machine with a scratch folder of its own has it."""
    return ArtifactStore(root=str(tmp_path / "shared"), scratch=str(tmp_path / name))


def train(store: ArtifactStore, identity: StageIdentity, steps: int, told: list[str]) -> None:
    folder, training = checkpoints_folder(store, identity), Training()
    copies = StoredCopies(store, identity)
    writer = CheckpointWriter(folder, keep=2, copies=copies, tell=told.append)
    records = folder.parent / "artifact/metrics.jsonl"
    records.parent.mkdir(parents=True)
    for step in range(1, steps + 1):
        training.step()
        records.write_text("".join(f'{{"step": {k}}}\n' for k in range(1, step + 1)))
        writer.save(step, training.model, [training.optimizer])
        writer.wait()


def test_another_machine_has_what_the_first_one_saved(
    tmp_path: Path, identity: StageIdentity
) -> None:
    one, other, told = machine(tmp_path, "one"), machine(tmp_path, "other"), list[str]()
    train(one, identity, 4, told)
    StoredCopies(other, identity).fetch(told.append)
    folder = checkpoints_folder(other, identity)
    assert completed_steps(folder) == completed_steps(checkpoints_folder(one, identity)) == [3, 4]
    assert len(told) == 1
    assert "step-00000004" in told[0]
    assert resumed(folder)[0] == 4
    assert len((folder.parent / "artifact/metrics.jsonl").read_text().splitlines()) == 4
    # Here is nothing newer, and what is here stays as it is.
    StoredCopies(one, identity).fetch(told.append)
    assert len(told) == 1
    assert StoredCopies(one, identity).remove() is None
    assert KeptCheckpoints(one, identity.kind, identity.digest).files() == {}


def test_half_a_copy_is_none(tmp_path: Path, identity: StageIdentity) -> None:
    """Its writer was killed; the one before counts."""
    one, other = machine(tmp_path, "one"), machine(tmp_path, "other")
    train(one, identity, 2, [])
    (tmp_path / f"shared/checkpoints/student/{identity.digest}/step-00000002/complete").unlink()
    StoredCopies(other, identity).fetch(lambda _: None)
    assert newest_checkpoint(other, identity) == 1


def test_a_store_that_cannot_be_written_costs_the_copy_alone(
    tmp_path: Path, identity: StageIdentity
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/checkpoints").write_text("a file, where a folder is needed")
    told: list[str] = []
    train(machine(tmp_path, "one"), identity, 2, told)
    assert newest_checkpoint(machine(tmp_path, "one"), identity) == 2
    assert len(told) == 2
    assert "the checkpoint of step 1 has no copy" in told[0]
    assert "shared/checkpoints" in told[0]


def test_those_that_nobody_goes_on_with_are_garbage(
    tmp_path: Path, identity: StageIdentity
) -> None:
    store = machine(tmp_path, "one")
    train(store, identity, 1, [])
    assert find_garbage(store, older_than_s=3600) == []
    with exclusive(store, lease_name(identity.kind, identity.digest), lambda _: None):
        assert find_garbage(store, older_than_s=0) == []
    (garbage,) = find_garbage(store, older_than_s=0)
    assert garbage.what == f"checkpoints/student/{identity.digest}"
    assert garbage.num_bytes > 0
    remove_garbage(store, garbage)
    assert find_garbage(store, older_than_s=0) == []
    assert newest_checkpoint(store, identity) == 1, "those in the scratch folder stay"
