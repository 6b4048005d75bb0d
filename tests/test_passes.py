"""Editing passes: what they write, where they must not fire, and that a second run changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

import t3compile
from t3compile.errors import ExportError, PlanError, RewriteError
from t3compile.geometry import Splits, TokenGrid
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.passes.broadcast_masks import BroadcastMasks
from t3compile.passes.canonicalization import CANONICALIZATION
from t3compile.passes.forward_copies import ForwardCopies
from t3compile.passes.graph_pass import GraphPass, apply_passes, remove_unused
from t3compile.passes.interleave_slices import InterleaveSlices
from t3compile.passes.lower_window_attention import LowerWindowAttention
from t3compile.passes.mix_precision import MixPrecision
from t3compile.passes.rewrite_attention import RewriteAttention
from t3compile.pattern import WindowPattern
from t3compile.pipeline import ONNX_LEGALIZATION
from t3compile.plan import Plan
from t3compile.program import Program, copy_graph_module, trace
from t3compile.sites import AttentionSite, ModelCounts, SiteSurvey
from t3compile.verification import check_pattern, check_rewritten
from tests.tiny_models import HandWrittenDiT, tiny_wan

aten = torch.ops.aten
SPLITS = [(3, 1, 1), (1, 2, 3), (2, 2, 2)]


def count(program: Program, *packets: Any) -> int:
    return sum(getattr(node.target, "overloadpacket", None) in packets for node in program.graph.nodes)


def run(program: Program, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = program.module()(*inputs)
    return out


def assert_idempotent(made: GraphPass, program: Program) -> Program:
    """The pass fires, leaves the given program as it was, and does nothing on its own result."""
    before, text = program.fingerprint(), str(program.graph)
    first = made(program)
    assert first.modified
    assert (program.fingerprint(), str(program.graph)) == (before, text)
    second = made(first.program)
    assert not second.modified
    assert second.program is first.program
    return first.program


def assert_does_not_fire(made: GraphPass, program: Program) -> None:
    result = made(program)
    assert not result.modified
    assert result.program is program


@pytest.fixture(scope="module")
def model() -> HandWrittenDiT:
    torch.manual_seed(0)
    return HandWrittenDiT(layers=3).eval()


@pytest.fixture(scope="module")
def program(model: HandWrittenDiT) -> Program:
    return trace(model, model.example_inputs())


@pytest.fixture(scope="module")
def plan(program: Program) -> Plan:
    return t3compile.make_plan(t3compile.detect(program), SPLITS)


@pytest.fixture(scope="module")
def rewritten(program: Program, plan: Plan) -> Program:
    return t3compile.rewrite(program, plan)


class OneAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patchify = nn.Conv3d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.patchify(x).flatten(2).transpose(1, 2).unsqueeze(1)
        return scaled_dot_product_attention(q, q, q, scale=0.5)


GOLDEN_BEFORE = """\
graph():
    %p_patchify_weight : [num_users=1] = placeholder[target=p_patchify_weight]
    %p_patchify_bias : [num_users=1] = placeholder[target=p_patchify_bias]
    %x : [num_users=1] = placeholder[target=x]
    %conv3d : [num_users=1] = call_function[target=torch.ops.aten.conv3d.default]\
(args = (%x, %p_patchify_weight, %p_patchify_bias), kwargs = {})
    %view : [num_users=1] = call_function[target=torch.ops.aten.view.default]\
(args = (%conv3d, [1, 4, 24]), kwargs = {})
    %transpose : [num_users=1] = call_function[target=torch.ops.aten.transpose.int]\
(args = (%view, 1, 2), kwargs = {})
    %unsqueeze : [num_users=1] = call_function[target=torch.ops.aten.unsqueeze.default]\
(args = (%transpose, 1), kwargs = {})
"""
GOLDEN_FULL = """\
    %scaled_dot_product_attention : [num_users=1] = \
call_function[target=torch.ops.aten.scaled_dot_product_attention.default]\
(args = (%unsqueeze, %unsqueeze, %unsqueeze), kwargs = {scale: 0.5})
    return (scaled_dot_product_attention,)"""
GOLDEN_WINDOWS = """\
    %window_attention_default : [num_users=1] = call_function[target=torch.ops.t3.window_attention.default]\
