"""What this machine can do: packages, GPU, compilers, and which command misses what."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from t3compile.errors import first_line
from t3compile.tensorrt_versions import UPGRADE, version_refusal

Status = Literal["yes", "no", "broken", "warning"]

_PROBED = ("torch", "triton", "onnxruntime", "tensorrt", "nvml")
_PROBE_SCRIPT = Path(__file__).with_name("probe_import.py")
_TIMEOUT_S = 60.0
_OLDEST_ONNXRUNTIME = (1, 23)
_OLDEST_DIFFUSERS = (0, 38)
# The kernel's matrix products are those of Ampere and newer.
_OLDEST_CAPABILITY = (8, 0)

_INSTALL_CPU = "pip install 't3compile[cpu]'"
_INSTALL_GPU = "pip install 't3compile[gpu]' (without onnxruntime beside it)"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    `status` is "yes", "no" (missing or unusable here: normal), "broken" (installed, and cannot be imported) or
    "warning". `detail` says what was found or why not, `needed_for` which commands miss it, `remedy` what mends it.
    """

    what: str
    status: Status
    version: str = ""
    detail: str = ""
    needed_for: str = ""
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine() -> tuple[Finding, ...]:
    """Look at this machine: packages are imported in processes of their own, so nothing is loaded or started here.

    CUDA is not started either: the driver is asked by NVML. Takes about as long as the slowest import.
    """
    with ThreadPoolExecutor(len(_PROBED)) as pool:
        answers = dict(zip(_PROBED, pool.map(_probe, _PROBED), strict=True))
    return (
        Finding("Python", "yes", platform.python_version(), sys.executable),
        *_torch(answers["torch"], answers["nvml"]),
        *_driver(answers["nvml"]),
        *_triton(answers["triton"], answers["torch"], answers["nvml"]),
        *_onnxruntime(answers["onnxruntime"], answers["nvml"]),
        _tensorrt(answers["tensorrt"]),
        _diffusers(),
        _cpp_compiler(),
    )


# --- asking --------------------------------------------------------------------------------------


