"""Verification passes a right rewrite and refuses every kind of wrong one; execute() runs a graph as torch does."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from t3compile.errors import PlanError
from t3compile.execute import execute
from t3compile.geometry import Splits, TokenGrid
from t3compile.inputs import named_inputs
from t3compile.loading import load_program
from t3compile.ops import WINDOW_ATTENTION
from t3compile.passes.find_attention import find_attention
from t3compile.pattern import WindowPattern
from t3compile.pipeline import detect, rewrite, verify
from t3compile.plan import Plan, SitePlan, make_plan
from t3compile.program import Program, copy_exported, trace
from t3compile.verification import (
    PATTERN_PAIRS,
    Check,
    VerifyReport,
    affordable,
    check_identity,
    check_pattern,
    derived_check,
    worst,
)
from t3compile.weights import TensorWeights
from tests.recorded import Recorded
from tests.tiny_models import HandWrittenDiT, tiny_wan

SPLITS = [(3, 1, 1), (1, 2, 2), (2, 1, 3)]


@dataclass(frozen=True)
class Case:
    program: Program
    plan: Plan
    rewritten: Program


def _case(program: Program, splits: list[tuple[int, int, int]]) -> Case:
    plan = make_plan(detect(program), splits)
    assert plan.rewritten
    return Case(program, plan, rewrite(program, plan))


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=3, grid=(3, 4, 6)).eval()
    return _case(trace(model, model.example_inputs()), SPLITS)


@pytest.fixture(scope="module")
def wan() -> Case:
    model, inputs = tiny_wan(2, (3, 5, 4))
    return _case(trace(model, (), inputs), [(3, 1, 1), (1, 2, 2)])


@pytest.fixture(scope="module")
def large_case() -> Case:
    model, inputs = tiny_wan(2, (4, 7, 10), heads=1)
    return _case(trace(model, (), inputs), [(4, 1, 1), (1, 3, 5)])


@pytest.fixture
def large(large_case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A model that counts as too large for dense references at its own grid."""
    monkeypatch.setattr("t3compile.pipeline.DIRECT_MACS", 0)
    monkeypatch.setattr("t3compile.pipeline.SAVED_DIRECT_MACS", 0)
    return large_case


def _kinds(report: VerifyReport) -> list[str]:
    return [check.kind for check in report.checks]


def _failed(report: VerifyReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


# --- right rewrites ------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True])
def test_a_right_rewrite_passes(case: Case, portable: bool) -> None:
    rewritten = rewrite(case.program, case.plan, portable=True) if portable else case.rewritten
    report = verify(case.program, rewritten, case.plan)
    assert report.passed
    sites = [] if portable else ["site"] * 3
    assert _kinds(report) == ["identity", *sites, "model", "graph", "weights", *["pattern"] * 3]
    assert report.not_run == ()
    assert report.grid == "3x4x6"


def test_allowed_errors_are_small(case: Case, wan: Case) -> None:
    """A tolerance that proves something: float32 rounding, not a per cent of the output."""
    for checked in (case, wan):
        report = verify(checked.program, checked.rewritten, checked.plan)
        assert report.passed
        for check in report.checks:
            assert check.magnitude > 0.1
            assert check.allowed < 1e-4 * check.magnitude
        assert report.checks[0].kind == "identity"
        assert report.checks[0].allowed == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_pass_with_their_own_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=2, grid=(3, 4, 6)).eval().to(dtype)
    inputs = tuple(x.to(dtype) for x in model.example_inputs())
    checked = _case(trace(model, inputs), SPLITS[:2])
    report = verify(checked.program, checked.rewritten, checked.plan)
    assert report.passed, report
    for check in report.checks:
        assert check.allowed <= 60 * torch.finfo(dtype).eps * check.magnitude


def test_a_large_grid_is_checked_small_and_pattern_by_pattern(large: Case) -> None:
    seen = Recorded()
    report = verify(large.program, large.rewritten, large.plan, thorough=True, progress=seen)
    assert report.passed
    assert _kinds(report) == ["identity", "site", "site", "model", "graph", "weights", "pattern", "pattern"]
    assert report.not_run == ()
    assert report.grid == "3x6x7 (small grid for the model), 4x7x10 (patterns)"
    assert seen.steps[-1] == "pattern (1,3,5) on 4x7x10"


