"""The entry point by which SGLang finds the plain-CPU platform.

SGLang calls `activate` in each of its processes, the spawned scheduler included. It must stay
cheap to import: it runs before SGLang's own modules are whole.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch


def activate() -> str | None:
    """The platform class by name, or None where SGLang has a platform of its own to use."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":  # the user asks for Intel's kernels
        return None
    if importlib.util.find_spec("torchvision") is None:
        _stand_in_for_torchvision()
    return "kdflow_core.sglang_runtime.platform.PlainCpuPlatform"


def _stand_in_for_torchvision() -> None:
    """SGLang imports helpers of vision models even for a text model, and these import torchvision,
    of which there is no CPU wheel beside the pinned torch. Text models never call it.
    """
    if "transformers" in sys.modules:
        # Has found torchvision missing; and this part of it loads the package a second time.
        importlib.import_module("transformers.processing_utils")
        transformers: Any = sys.modules["transformers"]
        transformers.AutoImageProcessor = _AnyAttribute(
            "AutoImageProcessor", (), {"register": staticmethod(lambda *_, **__: None)}
        )
    sys.meta_path.append(_TorchvisionStandIn())


class _AnyAttribute(type):
    """The type of classes that have any public attribute, each such a class again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _StandIn(types.ModuleType):
    """A module that has any public attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _TorchvisionStandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads torchvision and whatever is asked for below it."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002 - importlib's signature
        target: types.ModuleType | None = None,  # noqa: ARG002 - importlib's signature
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for torchvision and whatever lies below it."""
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The stand-in."""
        module = _StandIn(spec.name)
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""
