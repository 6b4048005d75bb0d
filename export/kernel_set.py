"""The kernels of all configurations of a source, and the folder that holds them: <entry>.ptx and kernels.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from t3compile.errors import OutputError
from t3compile.export.assemble_ptx import find_ptxas, ptxas_version
from t3compile.export.build_tactics import (
    DroppedTile,
    LaunchKernels,
    Tactic,
    choose_tactics,
    offered_tiles,
    try_tile,
)
from t3compile.export.check_ptx import ASSEMBLES, SPILLS, TARGET
from t3compile.export.compile_kernel import describe_launch
from t3compile.export.function_launches import launch_tensors, window_launches
from t3compile.export.kernel_sources import KernelSource
from t3compile.export.window_function import FunctionKey
from t3compile.files import staged_folder
from t3compile.ops.load_kernel import compilable_kernel
from t3compile.ops.window_launch import Tile, WindowLaunch
from t3compile.progress import Progress

MANIFEST_NAME = "kernels.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class FunctionKernels:
    """The kernels of one configuration: its launches in order."""

    key: FunctionKey
    launches: tuple[LaunchKernels, ...]


@dataclass(frozen=True)
class KernelSet:
    """All kernels of a source. ``ptxas`` is the release that assembled them, or None where none did."""

    source: KernelSource
    functions: tuple[FunctionKernels, ...]
    architectures: tuple[int, ...]
    ptxas: str | None
    triton: str

    @property
    def tactics(self) -> tuple[Tactic, ...]:
        """Every kernel once."""
        tactics = [t for function in self.functions for launch in function.launches for t in launch.tactics]
        return tuple({tactic.kernel.entry: tactic for tactic in tactics}.values())

    @property
    def dropped(self) -> tuple[tuple[WindowLaunch, DroppedTile], ...]:
        """Tiles that fail a gate, with the launch that they fail for."""
        return tuple(
            (launch.launch, tile)
            for function in self.functions
            for launch in function.launches
            for tile in launch.dropped
        )

    @property
    def gates_not_run(self) -> tuple[str, ...]:
        return (ASSEMBLES, SPILLS) if self.ptxas is None else ()

    def to_json(self) -> dict[str, Any]:
        return {
            "t3compile_kernels": MANIFEST_VERSION,
            "source": self.source.name,
            "notes": list(self.source.notes),
            "triton": self.triton,
            "ptxas": self.ptxas,
            "target": TARGET,
            "architectures": [f"sm_{number}" for number in self.architectures] if self.ptxas else [],
            "gates_not_run": list(self.gates_not_run),
            "functions": [
                {
                    "function": function.key.name if self.source.names_functions else None,
                    "launches": [_launch_json(launch, function.key) for launch in function.launches],
                }
                for function in self.functions
            ],
        }

    def write(self, folder: Path) -> None:
        """Write the folder whole or not at all; one that an earlier build wrote is replaced, no other is touched."""
        check_folder(folder)
        # Under its own name: what is relative or ends in a dot has none.
        folder = folder.resolve()
        with staged_folder(folder, beside=folder.parent) as stage:
            for tactic in self.tactics:
                (stage / f"{tactic.kernel.entry}.ptx").write_text(tactic.kernel.ptx, encoding="utf-8")
            (stage / MANIFEST_NAME).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raise OutputError, before any work, where ``folder`` cannot be written or holds anything but kernels."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write kernels to '{folder}': it is a file; give a folder")
    if not folder.resolve().parent.is_dir():
        raise OutputError(f"cannot write '{folder}': the folder '{folder.resolve().parent}' does not exist")
    if folder.is_symlink():
        raise OutputError(f"cannot write kernels to '{folder}': it is a link; give the folder itself")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(name for name in names if name != MANIFEST_NAME and not name.endswith(".ptx"))
    if names and (foreign or MANIFEST_NAME not in names):
        raise OutputError(
            f"cannot write kernels to '{folder}': it holds other files ('{(foreign or sorted(names))[0]}'); "
            "give a new folder"
        )


def build_kernel_set(
    source: KernelSource, *, architectures: Sequence[int], assemble: bool, progress: Progress
) -> KernelSet:
    """Compile and check all kernels of a source; see try_tile for the errors.

    Kernels are compiled one at a time, as triton's settings demand, and assembled on all processors meanwhile.
    """
    compilable_kernel()
    ptxas = find_ptxas() if assemble else None
    release = None if ptxas is None else ptxas_version(ptxas)
    launches = tuple(dict.fromkeys(launch for key in source.keys for launch in window_launches(key)))
    jobs = [(launch, tile) for launch in launches for tile in offered_tiles(launch)]
    tried: dict[WindowLaunch, list[Tactic | DroppedTile]] = {launch: [] for launch in launches}
    pool = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1))
    try:
        futures = [pool.submit(try_tile, launch, tile, architectures, ptxas) for launch, tile in jobs]
        with progress.measure(len(jobs), "kernels") as advance:
            for number, ((launch, _), future) in enumerate(zip(jobs, futures, strict=True), 1):
                progress(f"kernel {number} of {len(jobs)}: {launch.args.pattern} {launch.branch}")
                tried[launch].append(future.result())
                advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    built = {launch: choose_tactics(launch, results, architectures, ptxas) for launch, results in tried.items()}
    functions = tuple(
        FunctionKernels(key, tuple(built[launch] for launch in window_launches(key))) for key in source.keys
    )
    return KernelSet(source, functions, tuple(architectures), release, version("triton"))


def _launch_json(built: LaunchKernels, key: FunctionKey) -> dict[str, Any]:
    return {
        **describe_launch(built.launch),
        # The kernel's parameters in order.
        "pointers": [
            {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for tensor in launch_tensors(key, built.launch)
        ],
        "tactics": [_tactic_json(tactic) for tactic in built.tactics],
        "dropped": [{"tile": _tile_json(one.tile), **one.result.to_json()} for one in built.dropped],
    }


def _tactic_json(tactic: Tactic) -> dict[str, Any]:
    kernel = tactic.kernel
    return {
        "entry": kernel.entry,
        "file": f"{kernel.entry}.ptx",
        "sha256": kernel.sha256,
        "tile": _tile_json(kernel.tile),
        "grid_x": kernel.grid_x,
        "block_x": kernel.block_x,
        "shared_bytes": kernel.shared_bytes,
        "registers": {f"sm_{one.architecture}": one.registers for one in tactic.assemblies},
        "gates": [result.to_json() for result in tactic.gates],
    }


def _tile_json(tile: Tile) -> dict[str, int]:
    return asdict(tile)
