"""The command line: a thin shell over the public functions. Results go to stdout, messages to stderr.

Exit codes: 0 done; 1 a check failed; 2 bad input; 3 done, but attention that might be windowed was left full.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from t3compile.errors import PlanError, T3CompileError

if TYPE_CHECKING:
    from t3compile.inputs import VideoSize
    from t3compile.plan import Plan
    from t3compile.probing import ProbeReport
    from t3compile.program import Program
    from t3compile.sites import SiteSurvey

CHECK_FAILED = 1
BAD_INPUT = 2
LEFT_FULL = 3

Command = TypeVar("Command", bound=Callable[..., Any])


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model_options = _options(
    click.argument("model"),
    click.option("--trust-pickle", is_flag=True, help="Unpickle MODEL: it can run code."),
    click.option("--inputs", type=click.Path(path_type=Path), help="Example inputs: .pt, .npz or .safetensors."),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Safetensors files for a diffusers folder, in its own or the original naming.",
    ),
    click.option("--random-weights", is_flag=True, help="Seeded random weights for a diffusers folder."),
    click.option("--seed", type=int, default=0, help="Seed of --random-weights."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype to trace in."),
    click.option("--frames", type=int, help="Video size in pixels, for diffusers folders."),
    click.option("--height", type=int),
    click.option("--width", type=int),
    click.option("--text-tokens", type=int),
    click.option("--batch", type=int),
    click.option("--vae-factors", metavar="TxHxW", help="How much the VAE shrinks frames, height, width."),
)
_grid_option = click.option("--grid", metavar="TxHxW", help="Token grid, where the graph does not tell it.")
_plan_options = _options(
    click.option(
        "--schedule",
        default="auto",
        show_default=True,
        help="auto, t3-wan2.1-4k, t3-wan2.2-4k, or splits n_t,n_h,n_w joined by '/'; TxHxW=SCHEDULE;TxHxW=SCHEDULE "
        "for a model of several grids.",
    ),
    click.option("--min-tokens", type=click.IntRange(min=0), help="Under auto, shorter sequences stay full."),
)
_probe_option = click.option(
    "--probe",
    is_flag=True,
    help="Check token layouts by experiment: change single patches of the inputs and see which tokens move.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _shielded(command: Command) -> Command:
    """Errors of the user are one line and exit code 2; a stopped run cleans up and says so."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _stop)
        try:
            return command(*args, **kwargs)
        except T3CompileError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(BAD_INPUT)
        except KeyboardInterrupt:
            click.echo("stopped; nothing unfinished was left behind", err=True)
            sys.exit(130)

    return run  # type: ignore[return-value]


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="t3compile")
def main() -> None:
    """Rewrite the full attention of a trained video DiT into T3 window attention.

    MODEL is a torch.export .pt2, a diffusers folder, a pickled .pt (with --trust-pickle), or package.module:factory.
    """


def _video_size(options: dict[str, Any]) -> VideoSize | None:
    names = ("frames", "height", "width", "text_tokens", "batch")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    factors = options.pop("vae_factors")
    if not given and factors is None:
        return None
    from t3compile.geometry import TokenGrid
    from t3compile.inputs import VideoSize

    if factors is not None:
        given["vae_factors"] = TokenGrid.parse(factors).sizes
    return VideoSize(**given)


def _load(options: dict[str, Any]) -> Program:
    """The program that the model options describe; takes them out of ``options``."""
    from t3compile.pipeline import load_program
    from t3compile.report import progress, say

    size = _video_size(options)
    names = ("trust_pickle", "inputs", "random_weights", "seed", "dtype")
    chosen = {name: options.pop(name) for name in names}
    model, weights = options.pop("model"), options.pop("weights")
    with progress() as step:
        step(f"loading and tracing {model}")
        program = load_program(model, weights=weights or None, size=size, **chosen)
    if program.traced_by:
        say(f"traced by {program.traced_by}")
    for note in program.notes:
        say(f"note: {note}")
    return program


