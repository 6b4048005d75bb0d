"""Whether variants that should compute one function do, from the outputs that their processes kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Elements at a time: outputs at real sizes are gigabytes.
_CHUNK = 2**24


def largest_difference(path: Path, reference: Path) -> tuple[float, float]:
    """The largest |a - b| over all outputs, and the largest |b| of the reference.

    Infinite where number or shapes of outputs differ, or one of them is not finite.
    """
    ours, theirs = ([_real(x) for x in torch.load(file, mmap=True, weights_only=True)] for file in (path, reference))
    magnitude = max((_largest(b) for b in theirs), default=0.0)
    if [tuple(x.shape) for x in ours] != [tuple(x.shape) for x in theirs]:
        return math.inf, magnitude
    error = max((_largest(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    return (error if math.isfinite(error) and math.isfinite(magnitude) else math.inf), magnitude


def _largest(a: Tensor, b: Tensor | None = None) -> float:
    largest = 0.0
    for x, y in _chunks(a, b):
        difference = float((x if y is None else x - y).abs().max())
        # max() would lose a NaN.
        largest = math.inf if math.isnan(difference) else max(largest, difference)
    return largest


def _chunks(a: Tensor, b: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    flat = [None if x is None else x.reshape(-1) for x in (a, b)]
    assert flat[0] is not None
    for start in range(0, flat[0].numel(), _CHUNK):
        x, y = (None if one is None else one[start : start + _CHUNK].float() for one in flat)
        assert x is not None
        yield x, y


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def allowed_difference(dtype: str, magnitude: float) -> float:
    """Half of a dtype's digits: rounding in several layers stays far below, another function does not."""
    return math.sqrt(torch.finfo(getattr(torch, dtype)).eps) * magnitude
