"""One launch of the window attention kernel as plain data: what it computes, on which layout, with which tile.

Needs neither triton nor a GPU: the torch op, the ahead-of-time compiler and the TensorRT plugin all describe a launch
in these terms. A pattern with two branches takes two launches: the first writes the local branch, the second reads
that, computes the dilated one and writes the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.pattern import Branch

if TYPE_CHECKING:
    import torch

INT32_MAX = 2**31 - 1
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step of a GPU program, its warps, and the depth of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Layout:
    """Strides of a tensor [B, N, S, D] in elements; depth is contiguous."""

    batch: int
    head: int
    token: int

    @classmethod
    def heads_first(cls, heads: int, tokens: int, depth: int) -> Layout:
        """Contiguous [B, N, S, D]."""
        return cls(heads * tokens * depth, tokens * depth, depth)

    @classmethod
    def tokens_first(cls, heads: int, tokens: int, depth: int) -> Layout:
        """Contiguous [B, S, N, D], seen as [B, N, S, D]."""
        return cls(heads * tokens * depth, depth, heads * depth)


@dataclass(frozen=True)
class MaskLayout:
    """Dtype ("bool" or a floating one) and strides in elements of a mask [B, N, Sq, S]; 0 where it broadcasts."""

    dtype: str
    batch: int
    head: int
    query: int
    key: int


@dataclass(frozen=True)
class WindowLaunch:
    """One branch of one call.

    Pointer arguments of the kernel, in order: q, k, v, the mask where there is one, the other branch's output where
    ``averages``, and the output. Everything else is baked in.
    """

    args: WindowAttentionArgs
    branch: Branch
    averages: bool
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    q: Layout
    k: Layout
    v: Layout
    out: Layout
    mask: MaskLayout | None = None

    @property
    def inputs(self) -> int:
        """Pointer arguments before the output."""
        return 3 + (self.mask is not None) + self.averages

    @property
    def windows(self) -> int:
        return self.args.pattern.splits.windows

    def programs(self, tile: Tile) -> int:
        """GPU programs of the launch: per batch element and head, the tiles of all windows and of the extra queries."""
        window_tiles = self.windows * self._tiles_per_window(tile)
        return self.batch * self.heads * (window_tiles + self._extra_tiles(tile))

    def _extra_tiles(self, tile: Tile) -> int:
        return -(-self.args.extra_queries // tile.block_m)

    def _tiles_per_window(self, tile: Tile) -> int:
        return -(-self.args.pattern.largest_window_tokens(self.args.grid) // tile.block_m)

    @property
    def needs_64_bits(self) -> bool:
        """Whether an offset inside one batch element and head passes what 32 bits count."""
        tokens = {"q": self.args.query_tokens, "out": self.args.query_tokens, "k": self.args.tokens}
        depths = {"q": self.head_dim, "k": self.head_dim, "v": self.value_dim, "out": self.value_dim}
        layouts = {"q": self.q, "k": self.k, "v": self.v, "out": self.out}
        largest = max(
            layout.token * (tokens.get(name, self.args.tokens) - 1) + depths[name] for name, layout in layouts.items()
        )
        if self.mask is not None:
            rows = self.mask.query * (self.args.query_tokens - 1) + self.mask.key * (self.args.tokens - 1)
            largest = max(largest, rows)
        return largest > INT32_MAX

    def constants(self, tile: Tile, *, upcast: bool = False) -> dict[str, Any]:
        """Compile-time constants of the kernel by name; ``upcast`` multiplies in float32 whatever the dtype."""
        t, h, w = self.args.grid.sizes
        n_t, n_h, n_w = self.args.pattern.splits.counts
        scale = self.head_dim**-0.5 if self.args.scale is None else self.args.scale
        mask = self.mask or MaskLayout("", 0, 0, 0, 0)
        return {
            "SCALE_LOG2": scale * LOG2_E,
            "HEADS": self.heads,
            "QUERIES_PER_KEY_HEAD": self.heads // self.key_heads,
            "D": self.head_dim,
            "DV": self.value_dim,
            **{"T": t, "H": h, "W": w, "N_T": n_t, "N_H": n_h, "N_W": n_w},
            "IS_DILATED": self.branch == "dilated",
            "PREFIX": self.args.prefix,
            "SUFFIX": self.args.suffix,
            "QUERY_PREFIX": self.args.query_prefix,
            "QUERY_SUFFIX": self.args.query_suffix,
            **_strides("Q", self.q),
            **_strides("K", self.k),
            **_strides("V", self.v),
            **_strides("OUT", self.out),
            "MASK_BATCH": mask.batch,
            "MASK_HEAD": mask.head,
            "MASK_QUERY": mask.query,
            "MASK_KEY": mask.key,
            "IS_BOOL_MASK": mask.dtype == "bool",
            "TILES_PER_WINDOW": self._tiles_per_window(tile),
            "EXTRA_TILES": self._extra_tiles(tile),
            "EXTRA_PROGRAMS": self.batch * self.heads * self._extra_tiles(tile),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": block_depth(self.head_dim),
            "BLOCK_DV": block_depth(self.value_dim),
            "WIDE": self.needs_64_bits,
            "UPCAST": upcast,
        }


def _strides(name: str, layout: Layout) -> dict[str, int]:
    return {f"{name}_BATCH": layout.batch, f"{name}_HEAD": layout.head, f"{name}_TOKEN": layout.token}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as launches spell it: "float16", "bool"."""
    return str(dtype).removeprefix("torch.")


def block_depth(depth: int) -> int:
    """The power of two that holds the depth; matrix instructions take at least 16."""
    return max(16, 1 << (depth - 1).bit_length())