def _make_plan(survey: SiteSurvey, schedule: str, min_tokens: int | None) -> Plan:
    from t3compile.plan import MIN_TOKENS, make_plan, parse_schedule

    minimum = MIN_TOKENS if min_tokens is None else min_tokens
    return make_plan(survey, parse_schedule(schedule), min_tokens=minimum)


def _read_plan(path: Path) -> Plan:
    from t3compile.plan import Plan

    try:
        return Plan.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan '{path}': {error}") from None


def _survey_and_plan(
    program: Program, grid: str | None, schedule: str, min_tokens: int | None, plan_file: Path | None
) -> tuple[SiteSurvey, Plan]:
    """What was found, and the plan of the file or of the schedule."""
    from t3compile.pipeline import detect, detect_for

    if plan_file is None:
        survey = detect(program, grid)
        return survey, _make_plan(survey, schedule, min_tokens)
    chosen = _read_plan(plan_file)
    if grid is None:
        return detect_for(program, chosen), chosen
    survey = detect(program, grid)
    chosen.check_against(survey)
    return survey, chosen


def _say_assumptions_and_limits(survey: SiteSurvey, plan: Plan) -> None:
    from t3compile.plan import plan_warnings
    from t3compile.report import SMALL_GAIN_TOKENS, T3_WARNING, say

    for assumption in survey.assumptions:
        say(f"assumed: {assumption}")
    for warning in plan_warnings(survey, plan):
        say(f"warning: {warning}")
    tokens = max((site.tokens for site in survey.found), default=0)
    windowed = [site for site in plan.rewritten if site.pattern is not None and not site.pattern.is_full()]
    if windowed and tokens < SMALL_GAIN_TOKENS:
        say(f"note: with {tokens} tokens the linear layers dominate; gains grow beyond {SMALL_GAIN_TOKENS}")
    if windowed:
        say(f"warning: {T3_WARNING}")


def _say_what_is_left(survey: SiteSurvey, plan: Plan) -> int:
    """List candidates that stay full, and the exit code that says so."""
    from t3compile.report import say

    left = [f"{call.node}: {call.reason}, {call.detail}" for call in survey.declined if call.is_candidate]
    left += [f"{site.node}: {site.reason or 'full by the plan'}" for site in plan.left_full]
    for line in left:
        say(f"left full: {line}")
    if not plan.rewritten:
        say("no attention call was rewritten")
    return LEFT_FULL if left or not plan.rewritten else 0


def _probe(program: Program, survey: SiteSurvey, *, quiet: bool) -> ProbeReport:
    """Probe the found sites and show the result; exit with 1 where a layout is contradicted."""
    from t3compile.probing import probe
    from t3compile.report import progress, say, show_probe

    with progress() as step:
        report = probe(program, survey, progress=step)
    if not quiet:
        show_probe(report)
    for site in report.having("inconclusive"):
        say(f"layout not proved: {site.node}: {site.detail}")
    for site in report.having("contradicted"):
        say(f"layout contradicted: {site.node}: {site.detail}")
    if not report.passed:
        say("nothing was written: detection is wrong about this model; name the grid with --grid, or report it")
        sys.exit(CHECK_FAILED)
    return report


@main.command()
@_model_options
@_grid_option
@_plan_options
@_probe_option
@_json_option
@_shielded
def inspect(
    grid: str | None, schedule: str, min_tokens: int | None, probe: bool, as_json: bool, **options: Any
) -> None:
    """Show attention sites, the grid, the plan, MACs and memory before and after."""
    from t3compile.cost import plan_cost
    from t3compile.report import show_cost, show_json, show_plan, show_survey

    program = _load(options)
    survey, plan = _survey_and_plan(program, grid, schedule, min_tokens, None)
    probed = _probe(program, survey, quiet=as_json) if probe else None
    costs = plan_cost(survey, plan)
    if as_json:
        traced = {"by": program.traced_by, "notes": list(program.notes)}
        parts = {"survey": survey.to_json(), "plan": plan.to_json(), "cost": costs.to_json()}
        show_json({"traced": traced, **parts, **({} if probed is None else {"probe": probed.to_json()})})
    else:
        show_survey(survey)
        show_plan(survey, plan)
        show_cost(costs)
    _say_assumptions_and_limits(survey, plan)


