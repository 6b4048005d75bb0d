"""A report as tables: titles, columns and rows of text, for a terminal or as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from t3compile.benchmark.bench_report import OURS, TOTAL, BenchReport, Difference, Measurement
from t3compile.report import count, size_bytes


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def bench_tables(report: BenchReport) -> Iterator[Table]:
    """A table of every runtime and subject, then the peaks, the processes, and what was not run."""
    for label, subject in report.groups():
        for runtime in report.names("runtime"):
            if subject == "attention":
                yield from _attention_table(report, label, runtime)
        if subject == "model":
            yield _model_table(report, label)
    yield _process_table(report)
    yield _difference_table(report)
    if report.not_run:
        yield Table("Not run", ("what", "reason"), tuple(_split_reason(str(one), one.reason) for one in report.not_run))


def _split_reason(text: str, reason: str) -> tuple[str, str]:
    return text.removesuffix(reason).rstrip(": "), reason


def _attention_table(report: BenchReport, label: str, runtime: str) -> Iterator[Table]:
    """A row per pattern: times of the variants, ratios, and how much of the machine the windows reach."""
    variants = [v for v in report.names("variant") if _any(report, label, v, runtime)]
    if not variants:
        return
    baselines = [v for v in variants if v != OURS]
    rows = []
    for case in report.cases(label, "attention"):
        found = {v: report.find(label, "attention", case, v, runtime) for v in variants}
        ours = found.get(OURS)
        shown = next(one for one in (ours, *found.values(), None) if one is not None or case == TOTAL)
        layers = "" if shown is None else str(shown.layers)
        row = [case, layers, *("-" if one is None else milliseconds(one) for one in found.values())]
        row += ["-" if ours is None else _ratio(report, ours, v) for v in baselines]
        row += _rates(report, ours)
        rows.append(tuple(row))
    columns = (
        "pattern",
        "layers",
        *(f"{v} (ms)" for v in variants),
        *(f"over {v}" for v in baselines),
        "MACs",
        "GFLOP/s",
        "of full's",
        "of peak",
    )
    yield Table(f"Attention, {label}, {runtime}: one call each; {TOTAL} together", columns, tuple(rows))


def _any(report: BenchReport, label: str, variant: str, runtime: str) -> bool:
    wanted = (label, "attention", variant, runtime)
    return any((m.label, m.subject, m.variant, m.runtime) == wanted for m in report.measurements)


def _model_table(report: BenchReport, label: str) -> Table:
    rows = []
    for one in report.measurements:
        if (one.label, one.subject) != (label, "model"):
            continue
        ours = report.find(label, "model", one.case, OURS, one.runtime)
        over = "-" if ours is None or one.variant == OURS else _ratio(report, ours, one.variant)
        memory = next(
            (
                p.memory
                for p in report.processes
                if (p.label, p.subject, p.variant, p.runtime) == (label, "model", one.variant, one.runtime)
            ),
            None,
        )
        rows.append(
            (
                one.runtime,
                one.variant,
                milliseconds(one),
                over,
                count(one.macs),
                f"{one.flops_per_s / 1e9:,.0f}",
                _share(report.share_of_peak(one)),
                "-" if memory is None else _bytes(memory.device_bytes or memory.peak_bytes),
                "-" if memory is None else _bytes(memory.growth_bytes),
            )
        )
    columns = (
        "runtime",
        "variant",
        "one forward pass (ms)",
        "gain of windows",
        "MACs",
        "GFLOP/s",
        "of peak",
        "peak memory",
        "beyond weights",
    )
    return Table(f"Whole model, {label}", columns, tuple(rows))


def _process_table(report: BenchReport) -> Table:
    rows = [
        (
            p.label,
            p.subject,
            p.runtime,
            p.variant,
            p.engine,
            _bytes(p.memory.peak_bytes),
            _bytes(p.memory.baseline_bytes),
            _bytes(p.memory.growth_bytes),
            "; ".join(p.paths) or "-",
        )
        for p in report.processes
    ]
    columns = ("size", "what", "runtime", "variant", "engine", "peak", "before calls", "calls add", "paths of the op")
    return Table("Processes: resident memory", columns, tuple(rows))


def _difference_table(report: BenchReport) -> Table:
    """The worst case of every variant and runtime."""
    worst: dict[tuple[str, ...], Difference] = {}
    for one in report.differences:
        key = (one.label, one.subject, one.variant, one.runtime)
        kept = worst.get(key)
        if kept is None or (one.passed, -one.error) < (kept.passed, -kept.error):
            worst[key] = one
    rows = tuple(
        (
            one.label,
            one.subject,
            one.runtime,
            one.variant,
            f"{one.error:.3g}",
            f"{one.magnitude:.3g}",
            "another function"
            if one.allowed is None
            else f"{'same' if one.passed else 'NOT'} within {one.allowed:.2g}",
        )
        for one in worst.values()
    )
    columns = ("size", "what", "runtime", "variant", "largest difference", "magnitude", "function")
    return Table("Outputs beside the rewritten program's", columns, rows)


def milliseconds(one: Measurement) -> str:
    """Median and quartiles."""
    spread = one.spread
    digits = 1 if spread.median >= 0.1 else 3
    middle, low, high = (f"{1e3 * s:,.{digits}f}" for s in (spread.median, spread.lower, spread.upper))
    return f"{middle} ({low}-{high})"


def _ratio(report: BenchReport, ours: Measurement, variant: str) -> str:
    """The median of the rounds' ratios with their quartiles, and that of the medians where it differs."""
    ratio = report.ratio(ours, variant)
    if ratio is None:
        return "-"
    pairs = ratio.pairs
    text = f"{pairs.median:.2f}x ({pairs.lower:.2f}-{pairs.upper:.2f})"
    medians = f"{ratio.of_medians:.2f}x"
    return text if text.startswith(medians) else f"{text}, medians {medians}"


def _rates(report: BenchReport, ours: Measurement | None) -> list[str]:
    if ours is None:
        return ["-"] * 4
    shares = (report.share_of_full(ours), report.share_of_peak(ours))
    return [count(ours.macs), f"{ours.flops_per_s / 1e9:,.0f}", *map(_share, shares)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else size_bytes(value)


def caption(report: BenchReport) -> Sequence[str]:
    """What was measured on, when, with what: lines for a plot and for markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    peaks = "; ".join(f"{p.flops_per_s / 1e9:,.0f} GFLOP/s in {p.dtype} (n = {p.size})" for p in report.peaks)
    return (
        f"{report.machine}; {report.date}",
        versions,
        f"matrix-product peak {peaks}",
        f"median (quartiles) of {report.repeats} paired rounds after {report.warmup} warm-up calls",
        f"$ {report.command}" if report.command else "",
    )
