"""Time calls of an engine and read the process's peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3compile.stopwatch import WallClock


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class RunResult:
    """Outputs of the last call, wall times of all, and the process's peak memory after them.

    ``dtypes`` are the engine's; bfloat16 values are kept, and saved, as float32.
    """

    values: tuple[np.ndarray[Any, Any], ...]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    times_s: tuple[float, ...]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def outputs(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype of every output."""
        triples = zip(self.names, self.values, self.dtypes, strict=True)
        return [(name, list(value.shape), dtype) for name, value, dtype in triples]

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
    """Call the engine ``repeat`` times on named inputs (positional ones are named "0", "1", ...).

    A time is of the whole call until its outputs are there: an engine that leaves them on a GPU is waited for.
    """
    positional = [inputs[name] for name in sorted((n for n in inputs if n.isdecimal()), key=int)]
    named = {name: value for name, value in inputs.items() if not name.isdecimal()}
    result: Any = None

    def call() -> None:
        nonlocal result
        result = engine(*positional, **named)

    times = [WallClock().seconds(call) for _ in range(repeat)]
    outputs = result if isinstance(result, tuple) else (result,)
    values = tuple(_array(x) for x in outputs)
    dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in outputs)
    names = getattr(engine, "output_names", None) or tuple(
        "output" if len(values) == 1 else f"output_{i}" for i in range(len(values))
    )
    return RunResult(values, tuple(names), dtypes, tuple(times), peak_memory_bytes())


def _array(x: Any) -> np.ndarray[Any, Any]:
    if not isinstance(x, Tensor):
        return np.asarray(x)
    x = x.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16; float32 holds it exactly.
    array: np.ndarray[Any, Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array