(args = (%unsqueeze, %unsqueeze, %unsqueeze, [2, 3, 4], [1, 3, 2], local+dilated, 0, 0, 0.5), kwargs = {})
    return (window_attention_default,)"""


def test_rewrite_golden_graph() -> None:
    program = trace(OneAttention(), (torch.randn(1, 1, 2, 3, 4),))
    assert str(program.graph).strip() == GOLDEN_BEFORE + GOLDEN_FULL
    plan = t3compile.make_plan(t3compile.detect(program), [(1, 3, 2)])
    assert str(t3compile.rewrite(program, plan).graph).strip() == GOLDEN_BEFORE + GOLDEN_WINDOWS


def test_rewrite_replaces_the_planned_calls_and_no_other(program: Program, rewritten: Program) -> None:
    assert count(program, aten.scaled_dot_product_attention) == 6
    assert count(rewritten, aten.scaled_dot_product_attention) == 3
    assert count(rewritten, WINDOW_ATTENTION.overloadpacket) == 3
    written = [node.args[3:5] for node in rewritten.graph.nodes if node.target is WINDOW_ATTENTION]
    assert written == [([3, 4, 4], list(splits)) for splits in SPLITS]


def test_rewrite_is_idempotent_and_leaves_the_original(program: Program, plan: Plan) -> None:
    result = assert_idempotent(RewriteAttention(plan), program)
    assert program.plan is None
    assert result.plan == plan


def test_rewrite_shares_the_weights_and_keeps_the_signature(
    model: HandWrittenDiT, program: Program, rewritten: Program
) -> None:
    original = dict(model.named_parameters())
    written = rewritten.load_weights()
    assert {name: x.data_ptr() for name, x in written.items()} == {n: x.data_ptr() for n, x in original.items()}
    for attribute in ("user_inputs", "user_outputs", "parameters", "buffers"):
        before = getattr(program.exported.graph_signature, attribute)
        after = getattr(rewritten.exported.graph_signature, attribute)
        assert len(before) == len(after)
        if attribute != "user_outputs":
            assert before == after
    assert program.exported.call_spec == rewritten.exported.call_spec
    assert run(rewritten, *model.example_inputs()).shape == model.example_inputs()[0].shape


def test_rewrite_with_one_window_is_the_original_bit_for_bit(
    model: HandWrittenDiT, program: Program, plan: Plan
) -> None:
    identity = t3compile.rewrite(program, plan.with_pattern(WindowPattern(Splits(1, 1, 1))))
    assert count(identity, WINDOW_ATTENTION.overloadpacket) == 3
    with torch.no_grad():
        assert torch.equal(run(identity, *model.example_inputs()), model(*model.example_inputs()))


def test_rewrite_changes_the_function(model: HandWrittenDiT, rewritten: Program) -> None:
    inputs = model.example_inputs()
    with torch.no_grad():
        assert not torch.allclose(run(rewritten, *inputs), model(*inputs), atol=1e-4)


def test_rewrite_leaves_sites_full_that_the_plan_leaves_full(program: Program, plan: Plan) -> None:
    first, *others = plan.sites
    partly = replace(plan, sites=(replace(first, pattern=None, reason="by hand"), *others))
    result = t3compile.rewrite(program, partly)
    assert count(result, WINDOW_ATTENTION.overloadpacket) == 2
    assert first.node in {node.name for node in result.graph.nodes}
    nothing = replace(plan, sites=tuple(replace(site, pattern=None) for site in plan.sites))
    assert_does_not_fire(RewriteAttention(nothing), program)


def test_rewrite_refuses_what_the_plan_was_not_made_for(program: Program, plan: Plan, rewritten: Program) -> None:
    other = HandWrittenDiT(layers=2).eval()
    with pytest.raises(PlanError, match=f"made for another graph .fingerprint {plan.fingerprint[:12]}, this graph has"):
        t3compile.rewrite(trace(other, other.example_inputs()), plan)
    with pytest.raises(PlanError, match="rewritten already, with another plan"):
        t3compile.rewrite(rewritten, plan.with_pattern(WindowPattern(Splits(1, 1, 2))))
    first, *others = plan.sites
    with pytest.raises(PlanError, match="names 'linear', which is no attention call"):
        t3compile.rewrite(program, replace(plan, sites=(replace(first, node="linear"), *others)))
    longer = replace(first, grid=TokenGrid(3, 4, 5), prefix=1)
    with pytest.raises(PlanError, match="grid 3x4x5, prefix 1 and suffix 0 make 61 tokens, but the sequence has 48"):
        t3compile.rewrite(program, replace(plan, sites=(longer, *others)))


class StreamAttention(nn.Module):
    """Grid queries on [text, grid] keys under a key-padding mask that is expanded to all queries."""

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        video = x.flatten(2).transpose(1, 2).unsqueeze(1)
        keys = torch.cat([text.unsqueeze(1), video], dim=2)
        visible = mask[:, None, None, :].expand(-1, 1, video.shape[2], -1)
        return scaled_dot_product_attention(video, keys, keys, attn_mask=visible)


STREAM_SITE = AttentionSite(
    "scaled_dot_product_attention", "", "", 0, TokenGrid(3, 4, 2), 3, 0, 2, 1, 4, 4, "float32", None, 0, 0, "wth", True
)


def stream_case() -> tuple[Program, Plan, tuple[Tensor, ...]]:
    """A masked site with a query stream whose tokens run over width, frames, height."""
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    inputs = (torch.randn(2, 4, 2, 3, 4), torch.randn(2, 3, 4), torch.cat([mask, torch.ones(2, 24) > 0], dim=1))
    program = trace(StreamAttention(), inputs)
    survey = SiteSurvey(program.fingerprint(), (STREAM_SITE,), (), ModelCounts(0, 0, 0, 0, 0))
    return program, t3compile.make_plan(survey, [(3, 2, 1)]), inputs


def test_rewrite_carries_query_streams_orders_and_masks() -> None:
    program, plan, inputs = stream_case()
    rewritten = t3compile.rewrite(program, plan)
    (node,) = (node for node in rewritten.graph.nodes if node.target is WINDOW_ATTENTION)
    assert node.args[3:] == ([2, 3, 4], [1, 3, 2], "local+dilated", 3, 0, None, 0, 0)
    assert tuple(node.kwargs["mask"].meta["val"].shape) == (2, 1, 1, 27)
    assert count(rewritten, aten.expand) == 0
    checks = check_rewritten(program, rewritten, plan, named_inputs(program))
    assert [check.kind for check in checks] == ["site", "model"]
    assert all(check.passed for check in checks)
    # A grid read in another order is another function, and is seen.
    wrong = replace(plan, sites=(replace(plan.sites[0], order="wht", grid=TokenGrid(4, 3, 2)),))
    assert not all(check.passed for check in check_rewritten(program, rewritten, wrong, named_inputs(program)))
    portable = t3compile.rewrite(program, plan, portable=True)
    assert torch.equal(portable.module()(*inputs), rewritten.module()(*inputs))
    identity = t3compile.rewrite(program, plan.with_pattern(WindowPattern(Splits(1, 1, 1))))
    assert torch.equal(identity.module()(*inputs), program.module()(*inputs))


@pytest.mark.parametrize("masked", [False, True])
def test_patterns_of_query_streams_orders_and_masks_are_checked(masked: bool) -> None:
    _, plan, _ = stream_case()
    (site,) = plan.sites
    check = check_pattern(site, masked=masked)
    assert check.passed
    assert check.name == "(3,2,1) on 3x4x2 in order wth" + ", masked" * masked


def test_a_pass_that_changes_nothing_leaves_the_copy_as_it_was(program: Program, rewritten: Program) -> None:
    left = 0
    for given in (program, rewritten):
        for graph_pass in (*CANONICALIZATION, *ONNX_LEGALIZATION):
            copied = copy_graph_module(given.exported)
            before = str(copied.graph)
            if not graph_pass.apply(copied, given):
                assert str(copied.graph) == before, graph_pass
                left += 1
    assert left > 10


def test_passes_in_a_row_are_the_passes_one_by_one(rewritten: Program) -> None:
    one_by_one = rewritten
    for graph_pass in ONNX_LEGALIZATION:
        one_by_one = graph_pass(one_by_one).program
    in_a_row = apply_passes(rewritten, ONNX_LEGALIZATION)
    assert in_a_row.fingerprint() == one_by_one.fingerprint() != rewritten.fingerprint()


def test_equal_calls_are_legalized_by_one_trace(rewritten: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []

    def counting(module: nn.Module, args: tuple[Any, ...]) -> Program:
        traced.append(args)
        return trace(module, args)

    monkeypatch.setattr("t3compile.passes.inline_calls.trace", counting)
    patterns = {node.args[3:] for node in rewritten.graph.nodes if node.target is WINDOW_ATTENTION}
    apply_passes(rewritten, ONNX_LEGALIZATION)
    assert len(traced) == len({str(pattern) for pattern in patterns})


def test_rewrite_refuses_another_number_of_queries() -> None:
    program, plan, _ = stream_case()
    longer = replace(plan, sites=(replace(plan.sites[0], query_suffix=3),))
    with pytest.raises(PlanError, match="query_prefix 0 and query_suffix 3 make 27 queries, but the sequence has 24"):
        t3compile.rewrite(program, longer)


def test_mix_precision_keeps_masks_finite_in_half() -> None:
    """float32's most negative number would be infinite in half."""
    args = WindowAttentionArgs(TokenGrid(1, 2, 2), WindowPattern(Splits(1, 2, 1)), 2)

    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = WINDOW_ATTENTION(q, q, q, *args.as_op_args(), mask=mask)
            return out

    torch.manual_seed(0)
    mask = torch.full((1, 1, 6, 6), torch.finfo(torch.float32).min)
    mask[:, :, 2:, 2:] = 0.0
    inputs = (torch.randn(1, 2, 6, 4), mask)
    half = MixPrecision("float16")(trace(Masked(), inputs)).program
    (node,) = (node for node in half.graph.nodes if node.target is WINDOW_ATTENTION)
    assert {x.meta["val"].dtype for x in node.all_input_nodes} == {torch.float16}
    assert half.module()(*inputs).isfinite().all()


