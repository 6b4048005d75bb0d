"""What long work tells while it runs: the step it is at, and how much of its work is done.

Whatever works is given a Progress, or the plain function of an amount that ``measure`` yields; how it is shown is none
of its business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Unit = Literal["bytes", "MACs", "kernels"]
# So much of the work that is measured was done since the last call.
Advance = Callable[[float], None]

_RECENT_S = 30.0
_FEWEST = 8
_FIRST_RATE_S = 1.0


def unmeasured(_: float) -> None:
    """Nobody wants to know."""


class Progress:
    """Shows nothing. What shows progress overrides any of the three."""

    def __call__(self, step: str) -> None:
        """A step begins, in words."""

    @contextmanager
    def measure(self, total: float, unit: Unit) -> Iterator[Advance]:
        """The block does ``total`` of a unit, over all its steps; it calls the yielded function with each amount."""
        yield unmeasured

    def phase(self, name: str, depth: int, done: float) -> None:
        """A phase of unknown work began or went on: how deep it is nested (0 outermost), 0 <= done <= 1."""


SILENT = Progress()


class Measured:
    """How much of some work is done and how long the rest will take, by the rate of the last half minute.

    That is at least the last eight amounts, since single ones may take minutes. ``clock`` gives seconds.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0.0
        self._clock = clock
        self._seen = deque([(clock(), 0.0)])

    def advance(self, amount: float) -> None:
        self.done += amount
        now = self._clock()
        self._seen.append((now, self.done))
        while len(self._seen) > _FEWEST and now - self._seen[1][0] > _RECENT_S:
            self._seen.popleft()

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0

    def left_s(self) -> float | None:
        """Seconds; None until there is a rate. Waiting for an amount lowers the rate."""
        since, before = self._seen[0]
        taken = self._clock() - since
        if self.done <= before or taken < _FIRST_RATE_S:
            return None
        return max(0.0, self.total - self.done) * taken / (self.done - before)
