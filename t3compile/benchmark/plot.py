"""A report as a picture: times of the variants side by side, a panel per size and subject."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from t3compile.benchmark.bench_report import OURS, TOTAL, BenchReport, Measurement
from t3compile.benchmark.tables import caption
from t3compile.errors import MissingExtraError
from t3compile.files import check_writable, staged_outputs

_COLORS = {"windows": "#0072b2", "full": "#999999", "paper": "#d55e00", "regrouped": "#009e73"}
_PANEL_INCHES = (4.5, 3.8)
_WIDTH = 150


def check_plot(path: Path) -> None:
    """Raise, before any measuring, where the picture could not be written: OutputError, or MissingExtraError."""
    check_writable(path)
    _matplotlib()


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing a benchmark (--plot)") from None
    return figure


def write_plot(report: BenchReport, path: Path) -> Path:
    """Write a PNG: medians with quartiles, how many times as fast the windows are, and in the caption the machine."""
    figure_module = _matplotlib()
    groups = report.groups()
    lines = [part for line in caption(report) for part in textwrap.wrap(line, _WIDTH, break_long_words=False)]
    width = max(len(groups) * _PANEL_INCHES[0], 10.0)
    height = _PANEL_INCHES[1] + 0.18 * len(lines)
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(_PANEL_INCHES[1], 0.18 * len(lines)))
    axes = upper.subplots(1, len(groups), squeeze=False)[0]
    for axis, (label, subject) in zip(axes, groups, strict=True):
        _draw(axis, report, label, subject)
    handles, names = axes[0].get_legend_handles_labels()
    upper.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8, frameon=False)
    lower.text(0.01, 0.98, "\n".join(lines), fontsize=7, family="monospace", va="top")
    with staged_outputs(path) as stage:
        figure.savefig(stage / path.name, format="png", dpi=130)
    return path


def _draw(axis: Any, report: BenchReport, label: str, subject: str) -> None:
    case = TOTAL if subject == "attention" else "model"
    runtimes, variants = report.names("runtime"), report.names("variant")
    bar = 0.8 / len(variants)
    highest = 0.0
    for i, variant in enumerate(variants):
        found = [(x, report.find(label, subject, case, variant, runtime)) for x, runtime in enumerate(runtimes)]
        bars = [(x + (i - (len(variants) - 1) / 2) * bar, one) for x, one in found if one is not None]
        if not bars:
            continue
        medians = [one.spread.median for _, one in bars]
        around = [
            [one.spread.median - one.spread.lower for _, one in bars],
            [one.spread.upper - one.spread.median for _, one in bars],
        ]
        places = [x for x, _ in bars]
        highest = max(highest, *(one.spread.upper for _, one in bars), 0.0)
        axis.bar(places, medians, bar * 0.92, yerr=around, capsize=2, label=variant, color=_COLORS[variant])
        for place, one in bars:
            axis.annotate(
                _said(report, one), (place, one.spread.upper), ha="center", va="bottom", fontsize=7, xytext=(0, 3),
                textcoords="offset points",
            )  # fmt: skip
    axis.set_xticks(range(len(runtimes)), runtimes)
    axis.set_ylabel("seconds")
    axis.set_ylim(0, 1.12 * highest)
    axis.set_title(f"{'attention, all layers' if subject == 'attention' else 'one forward pass'}, {label}", fontsize=9)


def _said(report: BenchReport, one: Measurement) -> str:
    """How much slower than the windows a bar is."""
    ours = report.find(one.label, one.subject, one.case, OURS, one.runtime)
    ratio = None if ours is None or one.variant == OURS else report.ratio(ours, one.variant)
    return "" if ratio is None else f"{ratio.pairs.median:.2f}x"
