"""What a benchmark found, as plain data: to JSON and back, and what follows from the times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from t3compile.benchmark.machine import Machine
from t3compile.benchmark.messages import MatrixPeak, Memory
from t3compile.benchmark.summaries import Ratio, Spread, weighted_rounds
from t3compile.errors import InputsError

BENCH_VERSION = 1
OURS = "windows"
# The case that stands for all layers of attention together.
TOTAL = "all layers"


@dataclass(frozen=True)
class Measurement:
    """The times of one case in one variant and runtime, a time per round.

    ``macs`` are those of one call as this variant computes it; ``layers`` is how many layers of the model the case
    stands for.
    """

    label: str
    subject: str
    case: str
    variant: str
    runtime: str
    dtype: str
    layers: int
    macs: int
    times_s: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.times_s)

    @property
    def flops_per_s(self) -> float:
        """Two FLOPs per MAC over the median time."""
        return 2 * self.macs / max(self.spread.median, 1e-12)


@dataclass(frozen=True)
class ProcessRecord:
    """The process of one variant in one runtime: its memory, and by which path the op's calls ran there."""

    label: str
    subject: str
    variant: str
    runtime: str
    engine: str
    memory: Memory
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The largest difference of a variant's outputs from the rewritten program's in the first runtime that ran.

    ``allowed`` is None for full attention, which is another function.
    """

    label: str
    subject: str
    case: str
    variant: str
    runtime: str
    error: float
    magnitude: float
    allowed: float | None

    @property
    def passed(self) -> bool:
        return self.allowed is None or self.error <= self.allowed


@dataclass(frozen=True)
class NotRun:
    """What was asked for and not measured, and why; an empty field means all.

    ``exit_code`` is that of a process that died.
    """

    runtime: str
    reason: str
    label: str = ""
    subject: str = ""
    variant: str = ""
    exit_code: int | None = None

    def __str__(self) -> str:
        return f"{', '.join(filter(None, (self.label, self.subject, self.variant, self.runtime)))}: {self.reason}"


@dataclass(frozen=True)
class BenchReport:
    """All of one run."""

    command: str
    date: str
    machine: Machine
    versions: Mapping[str, str]
    device: str
    repeats: int
    warmup: int
    peaks: tuple[MatrixPeak, ...]
    measurements: tuple[Measurement, ...]
    processes: tuple[ProcessRecord, ...]
    differences: tuple[Difference, ...]
    not_run: tuple[NotRun, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether variants that should compute one function did, and no process died or failed."""
        return all(one.passed for one in self.differences) and not any(one.variant for one in self.not_run)

    def find(self, label: str, subject: str, case: str, variant: str, runtime: str) -> Measurement | None:
        """A measurement; the case TOTAL is the sum over an attention's layers, where all of its cases were measured."""
        if case == TOTAL:
            return self._total(label, subject, variant, runtime)
        wanted = (label, subject, case, variant, runtime)
        return next((m for m in self.measurements if _key(m) == wanted), None)

    def cases(self, label: str, subject: str) -> tuple[str, ...]:
        """Cases in order of measuring, with TOTAL after those of attention."""
        names = tuple(dict.fromkeys(m.case for m in self.measurements if (m.label, m.subject) == (label, subject)))
        return (*names, TOTAL) if subject == "attention" and names else names

    def _total(self, label: str, subject: str, variant: str, runtime: str) -> Measurement | None:
        names = self.cases(label, subject)[:-1]
        found = [self.find(label, subject, name, variant, runtime) for name in names]
        parts = [one for one in found if one is not None]
        if not parts or len(parts) != len(names):
            return None
        weights = [part.layers for part in parts]
        return replace(
            parts[0],
            case=TOTAL,
            layers=sum(weights),
            macs=sum(part.macs * part.layers for part in parts),
            times_s=weighted_rounds([part.times_s for part in parts], weights),
        )

    def ratio(self, ours: Measurement, variant: str) -> Ratio | None:
        """How many times as fast as a variant in the same case and runtime; None where that was not measured."""
        baseline = self.find(ours.label, ours.subject, ours.case, variant, ours.runtime)
        return None if baseline is None else Ratio.of(ours.times_s, baseline.times_s)

    def share_of_full(self, ours: Measurement) -> float | None:
        """FLOP/s over those of full attention in the same runtime."""
        full = self.find(ours.label, ours.subject, ours.case, "full", ours.runtime)
        return None if full is None else ours.flops_per_s / full.flops_per_s

    def share_of_peak(self, ours: Measurement) -> float | None:
        """FLOP/s over those of a large matrix product in the same dtype."""
        peak = next((p for p in self.peaks if p.dtype == ours.dtype), None)
        return None if peak is None or not peak.flops_per_s else ours.flops_per_s / peak.flops_per_s

    def groups(self) -> tuple[tuple[str, str], ...]:
        """Labels and subjects that were measured, in order."""
        return tuple(dict.fromkeys((m.label, m.subject) for m in self.measurements))

    def names(self, field: str) -> tuple[str, ...]:
        """The different values of a field of the measurements, in order."""
        return tuple(dict.fromkeys(getattr(m, field) for m in self.measurements))

    def with_totals(self) -> tuple[Measurement, ...]:
        """All measurements, and the totals of attention."""
        totals = (
            self.find(label, subject, TOTAL, variant, runtime)
            for label, subject in self.groups()
            if subject == "attention"
            for runtime in self.names("runtime")
            for variant in self.names("variant")
        )
        return (*self.measurements, *(one for one in totals if one is not None))

    def to_json(self) -> dict[str, Any]:
        return {
            "t3compile_bench": BENCH_VERSION,
            **{field.name: _plain(getattr(self, field.name)) for field in fields(self)},
            "results": [self._result(one) for one in self.with_totals()],
        }

    def _result(self, one: Measurement) -> dict[str, Any]:
        """What follows from the times of one measurement."""
        baselines = [v for v in self.names("variant") if v != OURS] if one.variant == OURS else []
        ratios = {variant: self.ratio(one, variant) for variant in baselines}
        return {
            **dict(zip(("label", "subject", "case", "variant", "runtime"), _key(one), strict=True)),
            "layers": one.layers,
            "macs": one.macs,
            "seconds": one.spread.to_json(),
            "flops_per_s": one.flops_per_s,
            "share_of_full": self.share_of_full(one),
            "share_of_peak": self.share_of_peak(one),
            "times_as_fast_as": {name: ratio.to_json() for name, ratio in ratios.items() if ratio is not None},
        }

    @classmethod
    def from_json(cls, data: object) -> BenchReport:
        """A report as ``to_json`` wrote it; what follows from the times is computed anew. InputsError otherwise."""
        if not isinstance(data, Mapping) or data.get("t3compile_bench") != BENCH_VERSION:
            raise InputsError(f"no report of 't3compile bench' (version {BENCH_VERSION}): give its JSON")
        try:
            given = {field.name: data[field.name] for field in fields(cls)}
            return cls(
                **{
                    **given,
                    "machine": Machine(**given["machine"]),
                    "peaks": tuple(MatrixPeak(**one) for one in given["peaks"]),
                    "measurements": tuple(_read(Measurement, one) for one in given["measurements"]),
                    "processes": tuple(_read(ProcessRecord, one) for one in given["processes"]),
                    "differences": tuple(_read(Difference, one) for one in given["differences"]),
                    "not_run": tuple(NotRun(**one) for one in given["not_run"]),
                    "notes": tuple(given["notes"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise InputsError(f"the report of 't3compile bench' is damaged: {error}") from None


Record = TypeVar("Record", Measurement, ProcessRecord, Difference)


def _read(kind: type[Record], data: Mapping[str, Any]) -> Record:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    if "memory" in values:
        values["memory"] = Memory(**values["memory"])
    return kind(**values)


def _key(one: Measurement) -> tuple[str, str, str, str, str]:
    return one.label, one.subject, one.case, one.variant, one.runtime


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
