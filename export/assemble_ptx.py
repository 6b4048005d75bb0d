"""PTX text -> machine code of a GPU architecture with NVIDIA's ptxas, to see that it can be done and at which cost.

The machine code is thrown away: drivers translate the PTX by themselves.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from t3compile.errors import KernelError

# Ampere, Ada, Hopper and Blackwell, in data centres and desktops.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PTXAS_VARIABLE = "TRITON_PTXAS_PATH"
_TIMEOUT_S = 300.0

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Assembly:
    """What ptxas says of one kernel on one architecture; ``error`` is empty where it assembled.

    Registers are per thread, bytes per thread.
    """

    architecture: int
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    error: str = ""


def find_ptxas() -> Path:
    """The ptxas that TRITON_PTXAS_PATH names, else triton's own, else the one on PATH; KernelError without one."""
    named = os.environ.get(PTXAS_VARIABLE)
    if named:
        if shutil.which(named) is None:
            raise KernelError(f"{PTXAS_VARIABLE} names '{named}', which is no program; correct it or unset it")
        return Path(named)
    triton = find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton is not None else ():
        own = Path(folder) / "backends" / "nvidia" / "bin" / "ptxas"
        if os.access(own, os.X_OK):
            return own
    on_path = shutil.which("ptxas")
    if on_path is None:
        raise KernelError(
            "no ptxas: triton's wheels bring one, CUDA toolkits too; install either, or name one in "
            f"{PTXAS_VARIABLE}, or leave assembling out with --no-assemble"
        )
    return Path(on_path)


@functools.cache
def ptxas_version(ptxas: Path) -> str:
    """Release of CUDA that a ptxas belongs to, such as "12.9"; KernelError where it does not say."""
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"'{ptxas}' does not run: {error}") from None
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    if found is None:
        raise KernelError(f"'{ptxas}' is no ptxas: it does not say its release")
    return found.group(1)


def assemble(ptx: str, architecture: int, ptxas: Path) -> Assembly:
    """Assemble the text of one entry for sm_<architecture>; what ptxas refuses is in ``error``."""
    with tempfile.TemporaryDirectory(prefix="t3compile-ptxas-") as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command: list[str | Path] = [
            ptxas,
            "-v",
            f"-arch=sm_{architecture}",
            source,
            "-o",
            source.with_suffix(".cubin"),
        ]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelError(f"'{ptxas}' does not run: {error}") from None
    return read_assembly(architecture, said.returncode, said.stderr + said.stdout)


def read_assembly(architecture: int, returncode: int, text: str) -> Assembly:
    """What ptxas -v printed, as data."""
    if returncode != 0:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "nothing")
        return Assembly(architecture, error=f"exit status {returncode}: {re.sub(r'^ptxas (/[^,]*, )?', '', said)}")
    spills, registers = _SPILLS.search(text), _REGISTERS.search(text)
    if spills is None or registers is None:
        return Assembly(architecture, error="ptxas said nothing of registers and spills")
    stack, stores, loads = map(int, spills.groups())
    return Assembly(architecture, int(registers.group(1)), stack, stores, loads)
