"""What the measuring process and its children say to each other: a JSON object a line, an answer for every request."""

from __future__ import annotations

from dataclasses import dataclass

from t3compile.benchmark.names import Device, RuntimeName


@dataclass(frozen=True)
class LoadRequest:
    """Load a file under a name. ``inputs`` is a file of tensors by name; None: seeded normal values of the file's own
    shapes and dtypes, and a mask that hides nothing. ``weights`` are folders that the file refers to.
    """

    name: str
    path: str
    runtime: RuntimeName
    device: Device = "cpu"
    inputs: str | None = None
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class WarmAnswer:
    """Seconds of the last warm-up call, what the op's calls ran by, and what the runtime has to say."""

    seconds: float
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    runtime: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process; None where this system does not tell.

    ``peak_bytes``: the largest resident size since it began, ``calls_peak_bytes``: during the timed calls alone,
    ``baseline_bytes``: resident before them, weights and inputs included, but not what the runtime keeps from call to
    call. ``device_bytes`` and ``device_baseline_bytes``: the same on a GPU, by torch's allocator.
    """

    peak_bytes: int | None = None
    calls_peak_bytes: int | None = None
    baseline_bytes: int | None = None
    device_bytes: int | None = None
    device_baseline_bytes: int | None = None

    @property
    def growth_bytes(self) -> int | None:
        """How much the calls add to weights and inputs, on the GPU where they run on one."""
        if self.device_bytes is not None and self.device_baseline_bytes is not None:
            return max(0, self.device_bytes - self.device_baseline_bytes)
        if self.calls_peak_bytes is None or self.baseline_bytes is None:
            return None
        return max(0, self.calls_peak_bytes - self.baseline_bytes)


@dataclass(frozen=True)
class MatrixPeak:
    """The most that one square matrix product of torch reached here; FLOPs are two per MAC."""

    dtype: str
    device: str
    size: int = 0
    flops_per_s: float = 0.0
    threads: int = 0
