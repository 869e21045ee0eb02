"""The smoke run itself, on whatever device is here."""

from pathlib import Path

import pytest
import torch

from tests.gpu.place import Place
from tests.gpu.smoke import NEEDS_GPU, STEPS, smoke


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(1800)
def test_every_step_passes_or_needs_what_is_not_here(tmp_path: Path) -> None:
    outcomes = smoke(Place(tmp_path, torch.cuda.is_available()))
    assert [own.step for own in outcomes] == list(STEPS)
    for own in outcomes:
        skipped = own.step in NEEDS_GPU and not torch.cuda.is_available()
        assert own.outcome == ("skipped" if skipped else "passed"), own
