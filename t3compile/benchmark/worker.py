"""One measured process: loads files, calls them when asked, and says how long it took and how much memory it held.

    python -m t3compile.benchmark.worker

Reads a JSON request a line on stdin and writes a JSON answer a line on what was stdout; whatever else the process
prints goes to stderr. Ends when stdin does.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

import torch

from t3compile.benchmark.load_target import Target, load_target
from t3compile.benchmark.matrix_peak import measure_matrix_peak
from t3compile.benchmark.messages import LoadRequest, Memory, WarmAnswer
from t3compile.benchmark.process_memory import Resident, reset_peak, resident
from t3compile.errors import T3CompileError, first_line
from t3compile.ops.dispatch import record_paths

# A sample lasts at least so long: short calls are repeated within it.
_SAMPLE_S = 0.05
_MOST_CALLS = 100


class Worker:
    """The targets of one process, and the answers to requests about them."""

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}
        self._calls: dict[str, int] = {}
        self._baseline: int | None = None
        self._anonymous_before_calls: int | None = None
        self._device_baseline: int | None = None
        self._peak = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; raises what the request's work raises."""
        asked = {name: value for name, value in request.items() if name != "ask"}
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "warm": self._warm,
            "settle": self._settle,
            "time": self._time,
            "memory": self._memory,
            "matrix_peak": lambda **given: asdict(measure_matrix_peak(**given)),
        }
        return answers[request["ask"]](**asked)

    def _load(self, **fields: Any) -> dict[str, Any]:
        request = LoadRequest(**{**fields, "weights": tuple(fields.get("weights", ()))})
        self._targets[request.name] = load_target(request)
        return {}

    def _warm(self, name: str, calls: int, output: str | None) -> dict[str, Any]:
        """Call a target before its times count; keep the outputs of the last call in a file."""
        target = self._targets[name]
        if self._anonymous_before_calls is None and (now := self._begin_peak()) is not None:
            self._anonymous_before_calls = now.anonymous_bytes
        result: tuple[torch.Tensor, ...] = ()

        def call() -> None:
            nonlocal result
            result = ()
            result = target.call()

        with record_paths() as record:
            seconds = [target.stopwatch.seconds(call) for _ in range(calls)][-1]
        if output is not None:
            torch.save([x.detach().cpu() for x in result], output)
        self._calls[name] = calls_of_a_sample(seconds)
        paths = tuple(dict.fromkeys(f"{one.choice.path}: {one.choice.reason}" for one in record.counts))
        return asdict(WarmAnswer(seconds, paths, target.notes, target.runtime))

    def _settle(self) -> dict[str, Any]:
        """What is resident now is the baseline of the calls that follow, but for what a runtime keeps for them."""
        self._baseline = None
        if (now := self._begin_peak()) is not None:
            self._baseline = now.now_bytes
            before = self._anonymous_before_calls
            if before is not None and any(target.keeps_memory for target in self._targets.values()):
                self._baseline -= max(0, now.anonymous_bytes - before)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._device_baseline = torch.cuda.memory_allocated()
        return {}

    def _time(self, name: str) -> dict[str, Any]:
        target, calls = self._targets[name], self._calls.get(name, 1)
        return {"seconds": target.stopwatch.seconds(target.call, calls), "calls": calls}

    def _note_peak(self) -> Resident | None:
        now = resident()
        if now is not None:
            self._peak = max(self._peak, now.peak_bytes)
        return now

    def _begin_peak(self) -> Resident | None:
        """What is resident when the peak begins anew; None where it does not."""
        self._note_peak()
        return resident() if reset_peak() else None

    def _memory(self) -> dict[str, Any]:
        now = self._note_peak()
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
        calls_peak = None if now is None or self._baseline is None else now.peak_bytes
        return asdict(Memory(self._peak or None, calls_peak, self._baseline, device, self._device_baseline))


def calls_of_a_sample(seconds: float) -> int:
    """How many calls of this length make a sample that a clock can tell."""
    return 1 if seconds <= 0 else min(_MOST_CALLS, max(1, math.ceil(_SAMPLE_S / seconds)))


def serve(requests: IO[str], answers: IO[str], worker: Worker) -> None:
    """Answer every request until there are none; an error is an answer too."""
    for line in requests:
        try:
            answer = worker.answer(json.loads(line))
        except T3CompileError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # Ctrl-C is the parent's: it ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, Worker())


if __name__ == "__main__":
    main()