def test_what_is_too_large_on_a_small_grid_too_is_run_only_when_asked_for(
    large: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t3compile.pipeline.SMALL_GRID_MACS", 0)
    report = verify(large.program, large.rewritten, large.plan)
    assert _kinds(report) == ["graph", "weights", "pattern", "pattern"]
    (reason,) = report.not_run
    assert "verify --thorough" in reason
    assert "model" in _kinds(verify(large.program, large.rewritten, large.plan, thorough=True))


def test_a_saved_graph_that_is_too_large_says_what_was_not_run(large: Case, tmp_path: Path) -> None:
    program = load_program(large.program.save(tmp_path / "large.pt2"))
    report = verify(program, rewrite(program, large.plan), large.plan)
    assert report.passed
    assert _kinds(report) == ["graph", "weights", "pattern", "pattern"]
    (reason,) = report.not_run
    assert reason.startswith("whole-model checks: a saved graph has one size")
    assert report.to_json()["not_run"] == [reason]


# --- sabotage ------------------------------------------------------------------------------------


def _with_calls_changed(program: Program, change: Callable[[int, list[Any]], None]) -> Program:
    """The rewritten program with the arguments of its window attention calls changed; the plan says the old ones."""
    graph_module = copy.deepcopy(program.exported.graph_module)
    calls = [node for node in graph_module.graph.nodes if node.target is WINDOW_ATTENTION]
    for number, node in enumerate(calls):
        args = list(node.args)
        change(number, args)
        node.args = tuple(args)
    graph_module.recompile()
    return program.with_graph(graph_module)


GRID, SPLITS_ARG, BRANCHES, SCALE = 3, 4, 5, 8


def _swap_layers(number: int, args: list[Any]) -> None:
    args[SPLITS_ARG] = [[1, 2, 2], [3, 1, 1], [2, 1, 3]][number]


def _drop_dilated(number: int, args: list[Any]) -> None:
    args[BRANCHES] = "local"


def _drop_local(number: int, args: list[Any]) -> None:
    args[BRANCHES] = "dilated"


def _wrong_splits(number: int, args: list[Any]) -> None:
    if number == 2:
        args[SPLITS_ARG] = [2, 1, 2]


def _full(number: int, args: list[Any]) -> None:
    if number == 1:
        args[SPLITS_ARG] = [1, 1, 1]


def _transposed_grid(number: int, args: list[Any]) -> None:
    if number == 1:
        args[GRID] = [3, 6, 4]


def _swap_k_and_v(number: int, args: list[Any]) -> None:
    if number == 0:
        args[1], args[2] = args[2], args[1]


@pytest.mark.parametrize(
    ("sabotage", "sites"),
    [
        (_swap_layers, {0, 1}),
        # The first pattern's branches coincide: either alone is right there.
        (_drop_dilated, {1, 2}),
        (_drop_local, {1, 2}),
        (_wrong_splits, {2}),
        (_full, {1}),
        (_transposed_grid, {1}),
    ],
)
def test_wrong_patterns_fail_at_their_sites(case: Case, sabotage: Any, sites: set[int]) -> None:
    report = verify(case.program, _with_calls_changed(case.rewritten, sabotage), case.plan)
    assert not report.passed
    failed = _failed(report)
    names = [site.node for site in case.plan.rewritten]
    assert {names.index(name) for name in failed if name in names} == sites
    assert "output 0" in failed


def _wrong_scale(number: int, args: list[Any]) -> None:
    if number == 1:
        args += [0, 0, None][len(args) - 6 :]
        args[SCALE] = 0.3


@pytest.mark.parametrize("sabotage", [_wrong_scale, _swap_k_and_v])
def test_a_wrong_call_fails_the_model_check(case: Case, sabotage: Any) -> None:
    """The call itself is what its arguments say; only the original tells that these are wrong."""
    report = verify(case.program, _with_calls_changed(case.rewritten, sabotage), case.plan)
    assert not report.passed
    assert "output 0" in _failed(report)


def test_a_portable_program_of_another_plan_fails(case: Case) -> None:
    other = make_plan(detect(case.program), list(reversed(SPLITS)))
    report = verify(case.program, rewrite(case.program, other, portable=True), case.plan)
    assert _failed(report) == ["output 0", "rewritten graph against the plan"]


def _with_weight(program: Program, name: str, change: Callable[[Tensor], Tensor]) -> Program:
    tensors = {n: program.weights.load(n) for n in program.weights.names()}
    tensors[name] = change(tensors[name].detach().clone())
    return replace(program, weights=TensorWeights(tensors))


def test_a_changed_weight_fails(case: Case) -> None:
    def nudge(weight: Tensor) -> Tensor:
        weight.view(-1)[0] += 1e-2
        return weight

    report = verify(case.program, _with_weight(case.rewritten, "blocks.1.out.weight", nudge), case.plan)
    assert _failed(report) == ["output 0", "weights and constants against the original's"]


def test_nan_fails(case: Case) -> None:
    broken = _with_weight(case.rewritten, "unpatchify.bias", lambda weight: weight * float("nan"))
    report = verify(case.program, broken, case.plan)
    assert not report.passed
    assert "output 0" in _failed(report)


def test_nan_on_both_sides_fails(case: Case) -> None:
    """NaN equals nothing: a model that yields none proves nothing."""

    def broken(program: Program) -> Program:
        return _with_weight(program, "unpatchify.bias", lambda weight: weight * float("nan"))

    assert not verify(broken(case.program), broken(case.rewritten), case.plan).passed


def _swap_two(number: int, args: list[Any]) -> None:
    args[SPLITS_ARG] = [[1, 3, 5], [4, 1, 1]][number]


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_large_program_with_wrong_patterns_fails(large: Case, is_saved: bool, tmp_path: Path) -> None:
    """The small grid's rewrite is made anew: the given one must be looked at too."""
    program = load_program(large.program.save(tmp_path / "large.pt2")) if is_saved else large.program
    rewritten = _with_calls_changed(rewrite(program, large.plan), _swap_two)
    assert _failed(verify(program, rewritten, large.plan)) == ["rewritten graph against the plan"]


def test_a_large_portable_program_passes_and_one_of_another_plan_fails(large: Case, tmp_path: Path) -> None:
    saved = load_program(rewrite(large.program, large.plan, portable=True).save(tmp_path / "portable.pt2"))
    assert verify(large.program, saved, large.plan).passed
    other = make_plan(detect(large.program), [(1, 3, 5), (4, 1, 1)])
    wrong = rewrite(large.program, other, portable=True)
    assert _failed(verify(large.program, wrong, large.plan)) == ["rewritten graph against the plan"]


def test_a_large_rewritten_file_passes(large: Case, tmp_path: Path) -> None:
    saved = load_program(large.rewritten.save(tmp_path / "windows.pt2"))
    assert verify(large.program, saved, large.plan).passed


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_a_large_program_with_a_changed_weight_fails(large: Case, value: float) -> None:
    changed = _with_weight(large.rewritten, "proj_out.weight", lambda weight: weight * value)
    assert _failed(verify(large.program, changed, large.plan)) == ["weights and constants against the original's"]


def test_the_identity_check_catches_any_changed_bit(case: Case) -> None:
    inputs = named_inputs(case.program)
    identity = rewrite(case.program, case.plan.with_pattern(WindowPattern(Splits(1, 1, 1))))
    right = check_identity(case.program, identity, inputs)
    assert right.passed
    assert right.error == 0.0

    def nudge(weight: Tensor) -> Tensor:
        return torch.nextafter(weight, torch.tensor(9.0))

    wrong = check_identity(case.program, _with_weight(identity, "unpatchify.bias", nudge), inputs)
    assert 0 < wrong.error < 1e-5
    assert not wrong.passed


def test_another_number_of_calls_is_refused(case: Case) -> None:
    fewer = replace(case.plan, sites=(*case.plan.sites[:2], replace(case.plan.sites[2], pattern=None)))
    with pytest.raises(PlanError, match="has 3 window attention calls, the plan 2 sites"):
        verify(case.program, case.rewritten, fewer)


def test_nan_in_any_output_is_the_worst_error() -> None:
    assert worst() == 0.0
    assert worst(0.0, 2.0, 1.0) == 2.0
    assert math.isnan(worst(0.0, float("nan"), 1.0))


def test_the_identity_check_sees_nan_in_a_second_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * self.scale

    program = trace(Two(), (torch.ones(2),))
    broken = _with_weight(program, "scale", lambda weight: weight * float("nan"))
    assert check_identity(program, program, named_inputs(program)).passed
    assert not check_identity(program, broken, named_inputs(program)).passed


def test_nothing_checked_is_not_passed() -> None:
    assert not VerifyReport("no grid", ()).passed
    assert not Check("site", "x", float("nan"), 1.0, 1.0).passed
    assert not Check("site", "x", 1.0, float("nan"), 1.0).passed


def test_check_pattern_sees_a_broken_op(large: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    site = large.plan.rewritten[1]
    assert check_pattern(site).passed

    def local_only(q: Tensor, k: Tensor, v: Tensor, grid: Any, splits: Any, branches: str, *rest: Any) -> Tensor:
        out: Tensor = WINDOW_ATTENTION(q, k, v, grid, splits, "local", *rest)
        return out

    monkeypatch.setattr("t3compile.verification.WINDOW_ATTENTION", local_only)
    assert not check_pattern(site).passed


def test_a_pattern_too_large_for_its_grid_is_shortened_where_it_does_not_split() -> None:
    frames = SitePlan("a", TokenGrid(21, 136, 240), 0, 5, WindowPattern(Splits(21, 1, 1)))
    short = affordable(frames)
    assert short.grid == TokenGrid(21, 88, 156)
    assert short.grid.tokens * 88 * 156 <= PATTERN_PAIRS
    assert (short.suffix, short.pattern) == (5, frames.pattern)
    uneven = SitePlan("b", TokenGrid(7, 9, 40), 0, 0, WindowPattern(Splits(1, 4, 7)))
    assert affordable(uneven, 10).grid == TokenGrid(7, 9, 40)  # a window of one token's length proves little
    assert affordable(replace(uneven, grid=TokenGrid(30, 9, 40)), 10).grid == TokenGrid(8, 9, 40)
    every_axis = replace(uneven, pattern=WindowPattern(Splits(2, 2, 2)))
    assert affordable(every_axis, 10) is every_axis


def test_a_shortened_grid_is_named_beside_the_real_one() -> None:
    site = SitePlan("a", TokenGrid(3, 24, 20), 2, 0, WindowPattern(Splits(3, 1, 1)))
    short = affordable(site, 10**5)
    assert short.grid == TokenGrid(3, 14, 12)
    check = check_pattern(short, real_grid=site.grid)
    assert check.passed
    assert check.name == "(3,1,1) on 3x14x12 (shortened from 3x24x20 where it does not split)"


def test_verify_shortens_unless_it_shall_be_thorough(large: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t3compile.pipeline.PATTERN_PAIRS", 10)

    def shortened(**options: Any) -> list[str]:
        report = verify(large.program, large.rewritten, large.plan, **options)
        assert report.passed
        return [check.name for check in report.checks if "shortened" in check.name]

    assert shortened()
    assert not shortened(thorough=True)


# --- execute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["program", "rewritten"])
def test_execute_is_the_module_bit_for_bit(case: Case, wan: Case, which: str) -> None:
    for made in (case, wan):
        program: Program = getattr(made, which)
        args, kwargs = program.example_inputs
        with torch.no_grad():
            expected = program.module()(*args, **kwargs)
        expected = expected[0] if isinstance(expected, tuple) else getattr(expected, "sample", expected)
        (out,) = execute(program, named_inputs(program))
        assert torch.equal(out, expected)


def test_float64_mode_is_really_float64(case: Case) -> None:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=3, grid=(3, 4, 6)).eval()
    x, t, text = model.example_inputs()
    tables = model.rope_cos.clone(), model.rope_sin.clone()
    model.double()
    model.rope_cos, model.rope_sin = (table.double() for table in tables)
    # Whole numbers times a Python float become the default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            expected = model(x.double(), t.double(), text.double())
    finally:
        torch.set_default_dtype(torch.float32)
    seen: list[torch.dtype] = []

    def watch(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.extend(x.dtype for x in args[:3])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    hooks = {site.node: watch for site in case.plan.rewritten}
    (out,) = execute(case.program, named_inputs(case.program), hooks=hooks, float64=True)
    assert out.dtype == torch.float64
    assert seen == [torch.float64] * 9
    assert torch.get_default_dtype() == torch.float32
    single = float((execute(case.program, named_inputs(case.program))[0].double() - expected).abs().max())
    assert float((out - expected).abs().max()) < single / 1e6


def test_float64_widens_casts_in_the_graph() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.bfloat16) * 3).float() + torch.ones(2, dtype=torch.float16)

    x = torch.tensor([1 / 3, 1 / 7])
    (out,) = execute(trace(Casts(), (x,)), {"x": x}, float64=True)
    assert torch.equal(out, x.double() * 3 + 1)


@dataclass(frozen=True)
class CountingWeights:
    """Counts loads and how many loaded tensors are alive at once."""

    tensors: dict[str, Tensor]
    loads: list[str] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    most: list[int] = field(default_factory=lambda: [0])

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def load(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach().clone()
        number = len(self.loads)
        self.loads.append(name)
        self.alive.add(number)
        weakref.finalize(tensor.untyped_storage(), self.alive.discard, number)
        self.most[0] = max(self.most[0], len(self.alive))
        return tensor


@pytest.mark.parametrize("float64", [False, True])
def test_weights_are_read_one_call_at_a_time(case: Case, float64: bool) -> None:
    program = case.rewritten
    weights = CountingWeights({name: program.weights.load(name) for name in program.weights.names()})
    gc.collect()
    (out,) = execute(replace(program, weights=weights), named_inputs(program), float64=float64)
    (expected,) = execute(program, named_inputs(program), float64=float64)
    assert torch.equal(out, expected)
    assert set(weights.loads) == set(weights.names())
    assert len(weights.loads) > 30
    # A linear layer reads two; views of a weight may live until their use.
    assert weights.most[0] <= 6
    assert not weights.alive


def test_hooks_replace_calls_and_get_their_arguments(case: Case) -> None:
    got = []

    def zero(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        got.append((node.name, tuple(args[0].shape)))
        return torch.zeros_like(args[0])

    names = [site.node for site in case.plan.rewritten]
    inputs = named_inputs(case.program)
    (out,) = execute(case.program, inputs, hooks=dict.fromkeys(names, zero))
    assert got == [(name, (1, 2, 72, 12)) for name in names]
    assert not torch.equal(out, execute(case.program, inputs)[0])


# --- what only an attentive proof sees ------------------------------------------------------------


def test_inputs_of_zeros_do_not_hide_a_wrong_plan() -> None:
    model = HandWrittenDiT(layers=2, grid=(3, 4, 6)).eval()
    inputs = tuple(torch.zeros_like(x) for x in model.example_inputs())
    program = trace(model, inputs)
    survey = find_attention(program)
    made, claimed = (make_plan(survey, [splits]) for splits in ((1, 2, 2), (3, 2, 1)))
    report = verify(program, rewrite(program, made), claimed)
    assert _failed(report) == ["rewritten graph against the plan"]


def test_a_changed_constant_is_seen_on_a_large_model(large: Case) -> None:
    exported = large.rewritten.exported
    constants = {name: torch.zeros_like(value) for name, value in exported.constants.items()}
    assert constants
    changed = replace(large.rewritten, exported=copy_exported(exported, constants=constants))
    assert _failed(verify(large.program, changed, large.plan)) == ["weights and constants against the original's"]


def test_swapped_weights_are_seen_on_a_large_model(large: Case) -> None:
    signature = copy.deepcopy(large.rewritten.exported.graph_signature)
    first, second = (
        next(spec for spec in signature.input_specs if spec.target == f"blocks.{i}.attn1.to_q.weight") for i in (0, 1)
    )
    first.target, second.target = second.target, first.target
    changed = replace(large.rewritten, exported=copy_exported(large.rewritten.exported, signature=signature))
    assert "rewritten graph against the plan" in _failed(verify(large.program, changed, large.plan))


def test_whole_numbers_and_empty_outputs_are_compared() -> None:
    class WithIndices(HandWrittenDiT):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return out, out.argmax(1), out[:0]

    torch.manual_seed(0)
    model = WithIndices(layers=1, grid=(3, 4, 6)).eval()
    checked = _case(trace(model, model.example_inputs()), SPLITS[:1])
    report = verify(checked.program, checked.rewritten, checked.plan)
    assert report.passed
    outputs = [check for check in report.checks if check.kind == "model"]
    assert [check.error for check in outputs[1:]] == [0.0, 0.0]
    wrong = derived_check("model", "output", torch.tensor([1, 2]), [torch.tensor([1, 3])], torch.tensor([1, 3]))
    assert not wrong.passed
