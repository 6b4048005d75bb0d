"""How results are shown: rich tables on a terminal, plain aligned text elsewhere, JSON on request."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from t3compile.cost import Cost
from t3compile.geometry import FRAME_MAJOR, TokenGrid
from t3compile.plan import Plan
from t3compile.progress import Advance, Measured, Progress, Unit
from t3compile.sites import AttentionSite, SiteSurvey

if TYPE_CHECKING:  # both import torch, and `doctor` must report where torch cannot be imported
    from t3compile.probing import ProbeReport
    from t3compile.verification import VerifyReport

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import Task

    from t3compile.export.kernel_set import KernelSet

T3_WARNING = (
    "T3 changes the function: without T3-trained weights or fine-tuning the video is noise. Published weights: "
    "Hugging Face APRIL-AIGC/T3-Video. Recipe of the paper (arXiv 2512.13492): full fine-tune of 5,000 steps at 720p "
    "(batch 64, lr 2e-5, 42k clips), then 500 steps or a rank-64 LoRA at 4K."
)
# Below this many tokens the linear layers dominate (specs of T3).
SMALL_GAIN_TOKENS = 30_000


def say(message: str) -> None:
    """A message for the user: stderr, so that stdout holds results alone."""
    print(message, file=sys.stderr)


def show_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn by rich on a terminal, aligned columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(str(x)) for x in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in [columns, *rows]:
        cells = (str(x).ljust(width) for x, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())


# Where there is no terminal, a log is not filled faster.
_LINES_EVERY_S = 10.0


class _Lines(Progress):
    """Steps and the outer two levels of phases as lines; within a long step, how far it is."""

    def __init__(self) -> None:
        self._measured: Measured | None = None
        self._phase = ""

    def __call__(self, step: str) -> None:
        left = "" if self._measured is None else left_text(self._measured)
        say(f"... {step}{left and f' ({left})'}")
        self._said = time.monotonic()

    @contextmanager
    def measure(self, total: float, unit: Unit) -> Iterator[Advance]:
        measured = self._measured = Measured(total)
        self._said = time.monotonic()

        def advance(amount: float) -> None:
            measured.advance(amount)
            if time.monotonic() - self._said >= _LINES_EVERY_S:
                say(f"... {done_text(measured, unit)}")
                self._said = time.monotonic()

        try:
            yield advance
        finally:
            self._measured = None

    def phase(self, name: str, depth: int, done: float) -> None:
        if depth < 2 and name != self._phase:
            self._phase = name
            say(f"... {name} ({done:.0%})")


class _Bar(Progress):
    """The step beside a bar, which shows how much of measured work or of a build's outermost phase is done."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, measured=None, unit="")
        self._is_measuring = False

    def __call__(self, step: str) -> None:
        self._bar.update(self._task, description=step)
        # A phase's fraction ends with its step, measured work goes on.
        if not self._is_measuring:
            self._forget_total()

    @contextmanager
    def measure(self, total: float, unit: Unit) -> Iterator[Advance]:
        measured = Measured(total)
        self._is_measuring = True
        self._bar.update(self._task, total=1.0, completed=0.0, measured=measured, unit=unit)

        def advance(amount: float) -> None:
            measured.advance(amount)
            self._bar.update(self._task, completed=measured.fraction)

        try:
            yield advance
        finally:
            self._is_measuring = False
            self._bar.update(self._task, measured=None)
            self._forget_total()

    def _forget_total(self) -> None:
        # rich takes None for no change.
        self._bar.tasks[0].total = None

    def phase(self, name: str, depth: int, done: float) -> None:
        self._bar.update(self._task, description=name, completed=done, total=1.0)


