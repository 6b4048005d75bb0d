"""The real TensorRT Python bindings, run in a subprocess with a C stub in the place of libnvinfer.

What passes under them shows that our side uses names, types and signatures which exist. TensorRT itself never runs.
Wheels are looked for in .venv/tensorrt/VERSION, where `make setup` puts them, or under T3COMPILE_TENSORRT_WHEELS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The oldest, a recent 10.x and a recent 11.x that the engine builder accepts; the Makefile installs these.
VERSIONS = tuple(Path(__file__).with_name("tensorrt_versions.txt").read_text(encoding="utf-8").split())
_STUB = Path(__file__).with_name("tensorrt_stub.c")
_LIBRARIES = re.compile(rb"libnv(?:infer|infer_plugin|onnxparser)\.so\.\d+")


def wheels_folder() -> Path:
    return Path(os.environ.get("T3COMPILE_TENSORRT_WHEELS") or ROOT / ".venv" / "tensorrt")


def missing_bindings(version: str) -> str | None:
    """Why the bindings of a version cannot be imported here, or None."""
    if not _extension(version).is_file():
        return f"no TensorRT bindings {version} in '{wheels_folder()}': run 'make setup'"
    if sys.platform != "linux":
        return "TensorRT's bindings are for Linux"
    if shutil.which("gcc") is None:
        return "no gcc to compile the stub that stands in for libnvinfer"
    return None


def run_with_bindings(version: str, code: str, *arguments: str, timeout_s: float = 120.0) -> str:
    """Run Python code with `tensorrt` being the real bindings of that version; returns its stdout.

    Skips the test where bindings or compiler are missing, fails it with the code's stderr where the code fails. The
    code may import t3compile and tests.
    """
    reason = missing_bindings(version)
    if reason is not None:
        pytest.skip(reason)
    folder = _import_folder(version)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "LD_LIBRARY_PATH": str(folder / "lib"),
    }
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, f"under the bindings of TensorRT {version}:\n{ended.stderr}"
    return ended.stdout


def _extension(version: str) -> Path:
    return wheels_folder() / version / "tensorrt_bindings" / "tensorrt.so"


@lru_cache
def _import_folder(version: str) -> Path:
    """A folder with a package `tensorrt` (the wheel's, under the name that users import) and lib/ with the stub."""
    kept = tempfile.TemporaryDirectory(prefix="tensorrt-stub-")
    _KEPT.append(kept)
    folder = Path(kept.name)
    extension = _extension(version)
    (folder / "tensorrt").symlink_to(extension.parent.resolve(), target_is_directory=True)
    (folder / "lib").mkdir()
    stub = folder / "lib" / "stub.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(stub), str(_STUB)], check=True)
    for name in set(_LIBRARIES.findall(extension.read_bytes())):
        (folder / "lib" / name.decode()).symlink_to(stub.name)
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
