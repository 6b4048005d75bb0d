"""Bounds and value numbers against what the traced programs compute: by rule, and for random programs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t3compile.errors import InputsError
from t3compile.passes.bound_values import Bounds, ValueBounds
from t3compile.passes.value_numbers import LARGEST, Numbers, align, concatenate
from t3compile.program import Program, trace, user_input_names

INF = math.inf


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def traced(function: Callable[..., Any], *inputs: Tensor) -> tuple[Program, list[str]]:
    program = trace(Function(function), inputs)
    return program, list(user_input_names(program.exported))


def bounds_of(function: Callable[..., Any], *inputs: Tensor, assume: Any = None) -> list[Bounds | None]:
    """Bounds of the outputs; ``assume`` by the position of the input."""
    program, names = traced(function, *inputs)
    bounds = ValueBounds(program, {names[i]: limits for i, limits in (assume or {}).items()})
    return [bounds.bounds(node) for node in program.graph.output_node().args[0]]


def bound(function: Callable[..., Any], *inputs: Tensor, assume: Any = None) -> tuple[list[Any], list[Any]]:
    (result,) = bounds_of(function, *inputs, assume=assume)
    assert result is not None
    return result.lo.tolist(), result.hi.tolist()


X = torch.ones(3)
K = torch.ones(3, dtype=torch.int64)
M = torch.ones(3, dtype=torch.bool)


def test_inputs() -> None:
    limits = torch.iinfo(torch.int64)
    assert bound(lambda m: m.clone(), M) == ([False] * 3, [True] * 3)
    assert bound(lambda x: x.clone(), X) == ([-INF] * 3, [INF] * 3)
    assert bound(lambda k: k.clone(), K) == ([limits.min] * 3, [limits.max] * 3)
    assert bound(lambda k: k.clone(), K.to(torch.uint8)) == ([0] * 3, [255] * 3)
    assert bound(lambda x: x.clone(), X, assume={0: (0, 1)}) == ([0.0] * 3, [1.0] * 3)


def test_an_assumption_about_no_input_is_refused() -> None:
    program, names = traced(lambda x: x + 1, X)
    with pytest.raises(InputsError, match=f"'nothing'.*it has {names[0]}"):
        ValueBounds(program, {"nothing": (0, 1)})


BINARY = {0: (0, 1)}
RULES: dict[str, tuple[Callable[..., Tensor], Tensor, Any, list[Any], list[Any]]] = {
    "additive": (lambda x: (1 - x) * -10000.0, X, BINARY, [-10000.0], [0.0]),
    "finfo": (lambda x: (1 - x) * torch.finfo(torch.float32).min, X, BINARY, [torch.finfo(torch.float32).min], [0.0]),
    "infinite": (lambda x: (1 - x) * -INF, X, BINARY, [-INF], [0.0]),
    "add": (lambda x: x + 2, X, BINARY, [2.0], [3.0]),
    "rsub": (lambda x: 2 - x, X, BINARY, [1.0], [2.0]),
    "div": (lambda x: (x + 1) / 2, X, BINARY, [0.5], [1.0]),
    "div-by-zero": (lambda x: 1 / x, X, BINARY, [-INF], [INF]),
    "neg-abs": (lambda x: (-x).abs(), X, BINARY, [0.0], [1.0]),
    "abs": (lambda x: (x - 0.25).abs(), X, BINARY, [0.0], [0.75]),
    "clamp": (lambda x: x.clamp(0.25, 0.5), X, None, [0.25], [0.5]),
    "clamp-min": (lambda k: k.clamp(min=3).clamp(max=9), K, None, [3], [9]),
    "maximum": (lambda x: torch.maximum(x, torch.tensor(0.5)), X, BINARY, [0.5], [1.0]),
    "greater": (lambda x: x > -0.5, X, BINARY, [True], [True]),
    "greater-than-inside": (lambda x: x > 0.5, X, BINARY, [False], [True]),
    "at-most": (lambda k: k <= 1, K, BINARY, [True], [True]),
    "equal": (lambda k: k == 2, K, BINARY, [False], [False]),
    "not-equal": (lambda k: k != 2, K, BINARY, [True], [True]),
    "nan": (lambda x: x >= -INF, X, None, [False], [True]),
    "not-nan": (lambda x: x >= -INF, X, BINARY, [True], [True]),
    "itself": (lambda k: k == k, K, None, [True], [True]),
    "itself-or-nan": (lambda x: x == x, X, None, [False], [True]),
    "and": (lambda m: m & False, M, None, [False], [False]),
    "or": (lambda m: torch.logical_or(m, torch.ones(3)), M, None, [True], [True]),
    "not": (lambda m: ~(m & False), M, None, [True], [True]),
    "where": (lambda m: torch.where(m, 0.0, -5.0), M, None, [-5.0], [0.0]),
    "masked-fill": (lambda m: torch.zeros(3).masked_fill(m, -5.0), M, None, [-5.0], [0.0]),
    "sum": (lambda m: m.sum() + torch.zeros(3), M, None, [0.0], [3.0]),
    "sum-of-floats": (lambda x: x.sum() + torch.zeros(3), X, BINARY, [0.0], [3.0]),
    "any": (lambda m: (m & False).any().expand(3), M, None, [False], [False]),
    "all": (lambda m: (m | True).all().expand(3), M, None, [True], [True]),
    "amax": (lambda x: x.amax().expand(3), X, BINARY, [0.0], [1.0]),
    "max-of-two": (lambda k: torch.max(k, k.new_tensor([2, 2, 2])), K, BINARY, [2], [2]),
    "wrap": (lambda k: k.clamp(min=0) + 1, K, None, [torch.iinfo(torch.int64).min], [torch.iinfo(torch.int64).max]),
    "wrap-byte": (lambda k: k + 1, K.to(torch.uint8), None, [0], [255]),
    "sin": (lambda x: x.sin(), X, BINARY, [-INF], [INF]),
    "random": (lambda x: torch.bernoulli(x * 0 + 1), X, BINARY, [-INF], [INF]),
    "uninitialised": (lambda x: torch.empty_like(x), X, None, [-INF], [INF]),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    function, example, assume, lo, hi = RULES[name]
    assert bound(function, example, assume=assume) == (lo * 3, hi * 3)


def test_running_sums() -> None:
    assert bound(lambda m: m.cumsum(0), M) == ([0, 0, 0], [1, 2, 3])


def test_constants_are_computed() -> None:
    def function(x: Tensor) -> Tensor:
        table = torch.arange(6).view(2, 3).flip(0).roll(1, 1).tril()
        return torch.gather(table, 1, torch.tensor([[2, 0, 0], [1, 1, 1]])).cumsum(1) % 5

    (result,) = bounds_of(function, X)
    assert result is not None
    expected = function(X)
    assert result.is_constant.all()
    assert torch.equal(result.lo, expected)
    assert torch.equal(result.hi, expected)


def test_infinity_is_no_nan() -> None:
    (result,) = bounds_of(lambda x: (1 - x) * -INF, X, assume=BINARY)
    assert result is not None
    assert result.may_be_nan.all()  # 1 - 1 = 0, and 0 * -inf is NaN
    assert not result.is_constant.any()
    (constant,) = bounds_of(lambda x: torch.ones(3) - torch.ones(3), X)
    assert constant is not None
    assert not constant.may_be_nan.any()


def test_numbers_follow_moved_values() -> None:
    def function(k: Tensor) -> Tensor:
        moved = torch.stack([k, k.flip(0)]).repeat(1, 2)[:, 1:].transpose(0, 1).reshape(-1)
        return nn.functional.pad(moved, (1, 0), value=7)

    (result,) = bounds_of(function, K)
    assert result is not None
    positions = function(torch.tensor([100, 101, 102])).tolist()
    numbers = result.numbers.tolist()
    for a, first in zip(positions, numbers, strict=True):
        for b, second in zip(positions, numbers, strict=True):
            assert (a == b) == (first == second)


def test_casts_that_keep_values_keep_numbers() -> None:
    def function(m: Tensor) -> tuple[Tensor, ...]:
        return m.clone(), m.long(), m.float(), m.long().bool(), m.int() != 0, m & True, m.long() * 1

    first, *others = bounds_of(function, M)
    assert first is not None
    for other in others:
        assert other is not None
        assert torch.equal(first.numbers, other.numbers)


def test_negative_zero_is_another_constant() -> None:
    """1 / 0 and 1 / -0 differ, so what is computed from the zeros must."""
    (result,) = bounds_of(lambda x: torch.tensor([0.0, -0.0]) * torch.ones(2), X)
    assert result is not None
    assert result.numbers[0] != result.numbers[1]
    assert result.is_constant.all()


def test_half_precision_rounds_as_torch_does() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    lo, hi = bound(lambda x: (1 - x) * torch.finfo(torch.float32).min, x, assume=BINARY)
    assert lo == [-INF] * 3
    assert hi == [0.0] * 3
    lo, hi = bound(lambda x: x + 256, x, assume=BINARY)
    assert (lo, hi) == ([256.0] * 3, [256.0] * 3)


def test_buffers_are_known_and_parameters_are_not() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("stored", torch.tensor([1.0, 2.0]))
            self.register_buffer("passing", torch.tensor([3.0, 4.0]), persistent=False)
            self.weight = nn.Parameter(torch.tensor([5.0, 6.0]))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.stored + 1, self.passing + 1, self.weight + 1

    program = trace(Held(), (X,))
    bounds = ValueBounds(program)
    stored, passing, weight = (bounds.bounds(node) for node in program.graph.output_node().args[0])
    assert stored is not None and passing is not None and weight is not None
    assert stored.lo.tolist() == stored.hi.tolist() == [2.0, 3.0]
    assert passing.lo.tolist() == passing.hi.tolist() == [4.0, 5.0]
    assert weight.lo.tolist() == [-INF] * 2


def test_changed_buffers_are_not_known() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls + x

    program = trace(Counting(), (torch.ones(1),))
    bounds = ValueBounds(program, {"x": (0, 0)})
    result = bounds.bounds(program.graph.output_node().args[0][-1])
    assert result is not None
    assert result.hi.tolist() == [INF]


def test_only_ancestors_are_looked_at() -> None:
    """[S, S] floats of 400 million elements beside the mask cost nothing; asking for them says None."""

    def function(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return (x[:, None] * x[None] + x[:, None]), m | True

    with torch.device("meta"):
        program, _ = traced(function, torch.empty(20_000), torch.empty(3, dtype=torch.bool))
    bounds = ValueBounds(program)
    large, mask = program.graph.output_node().args[0]
    result = bounds.bounds(mask)
    assert result is not None
    assert result.lo.all()
    assert bounds.bounds(large) is None
    assert bounds.numbers(large) is None


# Random programs.


@dataclass(frozen=True)
class Operands:
    """Two bools, two integers, two floats, a Python number, and any number."""

    a: Tensor
    b: Tensor
    i: Tensor
    j: Tensor
    f: Tensor
    g: Tensor
    s: float
    number: Callable[[], Tensor]


Step = Callable[[Operands], Tensor]

BOOL_STEPS: list[Step] = [
    lambda v: v.a & v.b,
    lambda v: torch.logical_or(v.a, v.b),
    lambda v: v.a ^ v.b,
    lambda v: ~v.a,
    lambda v: v.number() < v.number(),
    lambda v: v.number() >= v.s,
    lambda v: v.number() == v.number(),
    lambda v: v.number() != v.s,
    lambda v: v.number().bool(),
    lambda v: v.number().isnan(),
    lambda v: v.a.any(1, keepdim=True).expand(3, 4),
    lambda v: v.i.all(0, keepdim=True).expand(3, 4),
    lambda v: torch.cat([v.a[:, 2:], v.b[:, :2]], dim=1),
    lambda v: torch.where(v.a, v.b, ~v.b),
    lambda v: v.a.tril(),
    lambda v: torch.isinf(v.f),
]

INTEGER_STEPS: list[Step] = [
    lambda v: v.i + v.j,
    lambda v: v.i * 2 - v.j,
    lambda v: torch.minimum(v.i, v.j),
    lambda v: v.i.clamp(min=0, max=3),
    lambda v: v.a.long(),
    lambda v: v.a.cumsum(1),
    lambda v: v.a.sum(0, keepdim=True).expand(3, 4),
    lambda v: v.i.roll(1, 0),
    lambda v: v.i.flip(1),
    lambda v: v.i.reshape(4, 3).t().reshape(3, 4),
    lambda v: v.i.index_select(1, torch.tensor([3, 0, 0, 1])),
    lambda v: v.i[torch.tensor([2, 2, 0])],
    lambda v: torch.where(v.a, v.i, v.j),
    lambda v: v.i.abs() // 2,
    lambda v: -v.i,
]

FLOAT_STEPS: list[Step] = [
    lambda v: v.f + v.g,
    lambda v: v.f - v.s,
    lambda v: (1.0 - v.f) * v.s,
    lambda v: v.f * v.g,
    lambda v: v.f * v.i,
    lambda v: v.f / v.g,
    lambda v: v.s - v.a.float(),
    lambda v: v.f.masked_fill(v.a, v.s),
    lambda v: torch.where(v.a, v.f, v.s),
    lambda v: torch.where(v.b, 0.0, -INF).to(v.f.dtype),
    lambda v: v.f.abs(),
    lambda v: torch.maximum(v.f, v.g),
    lambda v: v.f.clamp(max=1.0),
    lambda v: v.f.amax(1, keepdim=True).expand(3, 4),
    lambda v: v.f.sum(1, keepdim=True).expand(3, 4),
    lambda v: nn.functional.pad(v.f[:, 1:], (0, 1), value=v.s),
    lambda v: torch.stack([v.f[0], v.g[1], v.f[0]]),
    lambda v: torch.slice_scatter(v.f, v.g[:, :2], 1, 1, 3),
    lambda v: torch.select_scatter(v.f, v.g[0], 0, 1),
    lambda v: v.f.index_put((torch.tensor([0, 2]), torch.tensor([1, 3])), torch.tensor(v.s)),
    lambda v: v.f.half().float(),
    lambda v: v.f.bfloat16() + v.s,
    lambda v: v.f.double() * v.s,
    lambda v: v.f.floor(),
    lambda v: v.i.to(v.f.dtype),
    lambda v: v.f.exp(),
]


def random_program(seed: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]:
    """A program over a bool, an integer, and two floating inputs [3, 4]; every value it makes has that shape."""

    def function(m: Tensor, k: Tensor, x: Tensor, free: Tensor) -> list[Tensor]:
        choose = random.Random(seed)
        bools = [m, torch.ones(3, 4, dtype=torch.bool), torch.arange(12).view(3, 4) % 3 == 0, m[:1].expand(3, 4)]
        integers = [k, torch.arange(4).expand(3, 4), torch.full((3, 4), 2), k[:, :1].expand(3, 4)]
        floats = [x, free, torch.zeros(3, 4), torch.full((3, 4), -INF), x[1:2].repeat(3, 1), torch.ones(3, 4)]

        def number() -> Tensor:
            return choose.choice(choose.choice([integers, floats]))

        for _ in range(12):
            pairs = (choose.choice(made) for made in (bools, bools, integers, integers, floats, floats))
            operands = Operands(*pairs, choose.choice([0.0, 1.0, -1.0, 0.5, -10000.0, 3.0]), number)
            bools.append(choose.choice(BOOL_STEPS)(operands))
            integers.append(choose.choice(INTEGER_STEPS)(operands))
            floats.append(choose.choice(FLOAT_STEPS)(operands).float())
        return [*bools[4:], *integers[4:], *floats[6:]]

    return function


def random_inputs(generator: torch.Generator) -> list[Tensor]:
    """Values in the assumed ranges: k in [0, 1], x in [0, 1], everything for `free`."""
    m = torch.rand(3, 4, generator=generator) < 0.5
    k = torch.randint(0, 2, (3, 4), generator=generator)
    x = torch.rand(3, 4, generator=generator)
    x = torch.where(torch.rand(3, 4, generator=generator) < 0.6, x.round(), x)
    odd = torch.tensor([INF, -INF, math.nan, 0.0, -0.0, 1.0, 3e38, -1e-40])
    free = torch.randn(3, 4, generator=generator)
    pick = odd[torch.randint(0, len(odd), (3, 4), generator=generator)]
    return [m, k, x, torch.where(torch.rand(3, 4, generator=generator) < 0.5, pick, free)]


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_stay_in_their_bounds(seed: int) -> None:
    function = random_program(seed)
    generator = torch.Generator().manual_seed(seed)
    program, names = traced(function, *random_inputs(generator))
    bounds = ValueBounds(program, {names[1]: (0, 1), names[2]: (0, 1)})
    outputs = [bounds.bounds(node) for node in program.graph.output_node().args[0]]
    module = program.module()
    for _ in range(20):
        inputs = random_inputs(generator)
        for result, value in zip(outputs, module(*inputs), strict=True):
            assert result is not None
            if value.is_floating_point():
                nan = value.isnan()
                assert not (nan & ~result.may_be_nan).any()
                value = value.double()
                assert ((value >= result.lo) | nan).all()
                assert ((value <= result.hi) | nan).all()
            else:
                assert (value >= result.lo).all()
                assert (value <= result.hi).all()
            assert_equal_where_numbered_equal(value, result.numbers)


def assert_equal_where_numbered_equal(value: Tensor, numbers: Tensor) -> None:
    flat, ids = value.reshape(-1), numbers.reshape(-1)
    same = ids[:, None] == ids[None]
    equal = (flat[:, None] == flat[None]) | (flat.isnan()[:, None] & flat.isnan()[None])
    assert (equal | ~same).all()


def test_random_programs_bound_something() -> None:
    """Else the property above would hold of bounds that say nothing."""
    bounded = repeated = total = 0
    for seed in range(1):
        program, names = traced(random_program(seed), *random_inputs(torch.Generator().manual_seed(seed)))
        bounds = ValueBounds(program, {names[1]: (0, 1), names[2]: (0, 1)})
        for node in program.graph.output_node().args[0]:
            result = bounds.bounds(node)
            assert result is not None
            total += result.lo.numel()
            bounded += int((result.lo.isfinite() if result.lo.is_floating_point() else result.is_constant).sum())
            repeated += result.numbers.numel() - result.numbers.unique().numel()
    assert bounded > total // 4
    assert repeated > total // 4


# Value numbers.


def laid_out(numbers: Numbers) -> Tensor:
    dense = numbers.dense()
    assert dense is not None
    assert tuple(dense.shape) == numbers.shape
    return dense


def random_numbers(choose: random.Random, shape: tuple[int, ...]) -> Numbers:
    """Some axes repeated, some with places, some laid out."""
    core_shape: list[int] = []
    places: list[Tensor | None] = []
    for n in shape:
        kind = choose.choice(["repeated", "placed", "laid out"])
        count = 1 if kind == "repeated" else choose.randint(1, n) if kind == "placed" else n
        kind = "repeated" if count == 1 else kind
        core_shape.append(count)
        index = torch.tensor([choose.randrange(count) for _ in range(n)])
        index[:count] = torch.arange(count)
        places.append(index if kind == "placed" else None)
    core = torch.tensor([choose.randrange(3) for _ in range(math.prod(core_shape))]).reshape(core_shape)
    return Numbers(shape, core, tuple(places))


@pytest.mark.parametrize("seed", range(40))
def test_numbers_behave_like_tensors(seed: int) -> None:
    choose = random.Random(seed)
    shape = tuple(choose.choice([1, 2, 3, 4]) for _ in range(3))
    numbers = random_numbers(choose, shape)
    dense = laid_out(numbers)
    assert torch.equal(laid_out(numbers.grouped()), dense)
    dim = choose.randrange(3)
    index = torch.tensor([choose.randrange(shape[dim]) for _ in range(choose.randint(0, 5))], dtype=torch.int64)
    taken = numbers.take(dim, index)
    assert torch.equal(laid_out(taken), dense.index_select(dim, index))
    for d in range(3):
        if len(index):
            assert set(taken.positions(d).tolist()) == set(range(taken.core.shape[d]))
    order = choose.sample(range(3), 3)
    assert torch.equal(laid_out(numbers.permute(order)), dense.permute(order))
    total = dense.numel()
    for new in ((total,), (1, total, 1), (shape[0] * shape[1], shape[2]), (shape[0], 1, shape[1] * shape[2])):
        reshaped = numbers.reshape(new)
        assert reshaped is not None
        assert torch.equal(laid_out(reshaped), dense.reshape(new))
        back = reshaped.reshape(shape)
        assert back is not None
        assert torch.equal(laid_out(back), dense)


@pytest.mark.parametrize("seed", range(40))
def test_aligned_and_concatenated(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr("t3compile.passes.value_numbers._WORTH_GROUPING", 0)
    full = tuple(choose.choice([1, 2, 3, 4]) for _ in range(3))
    parts = [random_numbers(choose, tuple(choose.choice([1, n]) for n in full)) for _ in range(3)]
    aligned = align(parts)
    assert aligned is not None
    for part, core in zip(parts, aligned.cores, strict=True):
        sizes = torch.broadcast_shapes(*(c.shape for c in aligned.cores))
        result = Numbers(aligned.shape, core.expand(sizes), aligned.places)
        assert torch.equal(laid_out(result), laid_out(part).expand(aligned.shape))
    dim = choose.randrange(3)
    lengths = [choose.randint(0, 3) for _ in range(2)] + [2]
    pieces = [random_numbers(choose, (*full[:dim], n, *full[dim + 1 :])) for n in lengths if n] or parts[:1]
    joined = concatenate(pieces, dim)
    assert joined is not None
    assert torch.equal(laid_out(joined), torch.cat([laid_out(piece) for piece in pieces], dim))


def test_too_large_to_lay_out() -> None:
    row = Numbers.of(torch.arange(8192).reshape(1, -1))
    assert row.expand((8192, 8192)).dense() is None
    column = row.permute((1, 0))
    assert LARGEST < 8192 * 8192
    assert align([row, column]) is None