def _probe(package: str) -> Mapping[str, Any]:
    """The answer of probe_import, or {"error": ...} where its process crashed or hung."""
    command = [sys.executable, "-P", str(_PROBE_SCRIPT), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"importing it did not end within {_TIMEOUT_S:.0f} s"}
    if done.returncode < 0:
        return {"error": f"importing it crashes with {signal.Signals(-done.returncode).name}"}
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"importing it ends Python with exit code {done.returncode}: {last}"}
    return answer if isinstance(answer, dict) else {"error": "importing it gave no answer"}


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (10, 13) of "10.13.3.9"; (0, 0) where there are none."""
    parts = version.split(".")
    try:
        return int(parts[0]), int("".join(c for c in parts[1] if c.isdigit()) or 0)
    except (IndexError, ValueError):
        return 0, 0


def _absent(what: str, answer: Mapping[str, Any], needed_for: str, remedy: str) -> Finding | None:
    """The finding for a package that is missing or broken, or None when it was imported."""
    if "missing" in answer:
        return Finding(what, "no", detail="not installed", needed_for=needed_for, remedy=remedy)
    if "error" in answer:
        reason = " ".join(str(answer["error"]).split())
        detail = f"installed, but cannot be imported: {reason}"
        return Finding(what, "broken", detail=detail, needed_for=needed_for, remedy=remedy)
    return None


def _gpus(nvml: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(nvml.get("gpus", ()))


# --- one thing each ------------------------------------------------------------------------------


def _torch(answer: Mapping[str, Any], nvml: Mapping[str, Any]) -> list[Finding]:
    absent = _absent("torch", answer, "every command that reads a model", "pip install torch")
    if absent is not None:
        return [absent]
    version, built = str(answer["version"]), answer["cuda"]
    findings = [Finding("torch", "yes", version)]
    needed = "running a .pt2 or the Triton kernel on a GPU"
    if built is None:
        detail, remedy = "a build without CUDA", "install torch's CUDA build (pytorch.org)"
        return [*findings, Finding("torch on CUDA", "no", detail=detail, needed_for=needed, remedy=remedy)]
    if not _gpus(nvml):
        detail = f"built for CUDA {built}, but there is no GPU"
        return [*findings, Finding("torch on CUDA", "no", str(built), detail, needed)]
    if int(str(built).partition(".")[0]) > _release(str(nvml["cuda"]))[0]:
        detail = f"built for CUDA {built}, but the driver knows CUDA up to {nvml['cuda']}"
        remedy = f"update the driver, or install torch built for CUDA {nvml['cuda']} or older"
        return [*findings, Finding("torch on CUDA", "no", str(built), detail, needed, remedy)]
    return [*findings, Finding("torch on CUDA", "yes", str(built))]


def _driver(answer: Mapping[str, Any]) -> list[Finding]:
    needed = "build-engine, TensorRT engines and everything on CUDA"
    if "missing" in answer:
        detail, remedy = "no NVIDIA driver (libnvidia-ml.so.1)", "install NVIDIA's driver, on a machine with its GPU"
        return [Finding("GPU", "no", detail=detail, needed_for=needed, remedy=remedy)]
    if "error" in answer:
        detail, remedy = f"the driver does not answer: {answer['error']}", "restart the machine, or mend the driver"
        return [Finding("GPU", "broken", detail=detail, needed_for=needed, remedy=remedy)]
    driver = Finding("NVIDIA driver", "yes", str(answer["version"]), f"CUDA up to {answer['cuda']}")
    gpus = _gpus(answer)
    if not gpus:
        return [driver, Finding("GPU", "no", detail="the driver sees none", needed_for=needed)]
    return [driver, *(_gpu(index, gpu) for index, gpu in enumerate(gpus))]


def _gpu(index: int, gpu: Mapping[str, Any]) -> Finding:
    size = "memory unknown" if gpu["bytes"] is None else f"{gpu['bytes'] / 2**30:.0f} GiB"
    detail = f"{gpu['name']}, compute capability {gpu['capability'] or 'unknown'}, {size}"
    return Finding(f"GPU {index}", "yes", detail=detail)


def _triton(answer: Mapping[str, Any], torch: Mapping[str, Any], nvml: Mapping[str, Any]) -> list[Finding]:
    absent = _absent("Triton", answer, "kernels build, build-engine with the plugin", "pip install triton (Linux)")
    if absent is not None:
        return [absent]
    able = [gpu for gpu in _gpus(nvml) if _release(gpu["capability"] or "") >= _OLDEST_CAPABILITY]
    missing = [
        reason
        for reason, holds in (
            ("no GPU of compute capability 8.0 or newer", bool(able)),
            ("no torch with CUDA", bool(torch.get("cuda"))),
        )
        if not holds
    ]
    on_cuda = Finding(
        "Triton kernels on CUDA",
        "no" if missing else "yes",
        detail=" and ".join(missing),
        needed_for="window attention by the kernel; regrouped SDPA runs instead" if missing else "",
    )
    return [
        Finding("Triton", "yes", str(answer["version"]), "PTX ahead of time, no GPU needed"),
        _ptxas(answer),
        on_cuda,
    ]


def _ptxas(answer: Mapping[str, Any]) -> Finding:
    if answer.get("ptxas"):
        return Finding("ptxas", "yes", str(answer["ptxas_version"]), str(answer["ptxas"]))
    detail = str(answer.get("ptxas_error", "not found beside Triton"))
    remedy = "install Triton again, or set TRITON_PTXAS_PATH"
    return Finding("ptxas", "no", detail=detail, needed_for="the checks of kernels build", remedy=remedy)


def _onnxruntime(answer: Mapping[str, Any], nvml: Mapping[str, Any]) -> list[Finding]:
    needed = "run MODEL.onnx, and the comparison of export"
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    both = (
        [
            Finding(
                "onnxruntime twice",
                "warning",
                detail="onnxruntime and onnxruntime-gpu install the same files: the later overwrote the other",
                needed_for="the CUDA and TensorRT providers",
                remedy="pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
            )
        ]
        if len(found) == 2
        else []
    )
    absent = _absent("onnxruntime", answer, needed, _INSTALL_CPU)
    if absent is not None:
        return [absent, *both]
    version, providers = str(answer["version"]), answer["providers"]
    if _release(version) < _OLDEST_ONNXRUNTIME:
        first = Finding("onnxruntime", "no", version, "1.23 or newer is needed (opset 23)", needed, _INSTALL_CPU)
    else:
        first = Finding("onnxruntime", "yes", version)
    return [first, *both, *(_provider(name, providers, nvml) for name in ("CPU", "CUDA", "Tensorrt"))]


def _provider(name: str, providers: list[str], nvml: Mapping[str, Any]) -> Finding:
    what = f"onnxruntime on {'TensorRT' if name == 'Tensorrt' else name}"
    needed = "run MODEL.onnx" if name == "CPU" else "run MODEL.onnx on a GPU"
    if f"{name}ExecutionProvider" not in providers:
        remedy = _INSTALL_CPU if name == "CPU" else _INSTALL_GPU
        return Finding(what, "no", detail="not in this build", needed_for=needed, remedy=remedy)
    if name == "CPU":
        return Finding(what, "yes")
    if not _gpus(nvml):
        return Finding(what, "no", detail="in this build, but there is no GPU", needed_for=needed)
    libraries = "cuDNN and cuBLAS" if name == "CUDA" else "TensorRT 10, cuDNN and cuBLAS"
    return Finding(what, "yes", detail=f"in this build; it loads {libraries} when a session starts")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _tensorrt(answer: Mapping[str, Any]) -> Finding:
    needed, remedy = "build-engine, run ENGINE", "pip install 't3compile[tensorrt]'"
    absent = _absent("TensorRT", answer, needed, remedy)
    if absent is not None:
        return absent
    version = str(answer["version"])
    refusal = version_refusal(version)
    if refusal is not None:
        return Finding("TensorRT", "no", version, refusal, needed, UPGRADE)
    return Finding("TensorRT", "yes", version)


def _diffusers() -> Finding:
    """Looked up with what it depends on, not imported: that takes seconds."""
    needed, remedy = "MODEL as a diffusers folder", "pip install 't3compile[diffusers]'"
    try:
        version = metadata.version("diffusers")
    except metadata.PackageNotFoundError:
        return Finding("diffusers", "no", "", "not installed", needed, remedy)
    if find_spec("diffusers") is None:
        return Finding("diffusers", "broken", version, "installed, but its files are gone", needed, remedy)
    required = [text for text in metadata.requires("diffusers") or () if ";" not in text]
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in [*required, "accelerate"]]
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        return Finding("diffusers", "broken", version, f"it needs {', '.join(missing)}", needed, remedy)
    if _release(version) < _OLDEST_DIFFUSERS:
        return Finding("diffusers", "no", version, "0.38 or newer is needed", needed, remedy)
    return Finding("diffusers", "yes", version)


def _cpp_compiler() -> Finding:
    """What AOTInductor will call: $CXX, else g++ (clang++ on a Mac)."""
    named = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    needed, remedy = "export --target aoti", "apt install g++, or set CXX"
    path = shutil.which(named)
    if path is None:
        detail = f"'{named}' is not on the PATH"
        return Finding("C++ compiler", "no", detail=detail, needed_for=needed, remedy=remedy)
    try:
        done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("C++ compiler", "broken", "", f"'{path}' does not run: {first_line(error)}", needed, remedy)
    if done.returncode != 0:
        detail = f"'{path}' fails with exit code {done.returncode}"
        return Finding("C++ compiler", "broken", detail=detail, needed_for=needed, remedy=remedy)
    return Finding("C++ compiler", "yes", done.stdout.strip(), path)