def test_rewrite_refuses_a_planned_call_that_is_causal() -> None:
    class Causal(OneAttention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.patchify(x).flatten(2).transpose(1, 2).unsqueeze(1)
            return scaled_dot_product_attention(q, q, q, is_causal=True)

    x = torch.randn(1, 1, 2, 3, 4)
    plan = t3compile.make_plan(t3compile.detect(trace(OneAttention(), (x,))), [(1, 3, 2)])
    program = trace(Causal(), (x,))
    with pytest.raises(PlanError, match="is causal or uses dropout"):
        t3compile.rewrite(program, replace(plan, fingerprint=program.fingerprint()))


def test_saved_rewritten_program_comes_back_with_its_plan(
    model: HandWrittenDiT, rewritten: Program, plan: Plan, tmp_path: Path
) -> None:
    path = rewritten.save(tmp_path / "model.pt2")
    loaded = t3compile.load_program(path)
    assert loaded.plan == plan
    assert loaded.fingerprint() == rewritten.fingerprint()
    assert torch.equal(run(loaded, *model.example_inputs()), run(rewritten, *model.example_inputs()))


def test_lowering_gives_the_same_bits(model: HandWrittenDiT, rewritten: Program) -> None:
    lowered = assert_idempotent(LowerWindowAttention(), rewritten)
    assert count(lowered, WINDOW_ATTENTION.overloadpacket) == 0
    # three cross-attentions; one call for (3,1,1), two a branch for (1,2,3) and (2,2,2), with windows of two sizes
    assert count(lowered, aten.scaled_dot_product_attention) == 3 + 1 + 2 * 2 + 2 * 2
    assert torch.equal(run(lowered, *model.example_inputs()), run(rewritten, *model.example_inputs()))
    for node in lowered.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or value.dim() <= 8


def test_lowering_gives_the_same_bits_of_the_published_architecture() -> None:
    wan, inputs = tiny_wan(layers=1, grid=(3, 3, 5))
    program = trace(wan, (), inputs)
    rewritten = t3compile.rewrite(program, t3compile.make_plan(t3compile.detect(program), [(1, 2, 2)]))
    lowered = LowerWindowAttention()(rewritten).program
    with torch.no_grad():
        ours, op = lowered.module()(**inputs), rewritten.module()(**inputs)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(op), strict=True):
        assert torch.equal(a, b)


