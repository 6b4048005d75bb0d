"""Paired times: the variants of a case are asked in turns, A B C A B C, so that what slows the machine slows all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from t3compile.benchmark.child_process import Askable
from t3compile.errors import T3CompileError

Result = TypeVar("Result")


@dataclass
class Lane:
    """One variant in one process: which target each case calls, what was measured, and why it left, if it did."""

    variant: str
    child: Askable
    targets: Mapping[str, str]
    times_s: dict[str, list[float]] = field(default_factory=dict)
    error: T3CompileError | None = None

    @property
    def is_running(self) -> bool:
        return self.error is None

    def try_to(self, work: Callable[[], Result]) -> Result | None:
        """What work gives; a lane whose child fails leaves with the reason, and gives None from then on."""
        if not self.is_running:
            return None
        try:
            return work()
        except T3CompileError as error:
            self.error = error
            return None

    def seconds(self, target: str) -> float | None:
        """Time one call of a target; None where the lane has left, or leaves now."""
        return self.try_to(lambda: float(self.child.ask("time", name=target)["seconds"]))


def measure_in_turns(
    lanes: Sequence[Lane],
    cases: Sequence[str],
    repeats: int,
    progress: Callable[[int], None] = lambda _: None,
    timed: Callable[[Lane, str], None] = lambda _, __: None,
) -> None:
    """Time every case ``repeats`` times in every lane, round by round; lanes whose child fails leave, others go on.

    ``times_s`` of a lane then has one time per case and round. Cases that share a target are timed once per round.
    ``progress`` is told the round, ``timed`` the lane and each target of a round, also where the lane has left.
    """
    for number in range(repeats):
        progress(number + 1)
        known: dict[tuple[int, str], float | None] = {}
        for case in cases:
            for position, lane in enumerate(lanes):
                target = lane.targets[case]
                if (position, target) not in known:
                    known[position, target] = lane.seconds(target)
                    timed(lane, target)
                seconds = known[position, target]
                if seconds is not None and lane.is_running:
                    lane.times_s.setdefault(case, []).append(seconds)
