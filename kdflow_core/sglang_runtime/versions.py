"""Whether a tested version of SGLang is installed."""

import logging
import os
import re
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from kdflow_core.errors import ModelError

LOCKED = "0.5.21"
TESTED = (LOCKED, "0.5.23")
# What backends of attention need beside SGLang itself.
PACKAGES = {
    "flashinfer": "flashinfer",
    "trtllm_mla": "flashinfer",
    "trtllm_mha": "flashinfer",
    "fa3": "sgl_kernel",
    "fa4": "sgl_kernel",
    "flashmla": "sgl_kernel",
    "intel_amx": "sgl_kernel",
    "aiter": "aiter",
}
# How its modules say which models they have.
ENTRIES = re.compile(r"^EntryClass\b[^=\n]*=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)
OTHER_MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # names a package with more of them


def sglang_version() -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_sglang() -> None:
    """Raises ModelError unless a tested version of SGLang is installed. Loads none of it."""
    installed = sglang_version()
    if installed is None:
        raise ModelError(
            "SGLang is not installed: `make install-cuda` (or `pip install -e '.[sglang]'`) on a "
            "machine with a GPU, `make install` on a CPU, or set the type to transformers"
        )
    if installed not in TESTED:
        raise ModelError(
            f"SGLang {installed} is installed; kdflow uses SGLang's inner parts and is tested with "
            f"{' and '.join(TESTED)}. Install one of them (`make install-cuda`, or on a CPU `make "
            "install`), or set the type to transformers"
        )


def check_architecture(architecture: str) -> None:
    """Refuse a model that SGLang, where it is installed, has no code for. Raises ModelError. Loads
    none of it.
    """
    known = _architectures()
    if known and architecture not in known and OTHER_MODELS not in os.environ:
        raise ModelError(
            f"SGLang {sglang_version()} does not run {architecture}; set the type of what runs it "
            "to transformers"
        )


@cache
def _architectures() -> frozenset[str]:
    """What SGLang has models of, by their sources; nothing where it is not installed."""
    package = find_spec("sglang")
    if package is None or package.origin is None:
        return frozenset()
    files = (Path(package.origin).parent / "srt" / "models").glob("*.py")
    entries = (e for f in files for e in ENTRIES.findall(f.read_text(encoding="utf-8")))
    return frozenset(name for entry in entries for name in re.findall(r"\w+", entry))


def check_names(*, attention_backend: str | None, quantization: str | None) -> None:
    """Refuse names that SGLang does not know, or whose packages are not installed. Raises
    ModelError.
    """
    if attention_backend is None and quantization is None:
        return
    require_sglang()
    known = import_module("sglang.srt.server_args")
    for field, given, names in (
        ("attention_backend", attention_backend, known.ATTENTION_BACKEND_CHOICES),
        ("quantization", quantization, known.QUANTIZATION_CHOICES),
    ):
        if given is not None and given not in names:
            raise ModelError(f"{field}={given} is not SGLang's; it has {', '.join(names)}")
    package = PACKAGES.get(str(attention_backend))
    if package is not None and find_spec(package) is None:
        raise ModelError(
            f"attention_backend={attention_backend} needs the package {package}, which is not "
            "installed; leave it out"
        )


def require_sglang() -> None:
    """Like `check_sglang`. Call it before SGLang's other modules are imported: some need the
    platform to be chosen.
    """
    check_sglang()
    _show_errors_only()
    platforms = import_module("sglang.srt.platforms")
    _ = platforms.current_platform  # looking it up chooses it


def _show_errors_only() -> None:
    """SGLang warns of everything that this machine or model does without, and sets its own level;
    so the limit is on a handler.
    """
    logger = logging.getLogger("sglang")
    if logger.propagate:
        handler = logging.StreamHandler()
        handler.setLevel(logging.ERROR)
        logger.addHandler(handler)
        logger.propagate = False
