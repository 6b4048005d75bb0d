"""What a large square matrix product of torch reaches on this machine: the roof that times are set against."""

from __future__ import annotations

from functools import partial

import torch

from t3compile.benchmark.messages import MatrixPeak
from t3compile.stopwatch import CudaEvents, Stopwatch, WallClock

_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
# The largest size whose product takes no longer.
_LONGEST_S = 0.25


def measure_matrix_peak(
    dtype: str, device: str = "cpu", repeats: int = 5, stopwatch: Stopwatch | None = None
) -> MatrixPeak:
    """The best of ``repeats`` products [n, n] x [n, n] in ``dtype`` ("float32", ...), n as large as a quarter of a
    second allows; all of torch's threads.
    """
    watch = stopwatch or (CudaEvents() if device == "cuda" else WallClock())
    generator = torch.Generator(device).manual_seed(0)
    best = MatrixPeak(dtype, device)
    for size in _SIZES:
        a, b = (torch.randn(size, size, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
        multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
        first = min(watch.seconds(multiply) for _ in range(2))
        times = [first, *(watch.seconds(multiply) for _ in range(repeats))]
        reached = 2.0 * size**3 / max(min(times), 1e-12)
        if reached > best.flops_per_s:
            best = MatrixPeak(dtype, device, size, reached, torch.get_num_threads())
        if first * 8 > _LONGEST_S:
            break
    return best
