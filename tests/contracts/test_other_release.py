"""The other release of SGLang that is supported, in place of the installed one.

Its code runs beside the torch and transformers of the lock, not those that it asks for.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kdflow_core.sglang_runtime.versions import LOCKED, TESTED
from tests.readme import ROOT

CONTRACTS = ("test_teacher.py", "test_rollout.py", "test_engine_ranks.py", "test_sglang_server.py")


@pytest.mark.slow  # loads 40 MB, and runs for some minutes
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("release", sorted(set(TESTED) - {LOCKED}))
def test_contracts_hold_under_another_release(tmp_path: Path, release: str) -> None:
    """Those of teachers, rollout engines and servers."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(tmp_path), f"sglang=={release}"], check=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("sglang-*.whl"))) as wheel:
        wheel.extractall(site)
    paths = [str(ROOT / "tests/contracts" / name) for name in CONTRACTS]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
