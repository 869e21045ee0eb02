"""What works on this machine: versions, devices, memory, disk, and each teacher backend, tried."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import psutil
import torch

from configs.schema.workers import RayWorkers
from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime.versions import require_sglang
from tasks.checks.cluster_check import examined_nodes

PACKAGES = ("torch", "transformers", "sglang", "prefect", "zarr", "datasets")
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. `works` is None for what is only told."""

    what: str
    detail: str
    works: bool | None = None


def examine(folder: Path) -> list[Finding]:
    """Look at everything; `folder` is where the store would be."""
    return [
        Finding(what="Python", detail=sys.version.split()[0]),
        *(Finding(what=name, detail=_version(name)) for name in PACKAGES),
        *_devices(),
        Finding(what="disk", detail=f"{shutil.disk_usage(folder).free / GB:,.1f} GB free"),
        _backend("transformers", lambda: import_module("kdflow_core.teacher.hf")),
        _backend("sglang", _import_sglang),
        _backend("sglang_server", lambda: import_module("kdflow_core.teacher.server")),
    ]


def examine_cluster(address: str) -> list[Finding]:
    """Look at the nodes of a Ray cluster. Raises ConfigError and WorkerError."""
    found = []
    for node, problems in examined_nodes(RayWorkers(type="ray", address=address)):
        gpus = ", ".join(node.gpus) or "no GPU"
        if node.gpus:
            gpus += f" (at least {node.gpu_memory_gb:,.1f} GB each)"
        versions = ", ".join(f"{name} {own}" for name, own in node.versions.items())
        detail = f"{node.cores} cores, {node.memory_gb:,.1f} GB memory, {gpus}; {versions}"
        found.append(
            Finding(
                what=f"node {node.address} ({node.host})",
                detail="; ".join(problems) or detail,
                works=not problems,
            )
        )
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [
        Finding(
            what="CPU",
            detail=f"{os.cpu_count()} cores, {memory.available / GB:,.1f} of "
            f"{memory.total / GB:,.1f} GB memory free",
        )
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        detail = f"{name}, {free / GB:,.1f} of {total / GB:,.1f} GB memory free"
        found.append(Finding(what=f"GPU {index}", detail=detail))
    if len(found) == 1:
        found.append(Finding(what="GPU", detail="none; everything runs on the CPU"))
    return found


def _import_sglang() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require_sglang()
        import_module("kdflow_core.sglang_runtime.in_process")


def _backend(name: str, load: Callable[[], object]) -> Finding:
    """Whether a teacher backend loads with all that it needs."""
    try:
        load()
    except (ImportError, ModelError, RuntimeError) as error:
        detail = f"{type(error).__name__}: {error}".strip()
        return Finding(what=f"teacher.type={name}", detail=detail, works=False)
    return Finding(what=f"teacher.type={name}", detail="loads", works=True)
