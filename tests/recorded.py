"""A Progress that remembers what it was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from t3compile.progress import Advance, Progress, Unit


@dataclass
class Work:
    """Measured work: what was expected, the amounts that came, and the step it began in."""

    step: str
    total: float
    unit: Unit
    amounts: list[float] = field(default_factory=list)

    @property
    def done(self) -> float:
        return sum(self.amounts)


class Recorded(Progress):
    """Steps in order and all measured work."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.work: list[Work] = []

    def __call__(self, step: str) -> None:
        self.steps.append(step)

    @contextmanager
    def measure(self, total: float, unit: Unit) -> Iterator[Advance]:
        self.work.append(work := Work(self.steps[-1], total, unit))
        yield work.amounts.append

    def of(self, unit: Unit) -> list[Work]:
        """The work of that unit that is not empty."""
        return [work for work in self.work if work.unit == unit and work.total]
