"""The fastest of some tiles on this GPU, by timing each: an option, since it costs a compilation per tile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from t3compile.ops.window_launch import Tile

# Milliseconds that one run takes.
Timer = Callable[[Callable[[], None]], float]


def cuda_milliseconds(run: Callable[[], None], *, warmup: int = 2, repeats: int = 5) -> float:
    """Median time of a run on the current CUDA stream in milliseconds, by CUDA events."""
    import torch

    for _ in range(warmup):
        run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def fastest_tile(
    tiles: Iterable[Tile], run: Callable[[Tile], None], *, timer: Timer = cuda_milliseconds
) -> Tile | None:
    """The tile whose run takes least; those that need more than the GPU has are left out. None where all do."""
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            times[tile] = timer(lambda tile=tile: run(tile))  # type: ignore[misc]
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
    return min(times, key=lambda tile: times[tile], default=None)