@main.command()
@_model_options
@_grid_option
@_plan_options
@_probe_option
@_json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@_shielded
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
    program = _load(options)
    survey, made = _survey_and_plan(program, grid, schedule, min_tokens, None)
    if probe:
        _probe(program, survey, quiet=as_json)
    if output is not None:
        write_text(output, made.dumps())
        say(f"wrote {output}")
    if as_json:
        show_json(made.to_json())
    else:
        show_plan(survey, made)
    _say_assumptions_and_limits(survey, made)
    sys.exit(_say_what_is_left(survey, made))


@main.command()
@_model_options
@_grid_option
@_plan_options
@_json_option
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file instead of --schedule.")
@_shielded
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

    survey, chosen = _survey_and_plan(_load(options), grid, schedule, min_tokens, plan_file)
    costs = plan_cost(survey, chosen)
    if as_json:
        show_json(costs.to_json())
        return
    show_site_costs(costs)
    show_cost(costs)


@main.command()
@_model_options
@_grid_option
@_plan_options
@_probe_option
@_json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .pt2 to write.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file instead of --schedule.")
@click.option("--portable", is_flag=True, help="Write plain aten: the file loads with torch alone.")
@click.option("--verify/--no-verify", "do_verify", default=True, show_default=True, help="Prove the result.")
@_shielded
def rewrite(
    grid: str | None,
    schedule: str,
    min_tokens: int | None,
    probe: bool,
    as_json: bool,
    output: Path,
    plan_file: Path | None,
    portable: bool,
    do_verify: bool,
    **options: Any,
) -> None:
    """Rewrite MODEL's full attention into window attention and write a .pt2."""
    from t3compile.cost import plan_cost
    from t3compile.files import check_writable
    from t3compile.pipeline import rewrite as rewrite_program
    from t3compile.pipeline import verify as verify_programs
    from t3compile.report import progress, say, show_json, show_plan, show_verification

    check_writable(output)
    program = _load(options)
    survey, chosen = _survey_and_plan(program, grid, schedule, min_tokens, plan_file)
    probed = _probe(program, survey, quiet=as_json) if probe else None
    rewritten = rewrite_program(program, chosen, portable=portable)
    report = None
    if do_verify and chosen.rewritten:
        with progress() as step:
            report = verify_programs(program, rewritten, chosen, progress=step)
    if report is None or report.passed:
        with progress() as step:
            step(f"writing {output}")
            rewritten.save(output)
        say(f"wrote {output}")
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
    _say_assumptions_and_limits(survey, chosen)
    left = _say_what_is_left(survey, chosen)
    sys.exit(CHECK_FAILED if report is not None and not report.passed else left)


def _say_not_run(report: Any) -> None:
    from t3compile.report import say

    for reason in report.not_run if report is not None else ():
        say(f"not run: {reason}")


@main.command()
@_model_options
@click.argument("rewritten", type=click.Path(path_type=Path))
@_probe_option
@_json_option
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="The plan, if REWRITTEN carries none.")
@_shielded
def verify(rewritten: Path, probe: bool, as_json: bool, plan_file: Path | None, **options: Any) -> None:
    """Prove that the .pt2 REWRITTEN is MODEL under its plan. Exits with 1 when a check fails."""
    from t3compile.pipeline import load_program
    from t3compile.pipeline import verify as verify_programs
    from t3compile.report import progress, show_json, show_verification

    program = _load(options)
    result = load_program(rewritten)
    if plan_file is not None:
        chosen = _read_plan(plan_file)
    elif result.plan is not None:
        chosen = result.plan
    else:
        raise PlanError(f"'{rewritten}' carries no plan: give the one it was made with as --plan FILE")
    with progress() as step:
        report = verify_programs(program, result, chosen, probe=probe, progress=step)
    if as_json:
        show_json(report.to_json())
    else:
        show_verification(report)
    _say_not_run(report)
    sys.exit(0 if report.passed else CHECK_FAILED)