def test_lowering_does_not_fire_without_the_op(program: Program) -> None:
    assert_does_not_fire(LowerWindowAttention(), program)


LOAD_WITH_TORCH_ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "t3compile":
            raise ImportError("t3compile is blocked")

sys.meta_path.insert(0, Blocked())
import torch
torch.save(torch.export.load("portable.pt2").module()(*torch.load("in.pt")), "out.pt")
assert not any(name.split(".")[0] == "t3compile" for name in sys.modules)
try:
    torch.export.load("with_op.pt2")
except Exception:
    sys.exit(7)
"""


def test_only_the_portable_file_loads_with_torch_alone(
    model: HandWrittenDiT, rewritten: Program, tmp_path: Path
) -> None:
    t3compile.rewrite(rewritten, rewritten.plan, portable=True).save(tmp_path / "portable.pt2")
    rewritten.save(tmp_path / "with_op.pt2")
    torch.save(model.example_inputs(), tmp_path / "in.pt")
    command = [sys.executable, "-c", LOAD_WITH_TORCH_ALONE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 7, result.stderr
    assert "failed to resolve torch.ops.t3.window_attention" in result.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), run(rewritten, *model.example_inputs()))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


A, B, C = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def scattered(writes: Iterable[tuple[int, int]], *, step: int, dim: int = 2, size: int = 8) -> Callable[..., Tensor]:
    """Writes input i to every `step`-th position from `start` of a new tensor."""

    def function(*inputs: Tensor) -> Tensor:
        shape = list(inputs[0].shape)
        shape[dim] = size
        out = inputs[0].new_zeros(shape)
        for start, i in writes:
            out = torch.slice_scatter(out, inputs[i], dim, start, None, step)
        return out

    return function


@pytest.mark.parametrize(
    "function",
    [
        scattered([(0, 0), (1, 1)], step=2),
        scattered([(1, 1), (0, 0)], step=2),
        scattered([(2, 1), (0, 2), (1, 0)], step=3, size=12),
        scattered([(0, 0), (1, 1)], step=2, dim=1, size=6),
        scattered([(0, 0), (1, 1)], step=2, dim=-1),
    ],
)
def test_interleave_fires_on_complete_chains(function: Callable[..., Tensor]) -> None:
    program = trace(Function(function), (A, B, C))
    result = assert_idempotent(InterleaveSlices(), program)
    assert count(result, aten.slice_scatter) == 0
    assert count(result, aten.stack) == 1
    assert torch.equal(run(result, A, B, C), function(A, B, C))


@pytest.mark.parametrize(
    "function",
    [
        scattered([(0, 0)], step=2),
        scattered([(0, 0), (0, 1)], step=2),
        scattered([(0, 0), (2, 1)], step=3, size=12),
        lambda a, b, c: torch.slice_scatter(torch.slice_scatter(c, a[..., :2], 2, 0, None, 2), b[..., :2], 2, 2, 4),
        lambda a, b, c: torch.slice_scatter(torch.slice_scatter(c, a[:, :, :2], 2, 0, None, 2), b[:1], 0, 1, None, 2),
        lambda a, b, c: torch.slice_scatter(c, a, 2, 0, None, 1),
        lambda a, b, c: torch.slice_scatter(torch.slice_scatter(c, a[..., :1], 2, 0, 2, 2), b[..., :2], 2, 1, None, 2),
    ],
)
def test_interleave_does_not_fire_on_incomplete_chains(function: Callable[..., Tensor]) -> None:
    program = trace(Function(function), (A, B, C))
    assert count(program, aten.slice_scatter) > 0
    assert_does_not_fire(InterleaveSlices(), program)


def test_interleave_fires_on_the_rope_of_the_published_architecture() -> None:
    wan, inputs = tiny_wan(layers=1)
    program = trace(wan, (), inputs)
    assert count(program, aten.slice_scatter) == 4
    result = InterleaveSlices()(ForwardCopies()(program).program).program
    assert count(result, aten.slice_scatter) == 0
    with torch.no_grad():
        before, after = program.module()(**inputs), result.module()(**inputs)
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b)


def test_forward_copies_fires_where_the_source_is_the_copy() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return aten.copy.default(a, b * 2) + 1

    program = trace(Function(function), (A, B))
    assert count(program, aten.copy) == 1
    result = assert_idempotent(ForwardCopies(), program)
    assert count(result, aten.copy) == 0
    assert torch.equal(run(result, A, B), B * 2 + 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: aten.copy.default(a, b[:, :, :1]) + 1,
        lambda a, b: aten.copy.default(a, b.double()) + 1,
        lambda a, b: aten.copy.default(torch.empty_like(a, dtype=torch.float16), b[:1, :1]) + 1,
    ],
    ids=["broadcasts", "casts", "casts and broadcasts"],
)
def test_forward_copies_casts_and_expands_where_the_destination_did(function: Callable[..., Tensor]) -> None:
    program = trace(Function(function), (A, B))
    result = assert_idempotent(ForwardCopies(), program)
    assert count(result, aten.copy) == count(result, aten.empty_like) == 0
    assert torch.equal(run(result, A, B), function(A, B))


def test_forward_copies_does_not_fire_without_copies() -> None:
    assert_does_not_fire(ForwardCopies(), trace(Function(lambda a, b: a.clone() + b), (A, B)))


def test_rope_in_half_leaves_no_empty_tensors() -> None:
    """Its tables are wider than its tensors: the copies cast, and an exporter would fill what is never read."""
    wan, inputs = tiny_wan(layers=1)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    program = trace(wan.bfloat16(), (), inputs)
    assert count(program, aten.empty_like) == 2
    result = InterleaveSlices()(ForwardCopies()(program).program).program
    assert count(result, aten.empty_like) == count(result, aten.slice_scatter) == 0


def half_error_bound(model: nn.Module, inputs: tuple[Tensor, ...], half: torch.dtype) -> tuple[float, Tensor]:
    """Twice the error of torch's own autocast, which runs the same calls in half, and the float64 output."""
    exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    with torch.autocast("cpu", half):
        plain = model(*inputs)
    rounding = torch.finfo(half).eps * float(exact.abs().max())
    return 2 * float((plain.double() - exact).abs().max()) + rounding, exact


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x)))) + self.down.bias


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mix_precision_stores_products_in_half_and_keeps_the_rest(dtype: str) -> None:
    torch.manual_seed(0)
    module, x, half = Mlp().eval(), torch.randn(2, 5, 16), getattr(torch, dtype)
    program = trace(module, (x,))
    result = assert_idempotent(MixPrecision(dtype), program)
    weights = result.load_weights()
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    narrow = {"up.weight", "up.bias", "down.weight"}  # down.bias is added in float32 too
    assert {name for name, d in dtypes.items() if d == half} == narrow
    assert all(d == torch.float32 for name, d in dtypes.items() if name not in narrow)
    assert all(torch.equal(weights[name], module.get_parameter(name).to(weights[name].dtype)) for name in weights)
    by_call: dict[Any, set[torch.dtype]] = {}
    for node in result.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            by_call.setdefault(getattr(node.target, "overloadpacket", None), set()).add(node.meta["val"].dtype)
    assert by_call[aten.linear] == {half}
    assert by_call[aten.layer_norm] == by_call[aten.silu] == by_call[aten.add] == {torch.float32}
    out = run(result, x)
    assert out.dtype == torch.float32
    with torch.no_grad():
        allowed, exact = half_error_bound(module, (x,), half)
    assert 0 < float((out.double() - exact).abs().max()) <= allowed


