"""Watch a TensorRT build, show its phases, and stop it cleanly on Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from t3compile.progress import Progress

Result = TypeVar("Result")

# How long the waiting thread sleeps between looks at the keyboard.
_POLL_S = 0.1


class Phases:
    """The nested phases of a build. TensorRT may report from any of its threads."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._lock = threading.Lock()
        self._stack: list[tuple[str, int]] = []
        self._steps: dict[str, int] = {}
        self.cancelled = False

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            if parent is not None and any(known == parent for known, _ in self._stack):
                while self._stack[-1][0] != parent:
                    self._stack.pop()
            self._stack.append((name, max(steps, 1)))
            self._steps[name] = 0
            self._show()

    def step(self, name: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            # TensorRT counts steps from 0 and reports those that are complete, in any order.
            self._steps[name] = max(self._steps.get(name, 0), step + 1)
            self._show()
            return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            self._stack = [entry for entry in self._stack if entry[0] != name]
            self._steps.pop(name, None)

    def _show(self) -> None:
        if self._stack:
            self._shown.phase(self._stack[-1][0], len(self._stack) - 1, self._fraction())

    def _fraction(self) -> float:
        """A phase's share is one step of the phase around it."""
        done = 0.0
        for name, steps in reversed(self._stack):
            done = min(1.0, (min(self._steps[name], steps) + done) / steps)
        return done


def make_progress_monitor(trt: Any, phases: Phases) -> Any:
    """TensorRT's view of the phases; a build ends early once ``phases.cancelled`` is set."""

    class PhaseMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return PhaseMonitor()


def run_cancellable(build: Callable[[], Result], phases: Phases) -> Result:
    """Run a build in a thread of its own; on KeyboardInterrupt cancel it, wait for its end, and raise again.

    The main thread alone sees signals, and only between its own instructions: it must not be the one in TensorRT.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            if not phases.cancelled:
                results.append(build())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    try:
        thread.start()
        while not ended.wait(_POLL_S):
            pass
    except KeyboardInterrupt:
        phases.cancelled = True
        # Interrupted before the thread was there, there is nothing to wait for: it ends by itself.
        if thread.ident is not None:
            ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
