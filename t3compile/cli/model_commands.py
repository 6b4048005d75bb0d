"""inspect, plan, cost, rewrite, verify: from a model file to a rewritten one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t3compile.cli.options import (
    CHECK_FAILED,
    grid_option,
    json_option,
    model_options,
    plan_option,
    plan_options,
    probe_option,
    shielded,
)
from t3compile.cli.steps import (
    Planning,
    load_model,
    probe_or_exit,
    say_assumptions_and_limits,
    say_what_is_left,
)
from t3compile.errors import OutputError, PlanError

if TYPE_CHECKING:
    from t3compile.program import Program


@click.command()
@model_options
@grid_option
@plan_options
@probe_option
@json_option
@shielded
def inspect(
    grid: str | None, schedule: str, min_tokens: int | None, probe: bool, as_json: bool, **options: Any
) -> None:
    """Show attention sites, the grid, the plan, MACs and memory before and after."""
    from t3compile.cost import plan_cost
    from t3compile.report import show_cost, show_json, show_plan, show_survey

    planning = Planning.read(grid, schedule, min_tokens)
    program = load_model(options)
    survey, plan = planning.survey_and_plan(program)
    probed = probe_or_exit(program, survey, quiet=as_json) if probe else None
    costs = plan_cost(survey, plan)
    if as_json:
        traced = {"by": program.traced_by, "notes": list(program.notes)}
        parts = {"survey": survey.to_json(), "plan": plan.to_json(), "cost": costs.to_json()}
        show_json({"traced": traced, **parts, **({} if probed is None else {"probe": probed.to_json()})})
    else:
        show_survey(survey)
        show_plan(survey, plan)
        show_cost(costs)
    say_assumptions_and_limits(survey, plan)


@click.command()
@model_options
@grid_option
@plan_options
@probe_option
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@shielded
def plan(
    grid: str | None,
    schedule: str,
    min_tokens: int | None,
    probe: bool,
    as_json: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Decide a pattern for every site and write it as JSON, to be edited and given to rewrite --plan."""
    from t3compile.files import check_writable, write_text
    from t3compile.report import say, show_json, show_plan

    if output is not None:
        check_writable(output)
    planning = Planning.read(grid, schedule, min_tokens)
    program = load_model(options)
    survey, made = planning.survey_and_plan(program)
    if probe:
        probe_or_exit(program, survey, quiet=as_json)
    if output is not None:
        write_text(output, made.dumps())
        say(f"wrote {output}")
    if as_json:
        show_json(made.to_json())
    else:
        show_plan(survey, made)
    say_assumptions_and_limits(survey, made)
    sys.exit(say_what_is_left(survey, made))


@click.command()
@model_options
@grid_option
@plan_options
@json_option
@plan_option
@shielded
def cost(
    grid: str | None,
    schedule: str,
    min_tokens: int | None,
    as_json: bool,
    plan_file: Path | None,
    **options: Any,
) -> None:
    """MACs and bytes of every site and of the whole model, dense and planned."""
    from t3compile.cost import plan_cost
    from t3compile.report import show_cost, show_json, show_site_costs

    planning = Planning.read(grid, schedule, min_tokens, plan_file)
    survey, chosen = planning.survey_and_plan(load_model(options))
    costs = plan_cost(survey, chosen)
    if as_json:
        show_json(costs.to_json())
        return
    show_site_costs(costs)
    show_cost(costs)