def test_mix_precision_of_a_rewritten_model(model: HandWrittenDiT, rewritten: Program) -> None:
    result = MixPrecision("bfloat16")(rewritten).program
    values = [node.meta["val"].dtype for node in result.graph.nodes if node.target is WINDOW_ATTENTION]
    assert values == [torch.bfloat16] * 3
    inputs = model.example_inputs()
    out, exact = run(result, *inputs), run(rewritten, *inputs)
    assert out.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = rewritten.module()(*inputs)
    allowed = 2 * float((plain - exact).abs().max()) + torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert 0 < float((out - exact).abs().max()) <= allowed


def test_mix_precision_does_not_fire_without_float32_products() -> None:
    assert_does_not_fire(MixPrecision(), trace(nn.LayerNorm(4), (A,)))
    assert_does_not_fire(MixPrecision(), trace(nn.Linear(4, 4).half(), (A.half(),)))


def test_mix_precision_refuses_another_half() -> None:
    program = trace(nn.Linear(4, 4).bfloat16(), (A.bfloat16(),))
    with pytest.raises(ExportError, match="traced in bfloat16 and cannot be exported in float16"):
        MixPrecision("float16")(program)


def test_remove_unused_drops_chains_and_keeps_what_is_used_or_has_effects() -> None:
    graph = fx.Graph()
    x, unused = graph.placeholder("x"), graph.placeholder("unused")
    dead = graph.call_function(aten.relu.default, (unused,))
    graph.call_function(aten.neg.default, (dead,))
    kept = graph.call_function(aten.neg.default, (x,))
    effect = graph.call_function(aten.add_.Tensor, (x, 1))
    graph.output(kept)
    remove_unused(graph)
    assert [node.name for node in graph.nodes] == ["x", "unused", kept.name, effect.name, "output"]


