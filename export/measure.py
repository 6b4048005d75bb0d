"""Time calls of an engine and read the process's peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class RunResult:
    """Outputs of the last call, wall times of all, and the process's peak memory after them."""

    values: tuple[np.ndarray[Any, Any], ...]
    names: tuple[str, ...]
    times_s: tuple[float, ...]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def outputs(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype of every output."""
        pairs = zip(self.names, self.values, strict=True)
        return [(name, list(value.shape), str(value.dtype)) for name, value in pairs]

    def save(self, path: Path) -> None:
        """Write all outputs as .npz under their names."""
        with path.open("wb") as file:
            arrays: dict[str, Any] = dict(zip(self.names, self.values, strict=True))
            np.savez(file, **arrays)

    def to_json(self) -> dict[str, Any]:
        return {
            "outputs": [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in self.outputs],
            "times_s": list(self.times_s),
            "median_s": self.median_s,
            "peak_memory_bytes": self.peak_bytes,
        }


def run_timed(engine: Callable[..., Any], inputs: Mapping[str, Any], repeat: int) -> RunResult:
    """Call the engine ``repeat`` times on named inputs (positional ones are named "0", "1", ...)."""
    positional = [inputs[name] for name in sorted((n for n in inputs if n.isdecimal()), key=int)]
    named = {name: value for name, value in inputs.items() if not name.isdecimal()}
    times = []
    result: Any = None
    for _ in range(repeat):
        start = time.perf_counter()
        result = engine(*positional, **named)
        times.append(time.perf_counter() - start)
    outputs = result if isinstance(result, tuple) else (result,)
    values = tuple(x.numpy() if isinstance(x, Tensor) else np.asarray(x) for x in outputs)
    names = getattr(engine, "output_names", None) or tuple(
        "output" if len(values) == 1 else f"output_{i}" for i in range(len(values))
    )
    return RunResult(values, tuple(names), tuple(times), peak_memory_bytes())
