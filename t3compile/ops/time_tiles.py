"""The fastest of some tiles on this GPU, by timing each: an option, since it costs a compilation per tile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from t3compile.ops.window_launch import Tile
from t3compile.stopwatch import CudaEvents

# Milliseconds that one run takes.
Timer = Callable[[Callable[[], None]], float]


def cuda_milliseconds(run: Callable[[], None], *, warmup: int = 2, repeats: int = 5) -> float:
    """Median time of a run on the current CUDA stream in milliseconds, by CUDA events."""
    events = CudaEvents()
    for _ in range(warmup):
        run()
    return 1e3 * statistics.median(events.seconds(run) for _ in range(repeats))


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
