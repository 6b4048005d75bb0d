"""Stages as several commands go through them: load, plan, say what was assumed and what is left."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t3compile.cli.options import CHECK_FAILED, LEFT_FULL, refuse_options

if TYPE_CHECKING:
    from t3compile.geometry import GridHint
    from t3compile.inputs import VideoSize
    from t3compile.plan import Plan, ScheduleChoice
    from t3compile.probing import ProbeReport
    from t3compile.program import Program
    from t3compile.sites import SiteSurvey

# The parameters of Planning.read, as the commands name them.
PLANNING = ("grid", "schedule", "min_tokens", "plan_file")


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


def load_model(options: dict[str, Any]) -> Program:
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


@dataclass(frozen=True)
class Planning:
    """What the planning options ask for, read before a model is loaded: a mistake in them costs no tracing.

    ``schedule`` and ``min_tokens`` count only where there is no ``plan``.
    """

    grid: GridHint | None
    schedule: ScheduleChoice
    min_tokens: int
    plan: Plan | None

    @classmethod
    def read(cls, grid: str | None, schedule: str, min_tokens: int | None, plan_file: Path | None = None) -> Planning:
        """The options as typed; GridError, PatternError or PlanError for what is malformed or cannot be read.

        UsageError for a schedule beside a plan, which has the patterns already.
        """
        from t3compile.geometry import GridHint
        from t3compile.plan import MIN_TOKENS, Plan, parse_schedule

        if plan_file is not None:
            refuse_options(("schedule", "min_tokens"), f"'{plan_file}' is a plan and has the patterns")
        return cls(
            None if grid is None else GridHint.parse(grid),
            parse_schedule(schedule),
            MIN_TOKENS if min_tokens is None else min_tokens,
            None if plan_file is None else Plan.read(plan_file),
        )

    def survey_and_plan(self, program: Program) -> tuple[SiteSurvey, Plan]:
        """What is found in a program, and the plan of the file or of the schedule.

        GridError or PatternError where the options do not fit the model, PlanError for a plan of another graph.
        """
        from t3compile.pipeline import detect, detect_for
        from t3compile.plan import make_plan

        if self.plan is None:
            survey = detect(program, self.grid)
            return survey, make_plan(survey, self.schedule, min_tokens=self.min_tokens)
        if self.grid is None:
            return detect_for(program, self.plan), self.plan
        survey = detect(program, self.grid)
        self.plan.check_against(survey)
        return survey, self.plan


def load_rewritten(options: dict[str, Any]) -> tuple[Program, Program | None]:
    """The model with its plan carried out, and the model as it was; None where the file is rewritten already.

    ``options`` are the model options and those of PLANNING, which a rewritten file has no use for: UsageError.
    """
    from t3compile.pipeline import rewrite

    planning = Planning.read(**{name: options.pop(name) for name in PLANNING})
    program = load_model(options)
    if program.plan is not None:
        refuse_options(PLANNING, f"'{program.source}' is rewritten and has its plan")
        return program, None
    survey, plan = planning.survey_and_plan(program)
    say_what_is_left(survey, plan)
    return rewrite(program, plan), program


def say_assumptions_and_limits(survey: SiteSurvey, plan: Plan) -> None:
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


def say_what_is_left(survey: SiteSurvey, plan: Plan) -> int:
    """List candidates that stay full, and the exit code that says so."""
    from t3compile.report import say

    left = [f"{call.node}: {call.reason}, {call.detail}" for call in survey.declined if call.is_candidate]
    left += [f"{site.node}: {site.reason or 'full by the plan'}" for site in plan.left_full]
    for line in left:
        say(f"left full: {line}")
    if not plan.rewritten:
        say("no attention call was rewritten")
    return LEFT_FULL if left or not plan.rewritten else 0


def probe_or_exit(program: Program, survey: SiteSurvey, *, quiet: bool) -> ProbeReport:
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
