"""What was measured on, and with which versions."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "triton", "tensorrt", "numpy", "diffusers")


@dataclass(frozen=True)
class Machine:
    """A computer: ``cores`` are those that this process may use, ``threads`` those that torch computes with."""

    cpu: str
    architecture: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    gpu: str = ""

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        gib = self.memory_bytes / 2**30
        return f"{self.cpu} ({self.architecture}), {self.cores} cores, {self.threads} threads, {gib:.0f} GiB{gpu}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def this_machine(device: str = "cpu") -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = ""
    if device == "cuda" and torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return Machine(_cpu_name(), platform.machine(), cores, threads, memory, platform.platform(), gpu)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def installed_versions() -> dict[str, str]:
    """t3compile, Python and the packages that times depend on, as far as they are installed."""
    import t3compile

    versions = {"t3compile": t3compile.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
