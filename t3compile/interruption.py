"""How a command is stopped: what ends it, what is not cut in the middle, and what goes with it.

A signal raises Stopped in the main thread, between two of its instructions. A second one, or a main thread that does
not get that far because a library computes, ends the process as it is: a thread that waits for signals removes what is
unfinished.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOPPED = "stopped; nothing unfinished was left behind"
# How long a command may take to unwind; libraries do not look at signals while they compute.
_GRACE_S = 10.0
_RETRY_S = 0.05
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_unfinished: set[Path] = set()


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells count: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Remove a file or folder if the command is stopped in the block; the block itself removes it otherwise."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> str:
    """Remove what is unfinished; a sentence for the user, which names what would not go."""
    left = []
    for path in list(_unfinished):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if os.path.lexists(path):
            left.append(f"'{path}'")
    return f"stopped; could not remove {', '.join(left)}" if left else STOPPED


class _State:
    """What the handler of signals and the blocks that hold it off share."""

    def __init__(self) -> None:
        self.held = 0
        self.pending: int | None = None


_state = _State()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Stopped off until the block has ended: for steps that belong together and take no time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        number = _state.pending
        if number is not None and not _state.held:
            _state.pending = None
            raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """In the block SIGINT, SIGTERM and SIGHUP raise Stopped, and end the processes that this one started.

    Outside the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # What whoever started the command lets it ignore (nohup) stays ignored.
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    hook = sys.unraisablehook
    with _Watcher() as watcher:
        try:
            sys.unraisablehook = _raising_again(watcher, hook)
            for number in caught:
                signal.signal(number, _stop)
            yield
        finally:
            for number in caught:
                signal.signal(number, before[number])
            sys.unraisablehook = hook
            _state.pending = None


def _stop(number: int, frame: Any) -> None:
    if _state.held:
        _state.pending = number
        return
    raise Stopped(number)


def _raising_again(watcher: _Watcher, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Python drops what is raised in a finalizer: the signal is then sent once more, when that has ended."""

    def show(unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            hook(unraisable)
            return
        watcher.expect_repetition()
        main = threading.main_thread().ident
        # A real signal: it wakes a main thread that waits.
        timer = threading.Timer(_RETRY_S, signal.pthread_kill, (main, stopped.number))
        timer.daemon = True
        timer.start()

    return show


class _Watcher:
    """A thread that learns of signals at once, whatever the main thread does."""

    def __init__(self) -> None:
        self._repetitions = 0

    def __enter__(self) -> _Watcher:
        self._read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._written)
        self._thread.join()
        os.close(self._read)

    def expect_repetition(self) -> None:
        self._repetitions += 1

    def _watch(self) -> None:
        number = self._next(None)
        if number is None:
            return
        end_children()
        # The second signal, or none in time; in between the command may have ended.
        if self._next(_GRACE_S) is not None:
            _end(number)

    def _next(self, within_s: float | None) -> int | None:
        """The number of the next signal, 0 where none came in time; None once there will be none."""
        deadline = None if within_s is None else time.monotonic() + within_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                return 0
            data = os.read(self._read, 1)
            if not data:
                return None
            if data[0] not in _SIGNALS:
                continue
            if not self._repetitions:
                return data[0]
            self._repetitions -= 1


def _end(number: int) -> None:
    """End the process without the main thread."""
    end_children()
    message = remove_unfinished()
    os.write(2, f"{message}\n".encode())
    os._exit(128 + number)


def end_children() -> None:
    """Ask every process below this one to end: compilers would go on writing into folders that are removed."""
    for process in _descendants(os.getpid()):
        try:
            os.kill(process, signal.SIGTERM)
        except (ProcessLookupError, PermissionError):
            continue


def _descendants(process: int) -> list[int]:
    """Where the system has /proc; elsewhere a terminal's Ctrl-C reaches them itself."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, pending = [], [process]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found
