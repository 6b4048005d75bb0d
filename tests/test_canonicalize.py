"""Every spelling of attention becomes one call that computes the same; what only looks alike stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import normalize, scaled_dot_product_attention

import t3compile
from t3compile.execute import execute
from t3compile.inputs import named_inputs
from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.canonicalization import canonicalize
from t3compile.passes.canonicalize_softmax_attention import unrecognised_attention
from t3compile.program import Program, trace
from t3compile.tracing.replace_leaves import replace_attention_leaves
from tests.zoo.entry import ZooEntry
from tests.zoo.spellings import ENTRIES

aten = torch.ops.aten
Call = Callable[..., Tensor]
Shapes = tuple[tuple[int, ...], ...]
QKV: Shapes = ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))
FLAT: Shapes = ((6, 5, 4), (6, 6, 4), (6, 6, 7))
HEADS_LAST: Shapes = ((2, 5, 3, 4), (2, 6, 3, 4), (2, 6, 3, 7))
GROUPED: Shapes = ((2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 6, 7))
SHARED: Shapes = ((2, 4, 5, 4), (2, 1, 6, 4), (2, 1, 6, 7))


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, scale=0.3, enable_gqa=q.shape[1] != k.shape[1])


def flex_of_near_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = create_block_mask(lambda b, h, i, j: (i - j).abs() < 3, None, None, 5, 6, device="cpu")
    return flex_attention(q, k, v, block_mask=near)


def flex_with_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs())


class Wrapped(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def traced(call: Call, shapes: Shapes) -> Program:
    generator = torch.Generator().manual_seed(0)
    return trace(Wrapped(call), tuple(torch.randn(shape, generator=generator) for shape in shapes))


def calls_of(program: Program) -> list[AttentionCall]:
    return [AttentionCall.read(node) for node in program.graph.nodes if node.target is ATTENTION]


def softmaxes(program: Program) -> int:
    packets = (aten.softmax, aten._softmax, aten._safe_softmax)
    return sum(getattr(node.target, "overloadpacket", None) in packets for node in program.graph.nodes)


def assert_same(before: Program, after: Program) -> None:
    inputs = named_inputs(before)
    for expected, got in zip(execute(before, inputs, float64=True), execute(after, inputs, float64=True), strict=True):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def masked_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    return ((scores(q, k) + bias) * 0.5).masked_fill(hidden > 1, -math.inf).softmax(-1) @ v


def flat_with_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    spread = (torch.bmm(q, k.mT).view(2, 3, 5, 6) + bias).view(6, 5, 6)
    return spread.softmax(-1).bmm(v)


def fully_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(5, 6).tril(-1) == 0, -1e4).softmax(-1) @ v


SPELLED: dict[str, tuple[Call, Shapes]] = {
    "no scale": (lambda q, k, v: scores(q, k).softmax(-1) @ v, QKV),
    "two axes": (lambda q, k, v: (scores(q, k) / 3).softmax(-1) @ v, ((5, 4), (6, 4), (6, 7))),
    "implicit einsum": (
        lambda q, k, v: torch.einsum("...ij,...jd", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v),
        QKV,
    ),
    "heads last": (
        lambda q, k, v: torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v),
        HEADS_LAST,
    ),
    "values first": (lambda q, k, v: v.mT @ scores(k, q).softmax(-2), QKV),
    "negative scale": (lambda q, k, v: (scores(q, k) * -0.5).softmax(-1) @ v, QKV),
    "float64 softmax": (lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float64).to(q) @ v, QKV),
    "fused by _safe_softmax": (lambda q, k, v: aten._safe_softmax(scores(q, k), -1) @ v, QKV),
    "five axes": (lambda q, k, v: scores(q, k).softmax(-1) @ v, ((2, 3, 2, 5, 4), (2, 3, 2, 6, 4), (2, 3, 2, 6, 7))),
    "one key head": (lambda q, k, v: scores(q, k).softmax(-1) @ v, SHARED),
    "grouped": (
        lambda q, k, v: (scores(q.unflatten(1, (2, 2)), k[:, :, None]).softmax(-1) @ v[:, :, None]).flatten(1, 2),
        GROUPED,
    ),
    "temperature": (
        lambda q, k, v, t: (scores(normalize(q, dim=-1), normalize(k, dim=-1)) * t).softmax(-1) @ v,
        (*QKV, (3, 1, 1)),
    ),
    "temperature after bias": (
        lambda q, k, v, t, m: ((scores(q, k) + m) / t).softmax(-1) @ v,
        (*QKV, (3, 1, 1), (5, 6)),
    ),
    "position bias": (lambda q, k, v, m: (scores(q, k) / 2 + m).softmax(-1) @ v, (*QKV, (3, 5, 6))),
    "subtracted bias": (lambda q, k, v, m: (m - scores(q, k)).softmax(-1) @ v, (*QKV, (3, 5, 6))),
    "bias per query": (lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v, (*QKV, (3, 5, 1))),
    "two masks": (masked_twice, (*QKV, (3, 5, 6), (2, 1, 1, 6))),
    "where": (
        lambda q, k, v, m: torch.where(m > -0.5, scores(q, k), torch.tensor(-1e9)).softmax(-1) @ v,
        (*QKV, (2, 1, 5, 6)),
    ),
    "fully hidden rows": (fully_hidden, QKV),
    "mask between views": (flat_with_mask, (*FLAT, (2, 1, 5, 6))),
    "channels first": (
        lambda x: torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", x, x).softmax(-1), x),
        ((2, 4, 9),),
    ),
    "three axes fused": (scaled_dot_product_attention, FLAT),
    "five axes fused": (
        lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m),
        ((2, 3, 2, 5, 4), (2, 3, 2, 6, 4), (2, 3, 2, 6, 7), (3, 1, 5, 6)),
    ),
    "grouped fused": (lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), GROUPED),
    "CPU kernel": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3)[0],
        (QKV[0], QKV[1], QKV[1]),
    ),
    "math kernel": (lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0], QKV),
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_spelling_becomes_one_call(name: str) -> None:
    before = traced(*SPELLED[name])
    after = canonicalize(before)
    (call,) = calls_of(after)
    q, k, v = (call.shape(x) for x in (call.q, call.k, call.v))
    assert len(q) == len(k) == len(v) == 4
    assert q[:2] == k[:2] == v[:2]
    assert softmaxes(after) == 0
    assert "scale" in call.node.kwargs
    assert_same(before, after)
    assert canonicalize(after).fingerprint() == after.fingerprint()
    assert str(canonicalize(after).graph) == str(after.graph)


def test_a_fill_of_minus_infinity_is_a_boolean_mask() -> None:
    hide = traced(
        lambda q, k, v, m: scores(q, k).masked_fill(~(m > 0), -math.inf).softmax(-1) @ v, (*QKV, (2, 1, 1, 6))
    )
    (call,) = calls_of(canonicalize(hide))
    assert call.mask is not None
    assert call.mask.target is aten.gt.Scalar  # no double negation


def test_heads_are_found_behind_a_packed_batch() -> None:
    packed = traced(
        lambda q, k, v: torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)), QKV
    )
    (call,) = calls_of(canonicalize(packed))
    assert call.shape(call.q) == (2, 3, 5, 4)


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (30 * torch.tanh(scores(q, k) / 30)).softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((scores(q, k), torch.zeros(2, 3, 5, 1)), -1).softmax(-1)[..., :-1] @ v


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return (weights @ v).sum() + weights.sum()


def top_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    products = scores(q, k)
    return products.masked_fill(products < products.topk(2, -1)[0][..., -1:], -math.inf).softmax(-1) @ v


# The call, its inputs' shapes, and a part of the reason; without one it does not even look like attention.
ALIKE: dict[str, tuple[Call, Shapes, str]] = {
    "softmax over queries": (lambda q, k, v: scores(q, k).softmax(-2) @ v, QKV, "over the keys alone"),
    "softmax over heads": (lambda q, k, v: scores(q, k).softmax(1) @ v, QKV, "not the keys alone"),
    "gated": (lambda q, k, v, g: (scores(q, k).softmax(-1) * g) @ v, (*QKV, (2, 3, 5, 6)), "changed by aten.mul"),
    "talking heads": (
        lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k).softmax(-1), w) @ v,
        (*QKV, (3, 3)),
        "does not contract",
    ),
    "talking scores": (
        lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k), w).softmax(-1) @ v,
        (*QKV, (3, 3)),
        "part of the keys' axes",
    ),
    "soft cap": (soft_capped, QKV, "aten.tanh"),
    "sink": (with_sink, QKV, "aten.cat"),
    "returned": (returned, QKV, "are used by"),
    "top-k": (top_two, QKV, "depends on the scores"),
    "mild fill": (
        lambda q, k, v, m: scores(q, k).masked_fill(m > 0, -100.0).softmax(-1) @ v,
        (*QKV, (5, 6)),
        "does not hide",
    ),
    "full gate of scores": (
        lambda q, k, v, g: (scores(q, k) * g).softmax(-1) @ v,
        (*QKV, (5, 6)),
        "vary with queries and keys",
    ),
    "per-query experts": (
        lambda x, w, e: torch.einsum("bse,bsed->bsd", (x @ w).softmax(-1), e),
        ((2, 5, 4), (4, 3), (2, 5, 3, 4)),
        "vary with the queries",
    ),
    "linear": (lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), QKV, ""),
    "sigmoid": (lambda q, k, v: scores(q, k).sigmoid() @ v, QKV, ""),
    "pooling": (lambda x, w: ((x @ w).softmax(1) * x).sum(1), ((2, 5, 4), (4, 1)), ""),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_only_looks_alike_stays(name: str) -> None:
    call, shapes, reason = ALIKE[name]
    before = traced(call, shapes)
    after = canonicalize(before)
    assert str(after.graph) == str(before.graph)
    listed = unrecognised_attention(after)
    assert [node for node, why in listed if reason in why] == (["softmax"] if reason else [])
    assert len(listed) == bool(reason)


def test_router_weights_are_no_keys() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            return torch.einsum("bse,bed->bsd", (x @ self.gate).softmax(-1), experts)

    before = trace(Router(), (torch.randn(2, 5, 4), torch.randn(2, 3, 4)))
    assert str(canonicalize(before).graph) == str(before.graph)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_spelled_model(entry: ZooEntry) -> None:
    module, inputs = entry.make()
    before = trace(module, (), inputs)
    after = canonicalize(before)
    assert len(calls_of(after)) == len(module.attention_calls())  # type: ignore[operator]
    assert softmaxes(after) == 0
    assert_same(before, after)
    if not any(isinstance(value, list) for value in inputs.values()) and "mask" not in inputs:
        survey = t3compile.detect(after)
        assert len(survey.found) == entry.grid_sites
        assert survey.grids == (entry.grid,)


def library_function(name: str, module: str = "flash_attn") -> Callable[..., Tensor]:
    def call(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a library's kernel was called")

    call.__name__, call.__module__ = name, module
    return call


def leaf_module(target: Callable[..., Tensor], inputs: int, **kwargs: object) -> fx.GraphModule:
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(inputs)]
    graph.output(graph.call_function(target, tuple(placeholders), kwargs))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("name", "kwargs", "heads_first"),
    [
        ("flash_attn_func", {"softmax_scale": 0.4}, False),
        ("flash_attn_func", {"causal": True, "window_size": (-1, -1)}, False),
        ("memory_efficient_attention", {"scale": 0.4, "p": 0.0}, False),
        ("sageattn", {"sm_scale": 0.4}, True),
        ("sageattn", {"tensor_layout": "NHD", "is_causal": False}, False),
        ("sageattn_qk_int8_pv_fp16_cuda", {"tensor_layout": "NHD"}, False),
    ],
)
def test_library_calls_are_traced_as_attention(name: str, kwargs: dict[str, object], heads_first: bool) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 6, 3, 4) for _ in range(3))
    program = t3compile.trace(leaf_module(library_function(name), 3, **kwargs), inputs)
    assert len(calls_of(program)) == 1
    assert any("traced as torch's attention" in note for note in program.notes)
    q, k, v = (x.double() if heads_first else x.double().transpose(1, 2) for x in inputs)
    products = q @ k.mT * kwargs.get("softmax_scale", kwargs.get("scale", kwargs.get("sm_scale", 0.5)))
    if kwargs.get("causal"):
        products = products + torch.full((6, 6), -math.inf).triu(1)
    expected = products.softmax(-1) @ v
    (got,) = execute(program, named_inputs(program), float64=True)
    assert torch.allclose(got, expected if heads_first else expected.transpose(1, 2), rtol=0, atol=1e-13)


def test_packed_library_calls() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 3, 3, 4)
    program = t3compile.trace(leaf_module(library_function("flash_attn_qkvpacked_func"), 1), (qkv,))
    q, k, v = (x.transpose(1, 2) for x in qkv.double().unbind(2))
    (got,) = execute(program, named_inputs(program), float64=True)
    assert torch.allclose(got, ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "kwargs",
    [{"window_size": (8, 8)}, {"softcap": 30.0}, {"dropout_p": 0.1}, {"return_attn_probs": True}, {"novel": 1}],
)
def test_library_calls_that_cannot_be_honoured_are_left(kwargs: dict[str, object]) -> None:
    module = leaf_module(library_function("flash_attn_func"), 3, **kwargs)
    replaced, (note,) = replace_attention_leaves(module)
    assert str(replaced.graph) == str(module.graph)
    assert "is left" in note
    assert next(iter(kwargs)) in note


def test_a_module_without_library_calls_comes_back() -> None:
    module = leaf_module(torch.matmul, 2)
    assert replace_attention_leaves(module) == (module, ())


@pytest.mark.parametrize("shapes", [QKV, GROUPED])
def test_plain_flex_attention_is_attention(shapes: Shapes) -> None:
    program = canonicalize(traced(flex, shapes))
    (call,) = calls_of(program)
    assert call.node.kwargs["scale"] == 0.3
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    torch.testing.assert_close(program.module()(q, k, v), flex(q, k, v))


@pytest.mark.parametrize("call", [flex_of_near_keys, flex_with_a_bias])
def test_flex_attention_with_functions_of_its_own_is_listed(call: Call) -> None:
    program = canonicalize(traced(call, QKV))
    assert calls_of(program) == []
    (declined,) = t3compile.detect(program).declined
    assert declined.reason == "unrecognised"
    assert "flex_attention with a score or mask function" in declined.detail
