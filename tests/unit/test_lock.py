"""The locks: one for CPUs, which is also one for the CUDA build of its torch that PyPI serves, and
one for GPUs, with the whole of SGLang.
"""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kdflow_core.sglang_runtime.versions import LOCKED, TESTED
from tests.readme import ROOT

# What the metadata of torch 2.13.0 for Linux on PyPI asks for, beside NVIDIA's packages, which
# nothing else asks for.
CUDA_BUILD = (
    "filelock",
    "typing-extensions>=4.10.0",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
    "triton==3.7.1",
)
LOCK, WITHOUT_DEPENDENCIES = "requirements.lock", "requirements-nodeps.lock"
CPU = (LOCK, WITHOUT_DEPENDENCIES)
GPU = ("requirements-cuda.lock",)


def locked(files: tuple[str, ...]) -> dict[str, Version]:
    pins = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                pins[canonicalize_name(name)] = Version(version)
    return pins


def test_the_list_is_of_the_locked_torch() -> None:
    assert locked(CPU)["torch"] == Version("2.13.0"), "look up what PyPI's build of it asks for"


@pytest.mark.parametrize("line", CUDA_BUILD)
def test_the_lock_does_for_the_cuda_build(line: str) -> None:
    requirement = Requirement(line)
    version = locked(CPU)[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement.name} {version}"


@pytest.mark.parametrize(
    ("files", "extras"), [(CPU, ("ray", "s3", "sglang-cpu")), (GPU, ("ray", "s3", "sglang"))]
)
def test_a_lock_does_for_what_is_declared(files: tuple[str, ...], extras: tuple[str, ...]) -> None:
    """Every dependency is in the lock, in a version that pyproject.toml allows."""
    pins = locked(files)
    for line in requires("kdflow") or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(_asked_by(requirement, extra) for extra in extras):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), line


def test_locked_are_the_releases_of_sglang_that_are_tested() -> None:
    assert [str(locked(files)["sglang"]) for files in (CPU, GPU)] == list(TESTED)
    assert TESTED[0] == LOCKED


@pytest.mark.slow  # asks the package index for some minutes
@pytest.mark.parametrize("file", [LOCK, *GPU])
def test_a_lock_can_be_resolved(file: str, tmp_path: Path) -> None:
    """What is locked does for what it asks for itself, but for packages of which files are used."""
    alone = locked((WITHOUT_DEPENDENCIES,)).keys() - {"sglang", "compressed-tensors"}
    lines = [f"{name}=={version}" for name, version in locked((file,)).items() if name not in alone]
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("\n".join(lines))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*pip, "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _asked_by(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra})
