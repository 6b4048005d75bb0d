"""Launch the Triton kernel on tensors: one launch per branch, the second averages into the first's output."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import KernelError, first_line
from t3compile.ops.load_kernel import compilable_kernel
from t3compile.ops.tiles import candidate_tiles, choose_tile
from t3compile.ops.time_tiles import fastest_tile
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.ops.window_launch import Layout, MaskLayout, Tile, WindowLaunch, dtype_name

AUTOTUNE_VARIABLE = "T3COMPILE_AUTOTUNE"

# The tile that a launch was found to take on a device, and why another takes none.
_tiles: dict[tuple[WindowLaunch, int], Tile] = {}
_refusals: dict[tuple[WindowLaunch, int], str] = {}
_lock = threading.Lock()


def describe_launches(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None
) -> tuple[WindowLaunch, ...]:
    """The launches of a call, one per branch that has to be computed; reads shapes, strides and dtypes only.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], mask broadcastable to [B, N, Sq, S].
    """
    (batch, heads, tokens, head_dim), value_dim = q.shape, v.shape[3]
    return tuple(
        WindowLaunch(
            args,
            branch,
            averages=i > 0,
            batch=batch,
            heads=heads,
            key_heads=k.shape[1],
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype_name(q.dtype),
            q=_layout(q),
            k=_layout(k),
            v=_layout(v),
            out=Layout.tokens_first(heads, tokens, value_dim),
            mask=None if mask is None else _mask_layout(mask),
        )
        for i, branch in enumerate(args.pattern.computed_branches(args.grid))
    )


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv], without values."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3])).transpose(1, 2)


def launch_branch(
    kernel: Any,
    launch: WindowLaunch,
    tile: Tile,
    tensors: tuple[Tensor, ...],
    mask: Tensor | None,
    out: Tensor,
    *,
    upcast: bool = False,
) -> None:
    """One launch on q, k, v; where it averages, into the values that ``out`` holds.

    Reading the other branch's output in place is safe: each program reads what it alone writes.
    """
    kernel[(launch.programs(tile),)](
        *tensors,
        mask,
        out if launch.averages else None,
        out,
        **launch.constants(tile, upcast=upcast),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def launch_kernel(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> Tensor:
    """Window attention of CUDA tensors by the kernel: [B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv].

    The tensors are such that ``choose_path`` names the kernel. KernelError where no tile can be compiled and launched.
    """
    out = empty_output(q, v)
    kernel = compilable_kernel()
    with torch.cuda.device(q.device):
        for launch in describe_launches(q, k, v, args, mask):

            def run(tile: Tile, into: Tensor = out, launch: WindowLaunch = launch) -> None:
                launch_branch(kernel, launch, tile, (q, k, v), mask, into)

            _launch_first_fitting(launch, q.device, run, out)
    return out


def _launch_first_fitting(launch: WindowLaunch, device: torch.device, run: Callable[..., None], out: Tensor) -> None:
    """Run with the first tile of the table that this GPU takes, and remember it."""
    key = (launch, torch.cuda.current_device())
    if key in _refusals:
        raise KernelError(_refusals[key])
    if key in _tiles:
        run(_tiles[key])
        return
    tiles, reason = [], "no tile of the table fits"
    try:
        tiles = _tiles_in_order(launch, torch.cuda.get_device_capability(device), run, out)
    except Exception as error:
        reason = _refusal(error)
    for tile in tiles:
        try:
            run(tile)
        except Exception as error:
            reason = _refusal(error)
            if type(error).__name__ != "OutOfResources":
                break
        else:
            with _lock:
                _tiles[key] = tile
            return
    refusal = f"the kernel cannot be launched for grid {launch.args.grid}, splits {launch.args.pattern} ({reason})"
    with _lock:
        _refusals[key] = refusal
    raise KernelError(refusal)


def _tiles_in_order(
    launch: WindowLaunch, capability: tuple[int, int], run: Callable[..., None], out: Tensor
) -> list[Tile]:
    """The table's choice first, or the fastest where the user asked for it, then the others."""
    tiles = list(candidate_tiles(capability, launch.dtype, launch.head_dim, launch.value_dim))
    first = choose_tile(capability, launch)
    if os.environ.get(AUTOTUNE_VARIABLE) == "1" and not torch.cuda.is_current_stream_capturing():
        scratch = out.clone()
        first = fastest_tile(tiles, lambda tile: run(tile, scratch)) or first
    return [first, *(tile for tile in tiles if tile != first)] if first is not None else []


def _refusal(error: Exception) -> str:
    """What the compiler says; any other error is raised again."""
    if not _is_of_the_compiler(error):
        raise error
    return f"{type(error).__name__}: {first_line(error)}"


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether triton, or the C compiler that it calls, refused; errors of the GPU itself are not."""
    if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
        return False
    # What the CUDA driver answers to triton's calls comes as a plain RuntimeError.
    if str(error).startswith("Triton Error [CUDA]"):
        return False
    is_triton = any(cls.__module__.startswith("triton.") for cls in type(error).__mro__)
    return is_triton or isinstance(error, RuntimeError | OSError | subprocess.CalledProcessError)


def _layout(x: Tensor) -> Layout:
    # The stride of an axis of one element means nothing: 0 for all of them shares the compiled kernel.
    return Layout(*_steps(x)[:3])


def _mask_layout(mask: Tensor) -> MaskLayout:
    return MaskLayout(dtype_name(mask.dtype), *(0,) * (4 - mask.dim()), *_steps(mask))


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 where an axis has one element and so perhaps stands for many."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