@main.command()
@_model_options
@_json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .onnx to write.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16"]),
    help="Dtype of weights and matrix products; default: as traced.",
)
@click.option(
    "--attention",
    "form",
    type=click.Choice(["attention", "matmul", "onnxruntime"]),
    default="attention",
    show_default=True,
    help="Attention inside functions: opset-23 Attention, MatMul-Softmax, or onnxruntime's MultiHeadAttention.",
)
@click.option("--inline", is_flag=True, help="Write function bodies in place.")
@click.option("--check/--no-check", default=None, help="Compare with torch in onnxruntime; default: unless too large.")
@_shielded
def export(
    as_json: bool, output: Path, precision: Any, form: Any, inline: bool, check: bool | None, **options: Any
) -> None:
    """Write MODEL, usually a rewritten .pt2, as ONNX (opset 23), weights as external data."""
    from t3compile.files import check_writable
    from t3compile.pipeline import export_onnx_report
    from t3compile.report import progress, say, show_json, show_table

    check_writable(output)
    program = _load(options)
    with progress() as step:
        report = export_onnx_report(
            program, output, precision=precision, form=form, inline=inline, check=check, progress=step
        )
    if program.plan is None:
        say("note: this model is not rewritten; its attention stays full")
    compared = report.comparison
    if as_json:
        show_json(report.to_json())
    else:
        rows = [("file", report.path), ("functions", ", ".join(report.functions) or "none")]
        for one in compared or ():
            result = "ok" if one.passed else "FAILED"
            text = f"error {one.error:.3g} against float64, allowed {one.allowed:.3g}: {result}"
            rows.append((f"{one.name} in onnxruntime", text))
        show_table("Export", ("what", "value"), rows)
    for note in report.notes:
        say(f"warning: {note}")
    if compared is None:
        say(f"not compared with torch: {report.not_compared}")
    sys.exit(0 if report.passed else CHECK_FAILED)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--inputs", type=click.Path(path_type=Path), required=True, help="Inputs by name: .npz, .pt or .safetensors."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs as .npz.")
@click.option("--runtime", type=click.Choice(["auto", "onnxruntime", "torch"]), default="auto", show_default=True)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Timed calls; the median is printed."
)
@_json_option
@_shielded
def run(engine: Path, inputs: Path, output: Path | None, runtime: str, repeat: int, as_json: bool) -> None:
    """Run an exported file (.onnx or .pt2) on inputs; prints shapes, time and peak memory."""
    from t3compile.export.measure import run_timed
    from t3compile.files import check_writable, staged_outputs
    from t3compile.inputs import read_inputs
    from t3compile.pipeline import load_engine
    from t3compile.report import say, show_json, show_table, size_bytes

    if output is not None:
        check_writable(output)
    named = read_inputs(inputs)
    result = run_timed(load_engine(engine, runtime), named, repeat)
    if output is not None:
        with staged_outputs(output) as stage:
            result.save(stage / output.name)
        say(f"wrote {output}")
    if as_json:
        show_json(result.to_json())
        return
    rows = [(name, str(shape), dtype) for name, shape, dtype in result.outputs]
    show_table("Outputs", ("name", "shape", "dtype"), rows)
    say(f"median {result.median_s:.3f} s over {repeat} calls, peak memory {size_bytes(result.peak_bytes)}")


if __name__ == "__main__":
    main()
