"""One zoo model through the whole line: eager, graph, sites, identity, windows, ONNX."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import t3compile
from t3compile.errors import T3CompileError, first_line
from t3compile.execute import execute
from t3compile.geometry import Splits, TokenGrid
from t3compile.inputs import named_inputs
from t3compile.pattern import WindowPattern
from t3compile.pipeline import export_onnx_report
from t3compile.plan import Plan
from t3compile.program import Program, default_dtype
from t3compile.sites import AttentionSite, SiteSurvey, reasons_count
from t3compile.verification import Check, check_identity, derived_check
from tests.zoo.entry import ZooEntry
from tests.zoo.window_reference import EagerCall, match_calls, run_windowed, window_masks

Status = Literal["ok", "failed", "not run", "none"]
STAGES = ("eager", "trace", "graph", "sites", "identity", "windows", "onnx")

# Cycled over the sites in graph order, so that neighbours differ; cut down to the grid where it is smaller.
SPLITS = ((3, 2, 2), (1, 4, 3))
# An effect of the windows must stand out from what rounding is allowed.
_EFFECT = 10.0


@dataclass(frozen=True)
class Stage:
    """One stage's result. ``none``: there is nothing to do, as it should be; ``not run``: an earlier stage failed."""

    status: Status
    phrase: str = ""
    error: float | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Row:
    """What one model gave; ``seconds`` and the stages' phrases and errors are for reading only."""

    name: str
    traced_by: str
    found: int
    expected: int
    grids: tuple[str, ...]
    declined: Mapping[str, int]
    stages: Mapping[str, Stage]
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class StageError(Exception):
    """A stage ran and its result is wrong; the message is the phrase."""


@dataclass
class _Run:
    """The stages' results so far, and what later stages need of earlier ones."""

    entry: ZooEntry
    stages: dict[str, Stage] = field(default_factory=dict)
    eager: _Eager | None = None
    program: Program | None = None
    survey: SiteSurvey | None = None
    rewritten: Program | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Any exception is that stage's failure."""
        try:
            yield
        except Exception as error:
            self.stages[name] = Stage("failed", _phrase(error))

    def passed(self, name: str, checks: Sequence[Check]) -> None:
        """Record the worst check; fail where one does."""
        shown = max(checks, key=lambda check: (not check.passed, check.error - check.allowed))
        phrase = "" if shown.passed else f"{shown.name} differs by {shown.error:.1e}, allowed {shown.allowed:.1e}"
        self.stages[name] = Stage("ok" if shown.passed else "failed", phrase, shown.error, shown.allowed)


