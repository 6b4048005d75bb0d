"""The time of calls: by the wall clock until results are there, or by CUDA events on the current stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Stopwatch(Protocol):
    """Measures calls one after the other."""

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Seconds that one of ``calls`` calls takes, the mean over them."""


def wait_for_gpu() -> None:
    """Wait for the work of all CUDA streams, where this process has used CUDA at all."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class WallClock:
    """Time on the wall; ``finish`` waits for what a call leaves running."""

    clock: Callable[[], float] = time.perf_counter
    finish: Callable[[], None] = wait_for_gpu

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        start = self.clock()
        for _ in range(calls):
            run()
        self.finish()
        return (self.clock() - start) / calls


@dataclass(frozen=True)
class CudaEvents:
    """Time on the GPU, between two events on the current stream: launches that it need not wait for do not count."""

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls
