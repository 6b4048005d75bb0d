"""The NVIDIA GPU of this machine as its driver tells it, without torch or any package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute of the driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class CudaDevice:
    """Name, compute capability such as "9.0", and the newest CUDA version that the driver runs, such as "13.0"."""

    index: int
    name: str
    compute_capability: str
    driver_cuda: str


def find_cuda_device(index: int = 0) -> CudaDevice | str:
    """The GPU, or in a few words why there is none; CUDA_VISIBLE_DEVICES holds, as everywhere."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no {library}"
    return read_cuda_device(cuda, index)


def read_cuda_device(cuda: Any, index: int) -> CudaDevice | str:
    """Ask a loaded driver library for one of its devices."""
    number = ctypes.c_int()
    status = cuda.cuInit(0)
    if status != 0:
        return f"the CUDA driver does not start, error {status}"
    if cuda.cuDeviceGetCount(ctypes.byref(number)) != 0 or number.value == 0:
        return "the CUDA driver lists no device"
    if index >= number.value:
        return f"the CUDA driver lists {number.value} devices, no number {index}"
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    statuses = (
        cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
    )
    if any(statuses):
        return f"the CUDA driver does not describe its device, error {max(statuses)}"
    return CudaDevice(
        index,
        name.value.decode(errors="replace"),
        f"{major.value}.{minor.value}",
        f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