def test_a_call_that_is_the_output_may_be_replaced() -> None:
    """Lowering, copies and casts too: the signature names outputs by node."""
    attention = trace(OneAttention(), (torch.randn(1, 1, 2, 3, 4),))
    rewritten = t3compile.rewrite(attention, t3compile.make_plan(t3compile.detect(attention), [(1, 3, 2)]))
    copied = trace(Function(lambda a, b: aten.copy.default(a, b * 2)), (A, B))
    product = trace(nn.Linear(4, 4), (A,))
    for made, program in [(LowerWindowAttention(), rewritten), (ForwardCopies(), copied), (MixPrecision(), product)]:
        result = assert_idempotent(made, program)
        inputs = result.example_inputs[0]
        assert run(result, *inputs).shape == run(program, *inputs).shape
        assert run(result, *inputs).dtype == torch.float32


def test_inputs_may_be_called_like_python_builtins() -> None:
    class Named(OneAttention):
        def forward(self, input: Tensor, id: Tensor) -> Tensor:
            return super().forward(input) * id

    program = trace(Named(), (torch.randn(1, 1, 2, 3, 4), torch.ones(1)))
    rewritten = t3compile.rewrite(program, t3compile.make_plan(t3compile.detect(program), [(1, 3, 2)]))
    placeholders = [node.name for node in rewritten.graph.nodes if node.op == "placeholder"]
    assert placeholders[-2:] == ["input", "id"]
    assert run(rewritten, *program.example_inputs[0]).shape == (1, 1, 24, 4)


