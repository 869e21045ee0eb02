"""Large blocks that are kept are not taken from the system again and again."""

import subprocess
import sys

import pytest

from tests.readme import ROOT

PROGRAM = """
import resource, sys, torch
from kdflow_core.allocator import keep_large_blocks
if sys.argv[1] == "kept":
    keep_large_blocks()
for _ in range(20):
    torch.ones(1 << 24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library must be glibc")
def test_kept_blocks_cost_no_page_faults() -> None:
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, way],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for way in ("kept", "given back")
    }
    assert faults["kept"] < faults["given back"] / 5