@contextmanager
def progress() -> Iterator[Progress]:
    """Shows steps and time left on stderr: a moving bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            measured = task.fields["measured"]
            return Text("" if measured is None else done_text(measured, task.fields["unit"]))

    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"), Left())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)


def done_text(measured: Measured, unit: Unit) -> str:
    """How much of measured work is done, and the time left once there is a rate."""
    text = f"{measured.fraction:.0%}"
    if unit == "bytes":
        text += f" of {size_bytes(measured.total)}"
    left = left_text(measured)
    return f"{text}, {left}" if left else text


def left_text(measured: Measured) -> str:
    """'about 1 min 20 s left'; empty while there is no rate."""
    left = measured.left_s()
    if left is None:
        return ""
    seconds = math.ceil(left)
    # As exact as a rate foretells.
    if seconds >= 120:
        seconds = 10 * math.ceil(seconds / 10)
    hours, minutes = divmod(seconds // 60, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else seconds % 60, "s")]
    return f"about {' '.join(f'{value} {name}' for value, name in parts if value) or '0 s'} left"


def count(value: float) -> str:
    """A count in T, G, M or as it is."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


def size_bytes(value: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


def show_survey(survey: SiteSurvey) -> None:
    """Found sites and declined calls; equal ones are shown as one row with their number."""
    rows = _grouped(
        [
            (
                site.stack or "-",
                _ordered(site.grid, site.order),
                str(site.tokens),
                _extra_text(site),
                f"{site.heads} x {site.head_dim}",
                site.dtype,
            )
            for site in survey.found
        ]
    )
    columns = ("calls", "module", "grid", "tokens", "prefix/suffix", "heads", "dtype")
    show_table(f"Found: {len(survey.found)} full self-attention calls over the grid", columns, rows)
    rows = _grouped([(call.module or call.node, call.reason, call.detail) for call in survey.declined])
    if rows:
        title = f"Left as they are: {len(survey.declined)} attention calls"
        show_table(title, ("calls", "module", "reason", "detail"), rows)


def _ordered(grid: TokenGrid, order: str) -> str:
    return str(grid) if order == FRAME_MAJOR else f"{grid} in order {order}"


def _extra_text(site: AttentionSite) -> str:
    """Prefix and suffix of the keys, and what is special about them."""
    text = f"{site.prefix}/{site.suffix}"
    if (site.query_prefix, site.query_suffix) != (site.prefix, site.suffix):
        text += f", queries {site.query_prefix}/{site.query_suffix}"
    return f"{text}, masked" if site.masked else text


def _grouped(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Equal rows as one, block numbers blanked, with their number in front."""
    counts: dict[tuple[str, ...], int] = {}
    for first, *rest in rows:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", first), *rest)
        counts[key] = counts.get(key, 0) + 1
    return [(str(number), *key) for key, number in counts.items()]


def show_plan(survey: SiteSurvey, plan: Plan) -> None:
    """The patterns of a plan, with windows per pattern."""
    rows: dict[tuple[str, ...], int] = {}
    for planned in plan.sites:
        if planned.pattern is None:
            key = (_ordered(planned.grid, planned.order), "full", "-", "-", planned.reason)
        else:
            pattern = planned.pattern
            branches = "+".join(pattern.computed_branches(planned.grid))
            window = f"{pattern.splits.largest_window(planned.grid)}"
            if not pattern.splits.divide(planned.grid):
                window += " at most"
            tokens = pattern.largest_window_tokens(planned.grid)
            key = (
                _ordered(planned.grid, planned.order),
                str(pattern),
                f"{window} = {tokens}",
                branches,
                planned.reason,
            )
        rows[key] = rows.get(key, 0) + 1
    show_table(
        f"Plan: schedule {plan.schedule}",
        ("sites", "grid", "splits", "window", "computed", "note"),
        [(str(number), *key) for key, number in rows.items()],
    )


def show_cost(costs: Cost) -> None:
    """Attention and whole-model MACs, dense and planned, and memory."""
    rows = [
        (
            "attention over the grid",
            count(costs.dense_attention_macs),
            count(costs.planned_attention_macs),
            f"{costs.attention_factor:.1f}x",
        ),
        (
            "  as the paper counts",
            count(costs.dense_attention_macs),
            count(costs.paper_attention_macs),
            f"{costs.paper_factor:.1f}x",
        ),
        ("other attention", count(costs.declined_macs), count(costs.declined_macs), "1.0x"),
        ("linear and convolution", count(costs.other_macs), count(costs.other_macs), "1.0x"),
        ("whole model", count(costs.dense_macs), count(costs.planned_macs), f"{costs.model_factor:.2f}x"),
    ]
    show_table("MACs of one forward pass", ("part", "full", "planned", "gain"), rows)
    dense_scores = max((site.dense_score_bytes for site in costs.sites), default=0)
    planned_scores = max((site.planned_score_bytes for site in costs.sites), default=0)
    show_table(
        "Memory",
        ("what", "full", "planned"),
        [
            ("weights", size_bytes(costs.weight_bytes), size_bytes(costs.weight_bytes)),
            (
                "activations at their peak, without scores",
                size_bytes(costs.peak_activation_bytes),
                size_bytes(costs.peak_activation_bytes),
            ),
            (
                "scores of the largest call, if a runtime holds them",
                size_bytes(dense_scores),
                size_bytes(planned_scores),
            ),
        ],
    )


def show_site_costs(costs: Cost) -> None:
    """MACs of every site."""
    rows = [
        (
            site.node,
            site.pattern,
            count(site.dense_macs),
            count(site.planned_macs),
            size_bytes(site.dense_score_bytes),
            size_bytes(site.planned_score_bytes),
        )
        for site in costs.sites
    ]
    columns = ("site", "pattern", "full MACs", "planned MACs", "full scores", "planned scores")
    show_table("Sites", columns, rows)


def show_verification(report: VerifyReport) -> None:
    rows = [
        (
            check.kind,
            check.name,
            f"{check.error:.3g}",
            f"{check.allowed:.3g}",
            f"{check.magnitude:.3g}",
            "ok" if check.passed else "FAILED",
        )
        for check in report.checks
    ]
    columns = ("check", "what", "error", "allowed", "magnitude", "result")
    show_table(f"Verification on grid {report.grid}", columns, rows)


def show_probe(report: ProbeReport) -> None:
    """What probing says of every site; equal results are shown as one row with their number."""
    rows: dict[tuple[str, ...], int] = {}
    for site in report.sites:
        key = (site.stack or "-", str(site.grid), site.verdict, site.detail)
        rows[key] = rows.get(key, 0) + 1 + len(site.stands_for)
    show_table(
        f"Token layouts by experiment: {len(report.sites)} sites probed",
        ("sites", "module", "grid", "layout", "detail"),
        [(str(number), *key) for key, number in rows.items()],
    )


def show_kernels(built: KernelSet) -> None:
    """Every kernel with its cost: shared memory of a block, registers of a thread over all architectures."""
    rows = []
    for tactic in built.tactics:
        kernel, registers = tactic.kernel, [one.registers for one in tactic.assemblies]
        spilled = sum(one.spill_store_bytes + one.spill_load_bytes for one in tactic.assemblies)
        launch, tile = kernel.launch, kernel.tile
        rows.append(
            (
                f"{launch.args.pattern} on {launch.args.grid}",
                f"{launch.branch}, mean" if launch.averages else launch.branch,
                f"{tile.block_m}x{tile.block_n}, {tile.warps} warps, {tile.stages} stages",
                f"{kernel.grid_x:,} x {kernel.block_x}",
                f"{kernel.shared_bytes:,}",
                f"{min(registers)}-{max(registers)}" if registers else "not assembled",
                str(spilled) if registers else "not assembled",
            )
        )
    columns = ("pattern", "branch", "tile", "blocks x threads", "shared bytes", "registers", "spilled bytes")
    show_table(f"Kernels of {built.source.name}", columns, rows)
