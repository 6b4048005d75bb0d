"""Medians, spreads and ratios of times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The middle of some times, their quartiles and their ends."""

    median: float
    lower: float
    upper: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles include the ends; one value is its own quartile."""
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values), max(values))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.lower, "q3": self.upper, "min": self.least, "max": self.most}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline: the baseline's times over ours.

    ``of_medians`` compares the medians; ``pairs`` is the spread of the ratios within each round, whose median is the
    more robust where the machine's speed drifts.
    """

    of_medians: float
    pairs: Spread

    @classmethod
    def of(cls, ours: Sequence[float], baseline: Sequence[float]) -> Ratio:
        paired = [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
        return cls(statistics.median(baseline) / statistics.median(ours), Spread.of(paired))

    def to_json(self) -> dict[str, Any]:
        return {"of_medians": self.of_medians, "of_pairs": self.pairs.to_json()}


def weighted_rounds(times: Sequence[Sequence[float]], weights: Sequence[int]) -> tuple[float, ...]:
    """The whole of several cases round by round, each as often as its weight says."""
    return tuple(
        sum(weight * one for weight, one in zip(weights, row, strict=True)) for row in zip(*times, strict=True)
    )
