"""kernels: the window attention kernel compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t3compile.cli.options import grid_option, json_option, model_options, plan_options, refuse_options, shielded
from t3compile.cli.steps import PLANNING, load_rewritten

if TYPE_CHECKING:
    from t3compile.program import Program

_FILE_SUFFIXES = (".json", ".onnx")


@click.group()
def kernels() -> None:
    """Compile the window attention kernel ahead of time."""


@kernels.command()
@model_options
@grid_option
@plan_options
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="The plan of a model that is not rewritten.")
@click.option("--heads", type=click.IntRange(min=1), help="Attention heads, for presets and plans.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Head dim, for presets and plans.")
@click.option(
    "--arch",
    "architectures",
    type=click.IntRange(min=80),
    multiple=True,
    help="Compute capability to assemble for, such as 90; default: 80 86 89 90 100 120.",
)
@click.option("--assemble/--no-assemble", default=True, show_default=True, help="Run the gates that need ptxas.")
@shielded
def build(
    model: str,
    as_json: bool,
    output: Path,
    grid: str | None,
    schedule: str,
    min_tokens: int | None,
    plan_file: Path | None,
    heads: int | None,
    head_dim: int | None,
    architectures: tuple[int, ...],
    assemble: bool,
    **options: Any,
) -> None:
    """Compile the kernel to PTX for every pattern of MODEL; needs triton, no GPU.

    MODEL is also a preset's name (t3-wan2.1-4k, t3-wan2.2-4k), an exported .onnx, or a plan's .json (with --heads and
    --head-dim). Writes <entry>.ptx files and kernels.json.
    """
    from t3compile.export.kernel_set import check_folder
    from t3compile.kernels import build_kernels, check_source
    from t3compile.presets import PRESETS
    from t3compile.report import progress, say, show_json, show_kernels

    if architectures and not assemble:
        raise click.UsageError("--arch says what ptxas assembles for: leave it out with --no-assemble")
    check_folder(output)
    source: str | Program = model
    numbers = {"heads": heads, "head_dim": head_dim}
    if model in [preset.name for preset in PRESETS] or model.endswith(_FILE_SUFFIXES):
        own = options.keys() - {"dtype", "batch"}
        refuse_options(own | set(PLANNING), f"'{model}' is no model to load")
        numbers |= {"dtype": options["dtype"], "batch": options["batch"]}
    else:
        check_source(model)
        planned = {"grid": grid, "schedule": schedule, "min_tokens": min_tokens, "plan_file": plan_file}
        source, _ = load_rewritten({**options, **planned, "model": model})
    with progress() as step:
        built = build_kernels(
            source,
            output,
            **numbers,  # type: ignore[arg-type]
            architectures=architectures or None,
            assemble=assemble,
            progress=step,
        )
    if as_json:
        show_json(built.to_json())
    else:
        show_kernels(built)
    for note in built.source.notes:
        say(f"assumed: {note}")
    for launch, dropped in built.dropped:
        say(f"left out: {launch.args.pattern} {launch.branch}, {dropped}")
    if built.gates_not_run:
        say(f"warning: without ptxas these gates did not run: {', '.join(built.gates_not_run)}")
    say(f"wrote {output}: {len(built.tactics)} kernels")
