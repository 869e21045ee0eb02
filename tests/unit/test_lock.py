"""The lock, resolved beside torch's CPU build, is also one for the CUDA build that PyPI serves."""

from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def locked() -> dict[str, Version]:
    pins = {}
    for file in ("requirements.lock", "requirements-nodeps.lock"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                pins[canonicalize_name(name)] = Version(version)
    return pins


def test_the_list_is_of_the_locked_torch() -> None:
    assert locked()["torch"] == Version("2.13.0"), "look up what PyPI's build of this one asks for"


@pytest.mark.parametrize("line", CUDA_BUILD)
def test_the_lock_does_for_the_cuda_build(line: str) -> None:
    requirement = Requirement(line)
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement.name} {version}"


def test_the_lock_does_for_what_is_declared() -> None:
    """Every dependency is in the lock, in a version that pyproject.toml allows."""
    pins = locked()
    for line in requires("kdflow") or []:
        requirement = Requirement(line)
        extra = next((e for e in ("ray", "s3", "sglang-cpu") if _asked_by(requirement, e)), "")
        if requirement.marker is None or extra:
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), line


def _asked_by(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra})