def _phrase(error: Exception) -> str:
    text = first_line(error)
    if not isinstance(error, T3CompileError | StageError):
        text = f"{type(error).__name__}: {text}"
    root = _root_cause(error)
    if root is not error and first_line(root) not in text:
        text = f"{text} (because of {type(root).__name__}: {first_line(root)})"
    return re.sub(r"\x1b\[\d*m", "", re.sub(r"0x[0-9a-f]+", "0x...", text))[:300]


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def run_entry(entry: ZooEntry, *, onnx: bool = True) -> Row:
    """Run every stage that can run, ONNX only where asked for; nothing is raised."""
    began = time.perf_counter()
    run = _Run(entry)
    with run.stage("eager"):
        run.eager = _Eager.of(entry)
        run.stages["eager"] = Stage("ok")
    with run.stage("trace"):
        model, inputs = entry.make()
        run.program = t3compile.trace(model, kwargs=inputs)
        run.stages["trace"] = Stage("ok")
    if run.program is not None:
        if run.eager is not None:
            with run.stage("graph"):
                _compare_graph(run, run.program, run.eager)
        with run.stage("sites"):
            run.survey = t3compile.detect(run.program, entry.hint)
            _compare_sites(run, run.survey)
        if run.survey is not None:
            _check_rewriting(run, run.program, run.survey)
        if onnx:
            with run.stage("onnx"):
                _compare_onnx(run, run.rewritten or run.program)
    survey = run.survey
    return Row(
        name=entry.name,
        traced_by="" if run.program is None else run.program.traced_by,
        found=0 if survey is None else len(survey.found),
        expected=entry.grid_sites,
        grids=() if survey is None else tuple(map(str, survey.grids)),
        declined={} if survey is None else dict(sorted(reasons_count(survey.declined).items())),
        stages={name: run.stages.get(name, Stage("not run")) for name in STAGES},
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Eager:
    """The eager model's outputs in float32 and, where it runs there, in float64.

    ``noise`` are outputs that differ from the exact ones by rounding only: they say how much is allowed.
    """

    plain: list[Tensor]
    exact: list[Tensor]
    noise: list[list[Tensor]]
    calls: list[EagerCall]

    @classmethod
    def of(
        cls, entry: ZooEntry, windows: Mapping[int, Sequence[Tensor]] | None = None, *, modules: bool = False
    ) -> _Eager:
        windows = windows or {}

        def run(
            *changes: Callable[[Any], Any], dtype: torch.dtype = torch.float32, widest: torch.dtype = torch.float64
        ) -> tuple[list[Tensor], list[EagerCall]]:
            model, inputs = entry.make()
            for change in changes:
                inputs = change(inputs)
            with default_dtype(dtype):
                model = model.double() if dtype == torch.float64 else model
                output, calls = run_windowed(model, inputs, windows, widest=widest, modules=modules)
            return _tensors(output), calls

        plain, calls = run()
        noise = [plain]
        if windows:
            noise.append(run(widest=torch.float32)[0])
        try:
            exact, _ = run(_doubled, dtype=torch.float64)
            noise.append(run(_doubled, _moved, dtype=torch.float64)[0])
        except (RuntimeError, TypeError, ValueError):
            # Models that mix dtypes do not run in float64: the float32 result stands for the exact one.
            exact = plain
            noise.append(run(_moved)[0])
        if not all(value.isfinite().all() for value in exact if value.is_floating_point()):
            raise StageError("the eager output is not finite")
        return cls(plain, exact, noise, calls)

    def checks(self, ours: Sequence[Tensor]) -> list[Check]:
        if len(ours) != len(self.exact):
            raise StageError(f"{len(ours)} output tensors instead of {len(self.exact)}")
        return [
            derived_check("model", f"output {i}", value, [outputs[i] for outputs in self.noise], self.exact[i])
            for i, value in enumerate(ours)
        ]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _doubled(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.dtype == torch.float32 else x, inputs)


def _moved(inputs: Any) -> Any:
    """Floating inputs up or down by one rounding step of float32 at random; masks and positions stay whole numbers."""
    generator = torch.Generator().manual_seed(0)

    def move(x: Tensor) -> Tensor:
        if not x.is_floating_point() or torch.equal(x, x.round()):
            return x
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return x * (1 + torch.finfo(torch.float32).eps * signs.to(x.dtype))

    return pytree.tree_map_only(Tensor, move, inputs)


def _compare_graph(run: _Run, program: Program, eager: _Eager) -> None:
    run.passed("graph", eager.checks(execute(program, named_inputs(program))))


def _compare_sites(run: _Run, survey: SiteSurvey) -> None:
    expected = run.entry.grid_sites
    if len(survey.found) != expected:
        raise StageError(f"{len(survey.found)} of {expected} sites found{_why_declined(survey)}")
    expected_grids = {grid for grid in (run.entry.grid, *run.entry.more_grids) if grid is not None}
    if set(survey.grids) != expected_grids:
        raise StageError(f"grids {_in_words(survey.grids)} instead of {_in_words(expected_grids)}")
    run.stages["sites"] = Stage("ok")


def _in_words(grids: Iterable[TokenGrid]) -> str:
    return ", ".join(map(str, sorted(grids)))


def _why_declined(survey: SiteSurvey) -> str:
    """The first call that was declined, rather one that might have been a site."""
    first = min(survey.declined, key=lambda call: not call.is_candidate, default=None)
    return "" if first is None else f"; {first.reason}: {first.detail}"


def _check_rewriting(run: _Run, program: Program, survey: SiteSurvey) -> None:
    if not survey.found:
        # Nothing to rewrite: right where nothing is expected, else the stage before has failed already.
        status: Status = "none" if run.entry.grid_sites == 0 else "not run"
        run.stages["identity"] = run.stages["windows"] = Stage(status)
        return
    with run.stage("identity"):
        identity = t3compile.rewrite(program, t3compile.make_plan(survey, [(1, 1, 1)]))
        run.passed("identity", [check_identity(program, identity, named_inputs(program))])
    with run.stage("windows"):
        plan = real_plan(survey)
        run.rewritten = t3compile.rewrite(program, plan)
        if run.eager is None:
            raise StageError("there is no eager model to compare with")
        _compare_windows(run, program, survey, plan, run.eager)


def fitted_pattern(number: int, grid: TokenGrid) -> WindowPattern:
    """The pattern of the site with this number: local and dilated, no more windows than tokens along any axis."""
    counts = [min(count, length) for count, length in zip(SPLITS[number % len(SPLITS)], grid.sizes, strict=True)]
    return WindowPattern(Splits(*counts))


def real_plan(survey: SiteSurvey) -> Plan:
    """Every site windowed, neighbours by different splits."""
    plan = t3compile.make_plan(survey, [(1, 1, 1)])
    numbers = {site.node: number for number, site in enumerate(survey.found)}
    sites = tuple(replace(site, pattern=fitted_pattern(numbers[site.node], site.grid)) for site in plan.sites)
    return replace(plan, sites=sites)


def _compare_windows(run: _Run, program: Program, survey: SiteSurvey, plan: Plan, eager: _Eager) -> None:
    assert run.rewritten is not None
    places = {node.name: place for place, node in enumerate(program.graph.nodes)}
    found = {site.node: (_query_tokens(site), site.tokens) for site in survey.found}
    declined = {call.node: (call.query_tokens, call.key_tokens) for call in survey.declined}
    calls = dict(sorted((found | declined).items(), key=lambda item: places[item[0]]))
    matched = match_calls(eager.calls, list(calls.values()))
    modules = isinstance(matched, str) and hasattr(run.entry.make()[0], "attention_calls")
    if modules:
        matched = match_calls(_Eager.of(run.entry, modules=True).calls, list(calls.values()))
    if isinstance(matched, str):
        raise StageError(matched)
    number_of = dict(zip(calls, matched, strict=True))
    windows = {}
    for site in survey.found:
        planned = plan.site(site.node)
        assert planned is not None and planned.pattern is not None
        windows[number_of[site.node]] = window_masks(site, planned.pattern)
    reference = _Eager.of(run.entry, windows, modules=modules)
    checks = reference.checks(execute(run.rewritten, named_inputs(run.rewritten)))
    run.passed("windows", checks)
    effect = max(
        float((windowed.double() - full.double()).abs().max()) / (check.allowed or 1.0)
        for windowed, full, check in zip(reference.exact, eager.exact, checks, strict=True)
        if windowed.is_floating_point()
    )
    if effect < _EFFECT:
        raise StageError("the windows change nothing that rounding would not, so that nothing is compared")


def _query_tokens(site: AttentionSite) -> int:
    before = site.prefix if site.query_prefix is None else site.query_prefix
    after = site.suffix if site.query_suffix is None else site.query_suffix
    return before + site.grid.tokens + after


def _compare_onnx(run: _Run, program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = export_onnx_report(program, Path(folder) / "model.onnx", check=True)
    if not report.comparison:
        raise StageError(f"not compared: {report.not_compared}")
    run.passed("onnx", report.comparison)
