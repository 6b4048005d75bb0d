"""A worker as its parent sees it: asked one thing at a time, told apart when it dies, ended with all it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import t3compile
from t3compile.errors import T3CompileError

_WORKER = (sys.executable, "-m", "t3compile.benchmark.worker")
_WAIT_S = 5.0


class WorkerError(T3CompileError):
    """A measured process could not do what it was asked to, and lives on."""


class WorkerDied(T3CompileError):  # noqa: N818
    """A measured process ended by itself; ``exit_code`` is negative where a signal ended it."""

    def __init__(self, exit_code: int, last_words: str) -> None:
        self.exit_code = exit_code
        said = f": {last_words}" if last_words else ""
        super().__init__(f"its process {_ending(exit_code)}{said}")


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    likely = ", which mostly means that memory ran out" if name == "SIGKILL" else ""
    return f"was killed by {name} (exit code {exit_code}){likely}"


class Askable(Protocol):
    """What answers requests: a worker's process."""

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        """The answer; WorkerError or WorkerDied instead of one."""


class ChildProcess:
    """A worker in a process, and a process group, of its own."""

    def __init__(self, folder: Path, name: str, command: Sequence[str] = _WORKER) -> None:
        self._log = folder / f"{name}.log"
        environment = {
            **os.environ,
            # The package that this process runs, wherever it lies.
            "PYTHONPATH": os.pathsep.join(filter(None, (_package_folder(), os.environ.get("PYTHONPATH", "")))),
            "TMPDIR": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            # Compiling in a pool would leave processes beside the measured one.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"ask": request, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(self._process.wait(), self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def end(self) -> None:
        """End the process and all that it started, whatever it is doing."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_WAIT_S)


def _package_folder() -> str:
    return str(Path(t3compile.__file__).resolve().parents[1])


@contextmanager
def child_process(folder: Path, name: str) -> Iterator[ChildProcess]:
    """A worker for the time of a block."""
    child = ChildProcess(folder, name)
    try:
        yield child
    finally:
        child.end()
