"""bench: a rewritten model beside full attention and the paper's formulation, measured in one run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t3compile.benchmark.names import RUNTIMES, SUBJECTS, VARIANTS
from t3compile.cli.options import (
    CHECK_FAILED,
    grid_option,
    json_option,
    model_options,
    plan_option,
    plan_options,
    refuse_options,
    shielded,
)
from t3compile.cli.steps import load_rewritten
from t3compile.errors import InputsError

if TYPE_CHECKING:
    from t3compile.benchmark.bench_report import BenchReport
    from t3compile.benchmark.cases import Workload

# The rewritten program itself is always measured.
_AGAINST = tuple(name for name in VARIANTS if name != "windows")


def _choices(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback that reads names joined by commas, all of them known."""

    def read(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"'{name}' is none of {', '.join(known)}; join several by commas")
        return names

    return read


@click.command()
@model_options
@grid_option
@plan_options
@json_option
@plan_option
@click.option(
    "--against",
    default="full,paper",
    show_default=True,
    metavar="NAMES",
    callback=_choices(_AGAINST),
    help="What to compare with: full attention, the paper's own formulation (two branches, each regrouped and "
    "attended to by itself, summed), regrouped (the op as torch's calls: what its GPU kernel replaces).",
)
@click.option(
    "--runtime",
    "runtimes",
    default="torch,ort",
    show_default=True,
    metavar="NAMES",
    callback=_choices(RUNTIMES),
    help="torch (eager), compile (torch.compile), ort (onnxruntime), aoti (AOTInductor), trt (TensorRT).",
)
@click.option(
    "--sizes",
    metavar="SIZES",
    help="Video sizes, for diffusers folders and presets: 480p:25,720p:25 or 25x480x832 (frames, height, width).",
)
@click.option(
    "--what",
    "subjects",
    default="attention,model",
    show_default=True,
    metavar="NAMES",
    callback=_choices(SUBJECTS),
    help="attention: every pattern by itself, and all layers together; model: whole forward passes.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds: all in turns.")
@click.option("--warmup", type=click.IntRange(min=1), default=1, show_default=True, help="Calls before times count.")
@click.option("--heads", type=click.IntRange(min=1), help="Attention heads, for presets.")
@click.option(
    "--keep",
    type=click.Choice(["windows", "splits"]),
    help="What presets keep at another size: the extent of their windows (the default), or their splits, and so each "
    "pattern's share of the work.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the times as PNG (needs t3compile[plot]).")
@click.option("--markdown", is_flag=True, help="Print the tables as markdown.")
@shielded
def bench(
    as_json: bool,
    against: Any,
    runtimes: Any,
    subjects: Any,
    device: Any,
    repeats: int,
    warmup: int,
    output: Path | None,
    plot: Path | None,
    markdown: bool,
    **options: Any,
) -> None:
    """Measure MODEL rewritten beside full attention and the paper's formulation: same weights, same inputs, one run.

    MODEL is also a rewritten .pt2, or a preset's name (t3-wan2.1-4k, t3-wan2.2-4k): then one cycle of its attention,
    at its own grid or scaled to --sizes. Every variant runs in a process of its own, and they are timed in turns.
    Outputs are compared on the way. Exits with 1 when variants that are one function differ, or a process fails.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other: leave one out")
    from t3compile.benchmark.run_benchmark import BenchSettings
    from t3compile.benchmark.run_benchmark import bench as measure
    from t3compile.files import check_writable, write_text
    from t3compile.report import progress, say

    if output is not None:
        check_writable(output)
    if plot is not None:
        from t3compile.benchmark.plot import check_plot

        check_plot(plot)
    settings = BenchSettings(against, runtimes, subjects, device, repeats, warmup)
    # All are loaded first: what is wrong with the last is told before hours of measuring.
    workloads = list(_workloads(options))
    command = shlex.join(["t3compile", *_typed()])
    with progress() as step:
        report = measure(workloads, settings, command=command, progress=step)
    if output is not None:
        write_text(output, _dumps(report))
        say(f"wrote {output}")
    if plot is not None:
        from t3compile.benchmark.plot import write_plot

        write_plot(report, plot)
        say(f"wrote {plot}")
    _show(report, as_json=as_json, markdown=markdown)
    sys.exit(0 if report.passed else CHECK_FAILED)


def _typed() -> list[str]:
    """The arguments of this process; those of a call from Python are not known."""
    return sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]


def _workloads(options: dict[str, Any]) -> Iterator[Workload]:
    """What is measured, one size after the other."""
    from t3compile.benchmark.sizes import parse_sizes
    from t3compile.presets import PRESETS

    sizes_text = options.pop("sizes")
    heads, keep = options.pop("heads"), options.pop("keep")
    sizes = parse_sizes(sizes_text) if sizes_text is not None else ()
    preset = {one.name: one for one in PRESETS}.get(options["model"])
    if preset is not None:
        from t3compile.benchmark.preset_workload import preset_workload

        refuse_options(set(options) - {"model", "dtype", "batch"}, f"'{options['model']}' is no model to load")
        dtype, batch = options["dtype"] or "float32", options["batch"] or 1
        for size in sizes or (None,):
            yield preset_workload(preset, size, dtype=dtype, batch=batch, heads=heads, keep=keep or "windows")
        return
    if heads is not None:
        raise click.UsageError("--heads is for presets: a model has its own")
    if keep is not None:
        raise click.UsageError("--keep is for presets: a model's splits are those of its schedule")
    if not sizes:
        yield _workload("as given", options)
        return
    from t3compile.loading.recognize import recognize

    if recognize(options["model"]).kind != "diffusers":
        raise InputsError(f"'{options['model']}' has the one size that it was traced at: leave out --sizes")
    given = [name for name in ("frames", "height", "width", "inputs") if options[name] is not None]
    if given:
        raise click.UsageError(f"--sizes says frames, height and width: leave out --{', --'.join(given)}")
    for size in sizes:
        chosen = {"frames": size.frames, "height": size.height, "width": size.width}
        yield _workload(size.text, {**options, **chosen})


def _workload(label: str, options: dict[str, Any]) -> Workload:
    from t3compile.benchmark.cases import Workload

    return Workload.of_model(label, *load_rewritten(dict(options)))


def _dumps(report: BenchReport) -> str:
    import json

    return json.dumps(report.to_json(), indent=2) + "\n"


def _show(report: BenchReport, *, as_json: bool, markdown: bool) -> None:
    from t3compile.benchmark.tables import bench_tables, caption
    from t3compile.report import say, show_json, show_table

    if as_json:
        show_json(report.to_json())
    elif markdown:
        click.echo(
            "\n\n".join(["  \n".join(filter(None, caption(report))), *(t.markdown() for t in bench_tables(report))])
        )
    else:
        for table in bench_tables(report):
            show_table(table.title, table.columns, table.rows)
        for line in filter(None, caption(report)):
            say(line)
    for note in report.notes:
        say(f"note: {note}")
    for one in report.not_run:
        say(f"not run: {one}")
    for difference in report.differences:
        if not difference.passed:
            say(
                f"error: {difference.label}, {difference.subject} {difference.case}: {difference.variant} in "
                f"{difference.runtime} is another function, largest difference {difference.error:.3g} at magnitude "
                f"{difference.magnitude:.3g}"
            )
