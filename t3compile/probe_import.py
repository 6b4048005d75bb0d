"""Import one package, or ask the NVIDIA driver, and print what it says of itself as JSON.

Run as a script by `doctor`, in a process of its own: an import that crashes, hangs or starts CUDA harms nobody. It uses
the standard library alone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def probe_import(package: str) -> dict[str, Any]:
    """{"version", ...}, {"missing": True}, or {"error": reason} where the package is there and cannot be imported."""
    try:
        if package == "nvml":
            return _ask_driver()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(package)
            facts = _FACTS.get(package, lambda module: {})(module)
        return {"version": str(getattr(module, "__version__", "")), **facts}
    except ModuleNotFoundError as error:
        if error.name == package:
            return {"missing": True}
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _torch(module: Any) -> dict[str, Any]:
    return {"cuda": module.version.cuda}


def _triton(module: Any) -> dict[str, Any]:
    try:
        ptxas = module.knobs.nvidia.ptxas
        return {"ptxas": ptxas.path, "ptxas_version": ptxas.version}
    except Exception as error:
        return {"ptxas_error": f"{type(error).__name__}: {error}"}


def _onnxruntime(module: Any) -> dict[str, Any]:
    return {"providers": list(module.get_available_providers())}


_FACTS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "torch": _torch,
    "triton": _triton,
    "onnxruntime": _onnxruntime,
}


_NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED: GPUs that share the host's memory do not tell it


class _Memory(ctypes.Structure):
    """nvmlMemory_t: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _ask_driver() -> dict[str, Any]:
    """Driver and GPUs by NVML, the driver's management library, which does not start CUDA."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {"missing": True}

    def call(name: str, *arguments: Any, optional: bool = False) -> bool:
        """Whether it was answered; only what is optional may be not supported."""
        code = getattr(library, name)(*arguments)
        if code != 0 and not (optional and code == _NOT_SUPPORTED):
            raise RuntimeError(f"{name} of libnvidia-ml.so.1 returned {code}")
        return bool(code == 0)

    call("nvmlInit_v2")
    try:
        text = ctypes.create_string_buffer(96)
        number, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        call("nvmlSystemGetDriverVersion", text, len(text))
        driver = text.value.decode()
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
        cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
        call("nvmlDeviceGetCount_v2", ctypes.byref(number))
        gpus = []
        for index in range(number.value):
            device, memory = ctypes.c_void_p(), _Memory()
            call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
            call("nvmlDeviceGetName", device, text, len(text))
            numbers = ctypes.byref(major), ctypes.byref(minor)
            told = call("nvmlDeviceGetCudaComputeCapability", device, *numbers, optional=True)
            capability = f"{major.value}.{minor.value}" if told else None
            size = (
                memory.total if call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory), optional=True) else None
            )
            gpus.append({"name": text.value.decode(), "capability": capability, "bytes": size})
        return {"version": driver, "cuda": cuda, "gpus": gpus}
    finally:
        library.nvmlShutdown()


if __name__ == "__main__":
    answer = probe_import(sys.argv[1])
    # The package may have printed: the answer is the last line.
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
