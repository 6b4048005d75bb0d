"""The tables of tiles: compiled for their architectures without a GPU, their entries spill little and fit.

``python -m tests.test_tiles`` does so for every entry and prints a table (minutes).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest

from t3compile.ops.load_kernel import compilable_kernel
from t3compile.ops.tiles import architecture_of, candidate_tiles, choose_tile, portable_tiles
from t3compile.ops.window_launch import Layout, Tile, WindowLaunch
from tests.test_window_attention import Triple, args_of

pytest.importorskip("triton")

GRID: Triple = (21, 136, 240)
EVEN: Triple = (7, 8, 6)
UNEVEN: Triple = (2, 7, 7)
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
# What one program's threads may push out of their registers where windows are uneven or tokens stand outside the grid.
SPILLED_BYTES = 64


def launch_of(
    dtype: str, depth: int, value_depth: int | None = None, splits: Triple = EVEN, **extra: int
) -> WindowLaunch:
    args = args_of(GRID, splits, **extra)
    heads, value_depth = 12, depth if value_depth is None else value_depth
    q, k, v, out = (
        Layout.tokens_first(heads, tokens, d)
        for tokens, d in (
            (args.query_tokens, depth),
            (args.tokens, depth),
            (args.tokens, value_depth),
            (args.query_tokens, value_depth),
        )
    )
    return WindowLaunch(args, "dilated", True, 1, heads, heads, depth, value_depth, dtype, q, k, v, out)


@dataclass(frozen=True)
class Footprint:
    """What a compiled launch takes of a GPU: bytes of shared memory and of spilled registers, and tensor-core calls."""

    shared_memory: int
    spilled: int
    products: int


def compile_for(capability: tuple[int, int], launch: WindowLaunch, tile: Tile, folder: Path) -> Footprint:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = compilable_kernel()
    names = kernel.arg_names
    pointers = ("q_ptr", "k_ptr", "v_ptr", "other_ptr", "out_ptr")
    signature = {name: POINTERS[launch.dtype] if name in pointers else "constexpr" for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants(tile).items()}
    constants[(names.index("mask_ptr"),)] = None
    aligned: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    # The newest of the wheel's assemblers knows every PTX that triton writes.
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = max(binaries.glob("ptxas*"), key=lambda path: len(path.name))
    command = [str(assembler), "-v", f"-arch={target[1]}", str(source), "-o", str(folder / "kernel.cubin")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    spilled = re.search(r"(\d+) bytes spill stores", ended.stderr)
    assert ended.returncode == 0 and spilled is not None, ended.stderr
    products = len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))
    return Footprint(compiled.metadata.shared, int(spilled[1]), products)


SAMPLE = [
    ((8, 0), launch_of("bfloat16", 128)),
    ((8, 0), launch_of("float32", 128)),
    ((8, 0), launch_of("float16", 40)),
    ((8, 9), launch_of("float16", 64)),
    ((8, 6), launch_of("bfloat16", 96, 128)),
    ((9, 0), launch_of("bfloat16", 128)),
    ((9, 0), launch_of("bfloat16", 192)),
    ((10, 0), launch_of("bfloat16", 128)),
    ((12, 0), launch_of("bfloat16", 256)),
    ((9, 0), launch_of("bfloat16", 128, splits=UNEVEN, prefix=3, suffix=226)),
]


@pytest.mark.parametrize(
    ("capability", "launch"),
    SAMPLE,
    ids=lambda x: f"{x.dtype}-{x.head_dim}-{x.args.suffix}" if isinstance(x, WindowLaunch) else f"sm{x[0]}{x[1]}",
)
def test_the_chosen_tile_fits_and_does_not_spill(
    capability: tuple[int, int], launch: WindowLaunch, tmp_path: Path
) -> None:
    tile, architecture = choose_tile(capability, launch), architecture_of(capability)
    assert tile is not None and architecture is not None
    footprint = compile_for(capability, launch, tile, tmp_path)
    assert footprint.shared_memory <= architecture.shared_memory
    assert footprint.spilled <= (0 if launch.args.suffix == 0 else SPILLED_BYTES)
    assert (footprint.products > 0) == (launch.dtype != "float32")


def test_a_portable_tile_keeps_within_48_kib_with_tokens_outside_the_grid(tmp_path: Path) -> None:
    launch = launch_of("bfloat16", 128, splits=EVEN, suffix=226)
    tile = portable_tiles("bfloat16", 128, 128)[0]
    assert tile == Tile(128, 32, 8, 2)
    assert compile_for((8, 0), launch, tile, tmp_path).shared_memory <= 48 * 1024


def test_every_gpu_from_8_0_has_tiles_for_every_depth() -> None:
    for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)):
        for dtype in POINTERS:
            for depth in (16, 32, 40, 64, 72, 96, 128, 192, 256):
                tiles = candidate_tiles(capability, dtype, depth, depth)
                assert tiles
                assert len(set(tiles)) == len(tiles)
                assert tiles[-len(portable_tiles(dtype, depth, depth)) :] == portable_tiles(dtype, depth, depth)
    assert candidate_tiles((7, 5), "float16", 64, 64) == ()
    assert candidate_tiles((9, 0), "float16", 64, 264) == ()
    assert candidate_tiles((9, 0), "float16", 64, 256) == candidate_tiles((9, 0), "float16", 256, 256)


def test_small_windows_take_small_tiles() -> None:
    launch = launch_of("bfloat16", 128)
    assert choose_tile((8, 0), launch) == Tile(128, 64, 8, 3)
    grids: list[tuple[Triple, Triple, int]] = [
        ((1, 8, 8), (1, 1, 2), 64),  # the least there is
        ((1, 16, 16), (1, 2, 2), 64),
        ((1, 30, 52), (1, 3, 4), 128),
    ]
    for grid, splits, block_m in grids:
        tile = choose_tile((8, 0), replace(launch, args=args_of(grid, splits)))
        assert tile is not None
        assert tile.block_m == block_m
    assert choose_tile((7, 5), launch) is None


def _all_entries() -> Iterator[tuple[tuple[int, int], WindowLaunch, Tile]]:
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        for dtype in ("bfloat16", "float32"):
            for depth in (32, 64, 128, 256):
                for tile in candidate_tiles(capability, dtype, depth, depth):
                    yield capability, launch_of(dtype, depth), tile
                    yield capability, launch_of(dtype, depth, splits=UNEVEN, prefix=3, suffix=226), tile


def main() -> None:
    columns = ("capability", "dtype", "depth", "windows", "tile", "shared memory (B)", "spilled (B)")
    click.echo(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for capability, launch, tile in _all_entries():
        with tempfile.TemporaryDirectory() as folder:
            footprint = compile_for(capability, launch, tile, Path(folder))
        kind = "uneven, joint" if launch.args.suffix else "even"
        gpu = ".".join(map(str, capability))
        size = f"{tile.block_m}x{tile.block_n}, {tile.warps} warps, {tile.stages} stages"
        cells = (gpu, launch.dtype, launch.head_dim, kind, size, footprint.shared_memory, footprint.spilled)
        click.echo(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
