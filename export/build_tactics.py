"""The kernels of one launch, one for each tile that passes every gate: TensorRT times them and keeps the fastest.

Which tile is the fastest in TensorRT nobody has measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t3compile.errors import KernelError
from t3compile.export.assemble_ptx import Assembly, assemble
from t3compile.export.check_ptx import (
    TILE_GATES,
    GateResult,
    check_assemblies,
    check_text,
    failure_text,
    require_gates,
)
from t3compile.export.compile_kernel import (
    TRITON_DTYPES,
    CompiledKernel,
    compile_launch,
    launch_text,
    tile_text,
)
from t3compile.ops.tiles import portable_tiles
from t3compile.ops.window_launch import Tile, WindowLaunch
from t3compile.sites import ITEM_BYTES


@dataclass(frozen=True)
class Tactic:
    """A kernel that passed every gate that ran; ``assemblies`` is empty where it was not assembled."""

    kernel: CompiledKernel
    gates: tuple[GateResult, ...]
    assemblies: tuple[Assembly, ...]


@dataclass(frozen=True)
class DroppedTile:
    """A tile of the table that fails a gate with this launch."""

    tile: Tile
    result: GateResult

    def __str__(self) -> str:
        return f"tile {tile_text(self.tile)}: {failure_text(self.result)}"


@dataclass(frozen=True)
class LaunchKernels:
    """The kernels of one launch, at least one."""

    launch: WindowLaunch
    tactics: tuple[Tactic, ...]
    dropped: tuple[DroppedTile, ...] = ()


# Tried in turn where none of the portable tiles passes, by bytes of an element.
_SMALLER = {
    2: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    4: (Tile(32, 16, 8, 1), Tile(32, 8, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 16, 1)),
}


def offered_tiles(launch: WindowLaunch) -> tuple[Tile, ...]:
    """The tiles to try for a launch; KernelError where it has none: depths beyond 256, float64."""
    tiles = portable_tiles(launch.dtype, launch.head_dim, launch.value_dim) if launch.dtype in TRITON_DTYPES else ()
    if not tiles:
        raise KernelError(
            f"{launch_text(launch)}: there are kernels for {', '.join(TRITON_DTYPES)} and head dims up to 256; "
            "use the function's body instead"
        )
    return tiles


def smaller_tiles(launch: WindowLaunch) -> tuple[Tile, ...]:
    """What is left to try where none of the offered tiles passes."""
    offered = offered_tiles(launch)
    return tuple(tile for tile in _SMALLER[ITEM_BYTES[launch.dtype]] if tile not in offered)


def try_tile(
    launch: WindowLaunch, tile: Tile, architectures: Sequence[int], ptxas: Path | None
) -> Tactic | DroppedTile:
    """Compile a launch with a tile and apply every gate; without ``ptxas`` those over the text alone.

    What a tile is at fault for drops it; any other failure is a KernelError.
    """
    kernel = compile_launch(launch, tile)
    results = check_text(kernel)
    assemblies: tuple[Assembly, ...] = ()
    failed = _at_fault(results)
    if failed is None and ptxas is not None:
        assemblies = tuple(assemble(kernel.ptx, architecture, ptxas) for architecture in architectures)
        results += check_assemblies(assemblies)
        failed = _at_fault(results)
    require_gates(kernel, (result for result in results if result.gate not in TILE_GATES))
    return Tactic(kernel, results, assemblies) if failed is None else DroppedTile(tile, failed)


def _at_fault(results: Sequence[GateResult]) -> GateResult | None:
    return next((result for result in results if result.verdict == "failed" and result.gate in TILE_GATES), None)


def choose_tactics(
    launch: WindowLaunch,
    tried: Sequence[Tactic | DroppedTile],
    architectures: Sequence[int],
    ptxas: Path | None,
) -> LaunchKernels:
    """The tiles offered as they were ``tried``; where none passed, the first smaller one that does.

    KernelError, with what each tile failed, where there is none.
    """
    tried = list(tried)
    for tile in smaller_tiles(launch):
        if any(isinstance(one, Tactic) for one in tried):
            break
        tried.append(try_tile(launch, tile, architectures, ptxas))
    tactics = tuple(one for one in tried if isinstance(one, Tactic))
    dropped = tuple(one for one in tried if isinstance(one, DroppedTile))
    if not tactics:
        raise KernelError(f"{launch_text(launch)}: no tile passes: {'; '.join(map(str, dropped))}")
    return LaunchKernels(launch, tactics, dropped)


def build_tactics(launch: WindowLaunch, architectures: Sequence[int], ptxas: Path | None) -> LaunchKernels:
    """All kernels of one launch; see try_tile and choose_tactics."""
    offered = offered_tiles(launch)
    return choose_tactics(
        launch, [try_tile(launch, tile, architectures, ptxas) for tile in offered], architectures, ptxas
    )