@click.command()
@model_options
@grid_option
@plan_options
@probe_option
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .pt2 to write.")
@plan_option
@click.option("--portable", is_flag=True, help="Write plain aten: the file loads with torch alone.")
@click.option(
    "--store-weights",
    type=click.Choice(["inside", "external"]),
    default="inside",
    show_default=True,
    help="external: the .pt2 refers to the safetensors files that MODEL's weights are in, and copies none of them.",
)
@click.option("--verify/--no-verify", "do_verify", default=True, show_default=True, help="Prove the result.")
@shielded
def rewrite(
    grid: str | None,
    schedule: str,
    min_tokens: int | None,
    probe: bool,
    as_json: bool,
    output: Path,
    plan_file: Path | None,
    portable: bool,
    store_weights: str,
    do_verify: bool,
    **options: Any,
) -> None:
    """Rewrite MODEL's full attention into window attention and write a .pt2."""
    from t3compile.cost import plan_cost
    from t3compile.files import check_writable
    from t3compile.pipeline import rewrite as rewrite_program
    from t3compile.pipeline import verify as verify_programs
    from t3compile.report import progress, say, show_json, show_plan, show_verification

    external = store_weights == "external"
    if portable and external:
        raise OutputError(
            "--portable and --store-weights external exclude each other: torch alone cannot follow references; leave "
            "one out"
        )
    check_writable(output)
    planning = Planning.read(grid, schedule, min_tokens, plan_file)
    program = load_model(options)
    program.check_savable(output, external=external)
    survey, chosen = planning.survey_and_plan(program)
    probed = probe_or_exit(program, survey, quiet=as_json) if probe else None
    rewritten = rewrite_program(program, chosen, portable=portable)
    report = None
    if do_verify and chosen.rewritten:
        with progress() as step:
            report = verify_programs(program, rewritten, chosen, progress=step)
    if report is None or report.passed:
        with progress() as step:
            rewritten.save(output, external=external, progress=step)
        say(f"wrote {output}")
        if external:
            _say_external(rewritten, output)
    else:
        say(f"{output} was not written: a check failed")
    result = {
        "plan": chosen.to_json(),
        "cost": plan_cost(survey, chosen).to_json(),
        "verification": None if report is None else report.to_json(),
    }
    if probed is not None:
        result["probe"] = probed.to_json()
    if as_json:
        show_json(result)
    else:
        show_plan(survey, chosen)
        if report is not None:
            show_verification(report)
    _say_not_run(report)
    say_assumptions_and_limits(survey, chosen)
    left = say_what_is_left(survey, chosen)
    sys.exit(CHECK_FAILED if report is not None and not report.passed else left)


def _say_external(program: Program, output: Path) -> None:
    """Which weights the .pt2 refers to, and how it finds them again."""
    from t3compile.report import say, size_bytes

    extents = program.external_weights()
    shared = sum(extent.nbytes for extent in extents.values())
    paths = {extent.file.path for extent in extents.values()}
    folders = sorted({str(path.parent) for path in paths})
    inside = size_bytes(program.weight_bytes - shared)
    say(f"{size_bytes(shared)} of weights stay in {', '.join(folders)}; {inside} are inside {output}")
    # A link in its folder to a file elsewhere, as caches of downloads are made of, is outside too.
    outside = sorted({str(path.parent) for path in paths if not path.resolve().is_relative_to(output.parent.resolve())})
    if outside:
        given = " ".join(f"--weights {folder}" for folder in outside)
        say(f"note: {output} reads files outside its own folder only where you name them: give {given} with it")


def _say_not_run(report: Any) -> None:
    from t3compile.report import say

    for reason in report.not_run if report is not None else ():
        say(f"not run: {reason}")


@click.command()
@model_options
@click.argument("rewritten", type=click.Path(path_type=Path))
@probe_option
@json_option
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="The plan, if REWRITTEN carries none.")
@click.option("--thorough", is_flag=True, help="Run the whole model however large it is.")
@shielded
def verify(rewritten: Path, probe: bool, as_json: bool, plan_file: Path | None, thorough: bool, **options: Any) -> None:
    """Prove that the .pt2 REWRITTEN is MODEL under its plan. Exits with 1 when a check fails."""
    from t3compile.loading.map_archive import refers_to_weights
    from t3compile.loading.recognize import recognize
    from t3compile.pipeline import load_program
    from t3compile.pipeline import verify as verify_programs
    from t3compile.plan import Plan
    from t3compile.report import progress, show_json, show_verification

    given = None if plan_file is None else Plan.read(plan_file)
    recognize(rewritten)
    program = load_model(options)
    # Naming MODEL names the folders of its weights.
    folders = {extent.file.path.parent for extent in program.external_weights().values()}
    result = load_program(rewritten, weights=sorted(folders) if folders and refers_to_weights(rewritten) else None)
    chosen = result.plan if given is None else given
    if chosen is None:
        raise PlanError(f"'{rewritten}' carries no plan: give the one it was made with as --plan FILE")
    with progress() as step:
        report = verify_programs(program, result, chosen, probe=probe, thorough=thorough, progress=step)
    if as_json:
        show_json(report.to_json())
    else:
        show_verification(report)
    _say_not_run(report)
    sys.exit(0 if report.passed else CHECK_FAILED)
