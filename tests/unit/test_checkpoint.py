"""Checkpoints: a damaged one is noticed before anything in it runs, and the one before serves."""

import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdflow_core.student.checkpoint import CheckpointWriter, completed_steps, load_newest
from kdflow_core.student.seal import damage_of, write_seal


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> None:
    # A test that ran a model before may have made one, which outlives it.
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Training:
    """A small model after some steps; equal seeds are equal trainings."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 4)).square().mean().backward()
        self.optimizer.step()

    def state(self) -> list[torch.Tensor]:
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        return [p.detach().clone() for p in self.model.parameters()] + [m.clone() for m in moments]


def saved(folder: Path, steps: int) -> dict[int, list[torch.Tensor]]:
    """A checkpoint after every step, and what the state was then."""
    training, states = Training(), {}
    writer = CheckpointWriter(folder, keep=2)
    for step in range(1, steps + 1):
        training.step()
        states[step] = training.state()
        writer.save(step, training.model, [training.optimizer])
    writer.wait()
    return states


def resumed(folder: Path) -> tuple[int, list[torch.Tensor], list[str]]:
    told: list[str] = []
    training = Training()
    step = load_newest(folder, training.model, [training.optimizer], told.append)
    return step, training.state(), told


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_whole_checkpoint_is_taken_as_it_was(tmp_path: Path) -> None:
    states = saved(tmp_path, 3)
    assert completed_steps(tmp_path) == [2, 3]
    step, state, told = resumed(tmp_path)
    assert (step, told) == (3, [])
    assert_same(state, states[3])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_anywhere_leads_to_the_one_before(tmp_path: Path, seed: int) -> None:
    states = saved(tmp_path, 2)
    rng = random.Random(seed)
    newest = tmp_path / "step-00000002"
    victim = rng.choice(sorted(newest.iterdir()))
    flip(victim, rng)
    step, state, told = resumed(tmp_path)
    assert step == 1
    assert_same(state, states[1])
    assert len(told) == 1
    assert "the checkpoint of step 2 is damaged" in told[0]
    assert completed_steps(tmp_path) == [1], "it must not be tried again"


@pytest.mark.parametrize("how", ["gone", "cut", "no seal", "empty seal", "odd seal"])
def test_what_is_missing_of_a_checkpoint_is_noticed(tmp_path: Path, how: str) -> None:
    saved(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    data, seal = newest / "__0_0.distcp", newest / "checksums-0.json"
    {
        "gone": data.unlink,
        "cut": lambda: data.write_bytes(data.read_bytes()[:-7]),
        "no seal": seal.unlink,
        "empty seal": lambda: seal.write_text(""),
        "odd seal": lambda: seal.write_text("[3]"),
    }[how]()
    assert resumed(tmp_path)[0] == 1


def test_without_a_whole_one_training_begins_anew(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
        folder.mkdir()
    step, state, told = resumed(tmp_path)
    assert (step, len(told)) == (0, 2)
    assert_same(state, Training().state())


class Opens:
    """A pickle that would run code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_no_pickle_runs(tmp_path: Path) -> None:
    """Also where who planted it knows how to make the checksums."""
    saved(tmp_path / "checkpoints", 2)
    newest = tmp_path / "checkpoints/step-00000002"
    (newest / ".metadata").write_bytes(pickle.dumps(Opens(tmp_path / "owned")))
    write_seal(newest, rank=0, ranks=1)
    assert damage_of(newest) is None
    step, _, told = resumed(tmp_path / "checkpoints")
    assert step == 1
    assert "io.open" in told[0]
    assert not (tmp_path / "owned").exists()


def test_no_pickle_among_the_values_runs(tmp_path: Path) -> None:
    """What is not a tensor is read as plain values."""
    saved(tmp_path / "checkpoints", 1)
    newest = tmp_path / "checkpoints/step-00000001"
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert "BytesStorageMetadata" in kinds
    index = next(
        i
        for i in metadata.storage_data
        if type(metadata.state_dict_metadata[i.fqn]).__name__ == "BytesStorageMetadata"
    )
    place = metadata.storage_data[index]
    evil = tmp_path / "evil.pt"
    torch.save(Opens(tmp_path / "owned"), evil)
    data = newest / place.relative_path
    data.write_bytes(data.read_bytes() + evil.read_bytes())
    place.offset, place.length = data.stat().st_size - evil.stat().st_size, evil.stat().st_size
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    write_seal(newest, rank=0, ranks=1)
    with pytest.raises(BaseException, match=r"[Ww]eights"):
        resumed(tmp_path / "checkpoints")
    assert not (tmp_path / "owned").exists()