@pytest.mark.parametrize("change", ["add", "rename"])
def test_a_pass_that_changes_the_inputs_is_stopped(program: Program, change: str) -> None:
    class Breaks(GraphPass):
        def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
            node = next(n for n in graph_module.graph.nodes if n.name == "b_rope_cos")
            node._rename("other")
            return True

    class AddsInput(GraphPass):
        def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
            with graph_module.graph.inserting_before(next(iter(graph_module.graph.nodes))):
                graph_module.graph.placeholder("more")
            return True

    with pytest.raises(RewriteError, match="changed the inputs"):
        (Breaks if change == "rename" else AddsInput)()(program)


def test_rewritten_model_trains() -> None:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=3, grid=(3, 4, 3))
    inputs = model.example_inputs()
    program = trace(model, inputs)
    module = t3compile.rewrite(program, t3compile.make_plan(t3compile.detect(program), SPLITS)).module()
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (module(*inputs) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = {name: p.grad for name, p in module.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values()), gradients.keys()
        assert all(bool(g.any()) for g in gradients.values() if g is not None)
        optimizer.step()
    assert losses == sorted(set(losses), reverse=True)


class Masked(nn.Module):
    def forward(self, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, kv, kv, mask)


@pytest.mark.parametrize(("shape", "fires"), [((2, 1, 1, 7), True), ((1, 7), True), ((5, 7), False)])
def test_masks_get_their_query_axis(shape: tuple[int, ...], fires: bool) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(shape))
    program = trace(Masked(), inputs)
    result = BroadcastMasks()(program)
    assert result.modified is fires
    assert (result.program is program) is not fires
    assert not BroadcastMasks()(result.program).modified
    assert torch.equal(result.program.module()(*inputs), Masked()(*inputs))


def test_half_masks_stay_finite() -> None:
    """float32's most negative number is infinite in half, and a row without keys would be NaN."""
    torch.manual_seed(0)
    mask = torch.full((1, 1, 5, 7), torch.finfo(torch.float32).min)
    inputs = (torch.randn(1, 1, 5, 8), torch.randn(1, 1, 7, 8), mask)
    half = MixPrecision("float16")(trace(Masked(), inputs)).program
    assert half.module()(*inputs).isfinite().all()
