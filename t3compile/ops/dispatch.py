"""Which implementation of t3::window_attention runs for given tensors, why, and a record of what ran."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from t3compile.geometry import TokenGrid
from t3compile.ops.launch_kernel import describe_launches
from t3compile.ops.tiles import choose_tile
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.ops.window_launch import INT32_MAX, WindowLaunch, dtype_name
from t3compile.pattern import WindowPattern

Path = Literal["kernel", "regrouped"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_DEPTH, _LARGEST_DEPTH = 16, 256
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class PathChoice:
    """The implementation that serves a call, and why: the Triton kernel, or SDPA on regrouped tokens."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PathTaken:
    """A choice with the call it was made for: shapes of q and k [B, N, S, D], their dtype, grid and pattern."""

    choice: PathChoice
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    dtype: str
    grid: TokenGrid
    pattern: WindowPattern


@dataclass
class PathRecord:
    """How often each path was taken, in order of first use."""

    counts: Counter[PathTaken] = field(default_factory=Counter)

    def calls(self, path: Path) -> int:
        """Calls that this path served."""
        return sum(count for taken, count in self.counts.items() if taken.choice.path == path)

    def __str__(self) -> str:
        lines = [
            f"{count} x {taken.choice.path} ({taken.choice.reason}): "
            f"q {list(taken.queries)}, k {list(taken.keys)} {taken.dtype}, grid {taken.grid}, {taken.pattern}"
            for taken, count in self.counts.items()
        ]
        return "\n".join(lines) if lines else "no call of window attention"


_lock = threading.Lock()
_records: list[PathRecord] = []


@contextmanager
def record_paths() -> Iterator[PathRecord]:
    """Record which implementation serves every forward call of window attention, in any thread, in this block.

    A replayed CUDA graph makes no calls; the backward pass always recomputes on regrouped tokens and is not recorded.
    """
    record = PathRecord()
    with _lock:
        _records.append(record)
    try:
        yield record
    finally:
        with _lock:
            # By identity: records with the same counts are equal.
            _records[:] = [kept for kept in _records if kept is not record]


def note_path(choice: PathChoice, q: Tensor, k: Tensor, args: WindowAttentionArgs) -> None:
    """Count a call in the records that are open."""
    if not _records:
        return
    taken = PathTaken(choice, tuple(q.shape), tuple(k.shape), dtype_name(q.dtype), args.grid, args.pattern)
    with _lock:
        for record in _records:
            record.counts[taken] += 1


def choose_path(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> PathChoice:
    """The implementation for tensors that passed the op's checks; runs nothing and changes nothing.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], mask broadcastable to [B, N, Sq, S].
    """
    reason = _why_not_kernel(q, k, v, args, mask)
    if reason is not None:
        return PathChoice("regrouped", reason)
    major, minor = torch.cuda.get_device_capability(q.device)
    return PathChoice("kernel", f"compute capability {major}.{minor}, {dtype_name(q.dtype)}, depth {q.shape[3]}")


def _why_not_kernel(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None) -> str | None:
    tensors = {"q": q, "k": k, "v": v} if mask is None else {"q": q, "k": k, "v": v, "mask": mask}
    devices = {x.device for x in tensors.values()}
    if len(devices) > 1 or q.device.type != "cuda":
        return f"the tensors are on {', '.join(sorted(map(str, devices)))}"
    if args.pattern.is_full():
        return "one window over everything is plain attention"
    if q.dtype not in _KERNEL_DTYPES:
        return f"{dtype_name(q.dtype)} is none of the kernel's dtypes (float16, bfloat16, float32)"
    for name, depth in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if not _LEAST_DEPTH <= depth <= _LARGEST_DEPTH:
            return f"the depth {depth} of {name} lies outside {_LEAST_DEPTH} to {_LARGEST_DEPTH}"
    return _why_not_layout(q, k, v) or _why_not_device(q.device, describe_launches(q, k, v, args, mask))


def _why_not_layout(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() == 0:
            return f"{name} is empty"
        if x.stride(3) != 1:
            return f"the depth of {name} is not contiguous (stride {x.stride(3)})"
        steps = [stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
        # CUDA allocations themselves are aligned.
        if any(step * x.element_size() % _ALIGNMENT_BYTES for step in (*steps, x.storage_offset())):
            return f"{name} is not aligned to {_ALIGNMENT_BYTES} bytes (strides {tuple(x.stride())})"
    return None


def _why_not_device(device: torch.device, launches: tuple[WindowLaunch, ...]) -> str | None:
    if torch.version.hip is not None:
        return "the kernel was not made for AMD GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} is below 8.0"
    if not _is_triton_installed():
        return "triton is not installed: pip install 't3compile[kernels]'"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, nothing is compiled in this process"
    for launch in launches:
        tile = choose_tile((major, minor), launch)
        if tile is None:
            depths = f"{launch.head_dim} and {launch.value_dim}"
            return f"no tile of {launch.dtype} fits the shared memory at depths {depths}"
        if launch.programs(tile) > INT32_MAX:
            return f"{launch.programs(tile)} programs are more than a CUDA launch has ({INT32_MAX})"
    return None


@functools.cache
def _is_triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
