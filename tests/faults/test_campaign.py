"""A short seeded campaign; `python -m tests.faults.campaign` is the long one."""

from pathlib import Path

import pytest

from tests.faults.campaign import main


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_short_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kills", "8", "--per-chain", "4", "--corruptions", "8", "--seed", "7"]
    code = main([*arguments, "--folder", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
