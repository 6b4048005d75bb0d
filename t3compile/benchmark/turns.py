"""Paired times: the variants of a case are asked in turns, A B C A B C, so that what slows the machine slows all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from t3compile.benchmark.child_process import Askable
from t3compile.errors import T3CompileError


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

    def try_to(self, work: Callable[[], None]) -> None:
        """Do something with the child; a lane whose child cannot leaves, with the reason."""
        try:
            work()
        except T3CompileError as error:
            self.error = error


def measure_in_turns(
    lanes: Sequence[Lane], cases: Sequence[str], repeats: int, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Time every case ``repeats`` times in every lane, round by round; lanes whose child fails leave, others go on.

    ``times_s`` of a lane then has one time per case and round. Cases that share a target are timed once per round.
    """
    for number in range(repeats):
        progress(number + 1)
        known: dict[tuple[int, str], float] = {}
        for case in cases:
            for position, lane in enumerate(lanes):
                if lane.is_running:
                    lane.try_to(lambda lane=lane, key=(position, lane.targets[case]): _time(lane, case, key, known))  # type: ignore[misc]  # noqa: B023


def _time(lane: Lane, case: str, key: tuple[int, str], known: dict[tuple[int, str], float]) -> None:
    if key not in known:
        known[key] = float(lane.child.ask("time", name=key[1])["seconds"])
    lane.times_s.setdefault(case, []).append(known[key])
