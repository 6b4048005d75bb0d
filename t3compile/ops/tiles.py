"""Which tile the kernel takes: small tables per architecture, dtype and depth, no search at first use.

Every entry fits its architecture's shared memory and spills at most 64 bytes of registers per thread, the first ones
none where windows are even and no token stands outside the grid; the tests compile a sample, without a GPU, and
``python -m tests.test_tiles`` all. A mask with a row for each query takes more of both: where an entry then fits no
more, the next one is launched. The entries of up to 48 KiB follow the limits of TensorRT's ahead-of-time plugins. None
was chosen by measuring speed: larger tiles stand first because they read the keys less often.
"""

from __future__ import annotations

from dataclasses import dataclass

from t3compile.ops.window_launch import Tile, WindowLaunch, block_depth

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """GPUs that share a table; ``shared_memory`` is what one program may use, in bytes."""

    name: str
    shared_memory: int


SM80 = Architecture("sm80", 163 * _KIB)
SM86 = Architecture("sm86", 99 * _KIB)
SM90 = Architecture("sm90", 227 * _KIB)
SM100 = Architecture("sm100", 227 * _KIB)

_Table = dict[int, tuple[Tile, ...]]
# By the power of two that holds the depths of keys and values. 16 bits: float16 and bfloat16, on tensor cores.
_DEPTHS = (32, 64, 128, 256)
_PORTABLE_16: _Table = {
    32: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    128: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 1)),
    256: (Tile(64, 16, 8, 1), Tile(32, 32, 4, 1)),
}
_OWN_16: dict[Architecture, _Table] = {
    SM80: {128: (Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)), 256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))},
    SM86: {128: (Tile(128, 64, 8, 2),), 256: (Tile(64, 32, 8, 2),)},
    SM90: {
        64: (Tile(128, 128, 8, 3),),
        128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3)),
        256: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    SM100: {128: (Tile(128, 64, 8, 3),), 256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))},
}
# float32 is multiplied as such, not as TF32: on no tensor cores.
_OWN_32: _Table = {128: (Tile(64, 32, 8, 2),), 256: (Tile(32, 16, 8, 2),)}
_PORTABLE_32: _Table = {
    32: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    64: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    128: (Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)),
    256: (Tile(16, 16, 4, 1),),
}


def architecture_of(capability: tuple[int, int]) -> Architecture | None:
    """The table for a compute capability (major, minor); None below 8.0."""
    if capability < (8, 0):
        return None
    if capability in ((8, 0), (8, 7)):
        return SM80
    if capability[0] == 9:
        return SM90
    return SM100 if capability[0] in (10, 11) else SM86


def portable_tiles(dtype: str, head_dim: int, value_dim: int) -> tuple[Tile, ...]:
    """Tiles that need at most 48 KiB of shared memory where no mask has rows; none above a depth of 256.

    ``dtype`` is "float16", "bfloat16" or "float32".
    """
    return _row(_PORTABLE_32 if dtype == "float32" else _PORTABLE_16, head_dim, value_dim)


def candidate_tiles(capability: tuple[int, int], dtype: str, head_dim: int, value_dim: int) -> tuple[Tile, ...]:
    """Tiles for a GPU, the largest first; none below compute capability 8.0 or above a depth of 256."""
    architecture = architecture_of(capability)
    if architecture is None:
        return ()
    own = _OWN_32 if dtype == "float32" else _OWN_16[architecture]
    return _row(own, head_dim, value_dim) + portable_tiles(dtype, head_dim, value_dim)


def choose_tile(capability: tuple[int, int], launch: WindowLaunch) -> Tile | None:
    """The first candidate that has at most one part of its queries idle in a window; None without candidates."""
    tiles = candidate_tiles(capability, launch.dtype, launch.head_dim, launch.value_dim)
    if not tiles:
        return None
    window = launch.args.pattern.largest_window_tokens(launch.args.grid)
    # A window of up to 64 tokens would leave half of 128 queries idle.
    fitting = (tile for tile in tiles if tile.block_m < 2 * window)
    return next(fitting, min(tiles, key=lambda tile: tile.block_m))


def _row(table: _Table, head_dim: int, value_dim: int) -> tuple[Tile, ...]:
    depth = block_depth(max(head_dim, value_dim))
    return next((table.get(size, ()) for size in _DEPTHS if depth <= size), ())
