"""What this project uses of TensorRT's Python module, over its versions: found by name, never by number.

Enum values moved between 10.x and 11.x and flags went away, so a flag is `1 << int(member)` of the member of that
name. Names were checked against the bindings of 10.13 to 11.4; TensorRT itself never ran where this was written.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from t3compile.errors import EngineError, first_line
from t3compile.export.cuda_device import CudaDevice, find_cuda_device
from t3compile.tensorrt_versions import SUPPORTED, checked_version

INSTALL = "pip install 't3compile[tensorrt]'"

# Members that some of the supported versions lack: (enum, member) -> why it may be left out.
OPTIONAL_MEMBERS = {
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): "11.x has no other kind of network",
}
# Members that must exist, by enum; read with `member`, so that a version without one is refused by name.
REQUIRED_MEMBERS = {
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"),
    "BuilderFlag": ("STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "TF32"),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED",),
    "LayerInformationFormat": ("JSON",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8"),
}
# TensorRT's name of a tensor's type -> torch's.
TORCH_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class TensorRT:
    """The imported module and its version, e.g. (10, 16, 1, 11)."""

    module: Any
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def member(self, enum: str, name: str) -> Any:
        """An enum's member; EngineError where this version has none of that name."""
        found = getattr(getattr(self.module, enum, None), name, None)
        if found is None:
            raise EngineError(f"TensorRT {self.version_text} has no {enum}.{name}; use {SUPPORTED}")
        return found

    def flags(self, enum: str, names: Iterable[str]) -> int:
        """Bits of an enum's members; one that OPTIONAL_MEMBERS lists is left out where this version lacks it."""
        bits = 0
        for name in names:
            if (enum, name) in OPTIONAL_MEMBERS and not hasattr(getattr(self.module, enum), name):
                continue
            bits |= 1 << int(self.member(enum, name))
        return bits


@dataclass
class Messages:
    """What TensorRT logged: errors and warnings, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def last_error(self) -> str:
        return self.errors[-1] if self.errors else "TensorRT gives no reason"


def load_tensorrt_and_device(purpose: str) -> tuple[TensorRT, CudaDevice]:
    """TensorRT, its version checked, and the GPU; one EngineError names all that is missing and how to install it."""
    module, missing = _import()
    device = find_cuda_device(current_device_index())
    wanted = [missing] if missing else []
    if isinstance(device, str):
        wanted.append(f"an NVIDIA GPU with its driver, which was not found ({device})")
    if wanted or isinstance(device, str):
        raise EngineError(f"{purpose} needs {', and '.join(wanted)}")
    return _checked(module), device


def current_device_index() -> int:
    """The device that torch works on, where torch has CUDA; TensorRT takes the same."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _checked(module: Any) -> TensorRT:
    return TensorRT(module, checked_version(module.__version__))


def _import() -> tuple[Any, str]:
    """The module, or what is missing."""
    try:
        return importlib.import_module("tensorrt"), ""
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            return None, f"the package 'tensorrt', which cannot be imported here ({first_line(error)}; {INSTALL})"
        return None, f"the package 'tensorrt', which is not installed ({INSTALL})"
    except (ImportError, OSError) as error:
        # The bindings are there and the libraries are not.
        return None, f"the package 'tensorrt', which cannot be imported here ({first_line(error)}; {INSTALL})"


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What TensorRT's own logger prints goes to stderr: importing tensorrt.plugin greets on stdout, among results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def make_logger(trt: Any, messages: Messages) -> Any:
    """A TensorRT logger that keeps errors and warnings and prints nothing."""

    class KeepingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                messages.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                messages.warnings.append(msg)

    return KeepingLogger()
