"""Bound the values of a graph's tensors for every value of its inputs, and say which of them are equal.

Abstract interpretation over passes.value_numbers: every element has a number, a number has a lower and an upper bound,
and two elements of one number hold the same value whatever the inputs are. What no input reaches is computed; what an
operation without a rule makes is unknown. Only the ancestors of the asked node are looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

from t3compile.errors import InputsError, WeightsError
from t3compile.passes.aten_calls import carry_out, element_counts, operator_name, replaced
from t3compile.passes.movement_rules import MOVEMENT_RULES, NumbersValue
from t3compile.passes.number_table import NumberTable
from t3compile.passes.value_numbers import LARGEST, Numbers, align, representatives
from t3compile.passes.value_ranges import (
    ARITHMETIC,
    CONSTANT,
    INF,
    LARGEST_EXACT,
    NO_NUMBER,
    RULES,
    Range,
    Reduction,
    adds_exactly,
    convert,
    dtype_limits,
)
from t3compile.program import Program

# Of these only the operand's shape and dtype count.
_SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero", "empty_like", "new_empty"}
)

# The analysis says nothing of what these make, so their operands are not looked at.
_OPAQUE = frozenset(
    {
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "embedding"),
        *("convolution", "conv1d", "conv2d", "conv3d", "layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
        *("native_group_norm", "batch_norm", "softmax", "_softmax", "empty_like", "new_empty", "empty"),
    }
)

# Rows are compared up to this many elements.
_LARGEST_COMPARED = 2**20


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of a tensor's elements, all of its shape.

    ``lo``, ``hi``: float64, int64 or bool as the tensor is floating, integer or bool; float bounds may be infinite,
    int64's own limits stand for no bound. ``may_be_nan``: bool; such an element lies in [lo, hi] or is NaN.
    ``numbers``: int64, equal where the values are provably equal.
    """

    lo: Tensor
    hi: Tensor
    may_be_nan: Tensor
    numbers: Tensor

    @property
    def is_constant(self) -> Tensor:
        """bool: where the value is known."""
        return (self.lo == self.hi) & ~self.may_be_nan


class ValueBounds:
    """Bounds and equalities of a static-shape program's tensors, computed when asked for.

    ``assume`` gives (lowest, highest) for inputs by placeholder name; other inputs may hold anything, NaN included.
    Parameters may hold anything; constants, and buffers whose values are at hand, hold what they hold. A result that
    cannot be represented in 2**24 different elements is None: too large to prove anything.
    """

    def __init__(self, program: Program, assume: Mapping[str, tuple[float, float]] | None = None) -> None:
        self._program = program
        self._assume = dict(assume or {})
        self._table = NumberTable()
        self._values: dict[fx.Node, NumbersValue] = {}
        self._specs = {s.arg.name: s for s in program.exported.graph_signature.input_specs if hasattr(s.arg, "name")}
        unknown = self._assume.keys() - input_names(program)
        if unknown:
            raise InputsError(
                f"bounds are assumed for {', '.join(map(repr, sorted(unknown)))}, which the program has no tensor "
                f"inputs of: it has {', '.join(sorted(input_names(program)))}"
            )

    @property
    def graph(self) -> fx.Graph:
        return self._program.graph

    def bounds(self, node: fx.Node) -> Bounds | None:
        """Elementwise bounds of the tensor that `node` yields; None where it is too large or not a tensor."""
        numbers = self.numbers(node)
        dense = None if numbers is None else numbers.dense()
        if dense is None:
            return None
        lo, hi, nan, _ = self._table.look_up(dense)
        dtype = node.meta["val"].dtype
        if dtype is torch.bool:
            return Bounds(lo > 0, hi > 0, nan, dense)
        if dtype.is_floating_point:
            return Bounds(lo, hi, nan, dense)
        limits = torch.iinfo(torch.int64)
        low = torch.where(lo.isinf(), limits.min, lo.nan_to_num(0, 0, 0).to(torch.int64))
        high = torch.where(hi.isinf(), limits.max, hi.nan_to_num(0, 0, 0).to(torch.int64))
        return Bounds(low, high, nan, dense)

    def numbers(self, node: fx.Node) -> Numbers | None:
        """NumbersValue numbers of the tensor that `node` yields; None where it is too large or not a tensor."""
        for ancestor in self._pending(node):
            self._values[ancestor] = self._evaluate(ancestor)
        value = self._values[node]
        return value if isinstance(value, Numbers) else None

    def look_up(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float64 lowest and highest value, and whether it may be NaN, of value numbers."""
        lo, hi, nan, _ = self._table.look_up(numbers)
        return lo, hi, nan

    def inputs_of(self, node: fx.Node) -> tuple[str, ...]:
        """Placeholder names of the inputs whose values reach `node`, in the graph's order."""
        names = input_names(self._program)
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in found:
                found.add(current)
                stack.extend(() if operator_name(current) in _SHAPE_ONLY else current.all_input_nodes)
        return tuple(x.name for x in sorted(found) if x.op == "placeholder" and x.name in names)

    def _pending(self, node: fx.Node) -> list[fx.Node]:
        """The node and its ancestors that have no value yet, in graph order."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in found and current not in self._values:
                found.add(current)
                stack.extend(_operands(current))
        return sorted(found)

    def _evaluate(self, node: fx.Node) -> NumbersValue:
        result = node.meta.get("val")
        if node.op == "placeholder":
            return self._placeholder(node) if isinstance(result, Tensor) else None
        if node.op != "call_function" or not isinstance(result, Tensor | list | tuple) or not _is_static(result):
            return None
        value = self._call(node)
        if isinstance(result, Tensor):
            fits = isinstance(value, Numbers) and value.shape == tuple(result.shape)
            return value if fits else self._unknown(result)
        if isinstance(value, list) and len(value) == len(result):
            return [
                self._unknown(x) if y is None and isinstance(x, Tensor) else y
                for x, y in zip(result, value, strict=True)
            ]
        return [self._unknown(x) if isinstance(x, Tensor) else None for x in result]

    def _call(self, node: fx.Node) -> NumbersValue:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            values = self._values.get(source)
            return values[index] if isinstance(values, list) else None
        name = operator_name(node)
        if name is None or not _is_followed(node):
            return None
        if name in MOVEMENT_RULES:
            try:
                value = MOVEMENT_RULES[name](self, node)
            except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
                # An overload with other arguments than the rule reads: it is as one without a rule.
                value = None
            if value is not None:
                return value
        if _is_elementwise(node) and isinstance(node.meta["val"], Tensor):
            return self._elementwise(node, name)
        return self._computed(node)

    # Sources

    def _placeholder(self, node: fx.Node) -> Numbers | None:
        result = node.meta["val"]
        spec = self._specs.get(node.name)
        stored = None if spec is None else self._stored(spec)
        if stored is not None and stored.shape == result.shape and stored.dtype == result.dtype:
            return self.constant(stored)
        if node.name in self._assume:
            count = result.numel()
            if count > LARGEST:
                return None
            low, high = (torch.full((count,), float(x), dtype=torch.float64) for x in self._assume[node.name])
            numbers = self._table.add(low, high, torch.zeros(count, dtype=torch.bool))
            return Numbers.of(numbers.reshape(result.shape))
        return self._unknown(result)

    def _stored(self, spec: InputSpec) -> Tensor | None:
        """The value of a constant or of a buffer that no call changes, if it is at hand."""
        exported = self._program.exported
        target = spec.target or ""
        if spec.kind is InputKind.CONSTANT_TENSOR or (spec.kind is InputKind.BUFFER and spec.persistent is False):
            value = exported.constants.get(target)
        elif spec.kind is InputKind.BUFFER:
            value = exported.state_dict.get(target)
            if value is None or not _is_real(value):
                return None
            try:
                value = self._program.weights.load(target)
            except WeightsError:
                return None
        else:
            return None
        if target in exported.graph_signature.buffers_to_mutate.values():
            return None
        if not isinstance(value, Tensor) or not _is_real(value) or value.numel() > LARGEST:
            return None
        return value.detach().cpu()

    def constant(self, values: Tensor, shape: Sequence[int] | None = None) -> Numbers:
        """Known values, repeated along axes of size 1 where `shape` is given."""
        return Numbers.of(self._table.add_constants(values), shape)

    def _unknown(self, result: Tensor) -> Numbers | None:
        """New values of which only the dtype is known."""
        count = result.numel()
        if count > LARGEST:
            return None
        low, high = dtype_limits(result.dtype)
        lo, hi = (torch.full((count,), x, dtype=torch.float64) for x in (low, high))
        nan = torch.full((count,), result.dtype.is_floating_point or result.dtype.is_complex)
        return Numbers.of(self._table.add(lo, hi, nan).reshape(tuple(result.shape)))

    # Operations

    def value(self, source: Any) -> Numbers:
        """The numbers of an operand; raises ValueError where there are none, which makes the result unknown."""
        numbers = self._values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(numbers, Numbers):
            raise ValueError("no value numbers")
        return numbers

    def exact(self, source: Any) -> Tensor:
        """The real tensor that an operand is known to be; raises ValueError where it is not."""
        numbers = self.value(source)
        dense = numbers.dense()
        values = None if dense is None else self._exact_values(dense, source.meta["val"].dtype)
        if values is None:
            raise ValueError("not a constant")
        return values

    def _exact_values(self, numbers: Tensor, dtype: torch.dtype) -> Tensor | None:
        lo, _, _, constant = self._table.look_up(numbers)
        return lo.to(dtype) if bool(constant.all()) else None

    def _computed(self, node: fx.Node) -> NumbersValue:
        """What an operation on known tensors yields, by carrying it out; None where an operand is not known."""
        if "empty" in str(operator_name(node)) or sum(element_counts(node)) > LARGEST:
            return None
        try:
            known = {source: self.exact(source) for source in _operands(node)}
        except ValueError:
            return None
        result = carry_out(node, known)
        if isinstance(result, Tensor):
            return self.constant(result)
        if isinstance(result, list | tuple):
            return [self.constant(x) if isinstance(x, Tensor) else None for x in result]
        return None

    def _elementwise(self, node: fx.Node, name: str) -> NumbersValue:
        """Every combination of operand numbers once: carried out where all are known, else by the rule's bounds."""
        operands = _operands(node)
        values = [self._values.get(source) for source in operands]
        numbers = [value for value in values if isinstance(value, Numbers)]
        if len(numbers) != len(values) or not numbers:
            return None
        aligned = align(numbers)
        if aligned is None or 0 in aligned.shape:
            return None
        columns, place, shape = _combinations(aligned.cores)
        result = torch.full((len(columns[0]),), NO_NUMBER)
        known = torch.ones(len(columns[0]), dtype=torch.bool)
        for column in columns:
            known &= self._table.look_up(column)[3]
        if bool(known.any()):
            computed = self._compute_pointwise(node, operands, [column[known] for column in columns])
            if computed is None:
                return None
            result[known] = self._table.add_constants(computed)
        if not bool(known.all()):
            result[~known] = self._bound_pointwise(node, name, operands, [column[~known] for column in columns])
        return Numbers(aligned.shape, result[place].reshape(shape), aligned.places)

    def _compute_pointwise(
        self, node: fx.Node, operands: Sequence[fx.Node], columns: Sequence[Tensor]
    ) -> Tensor | None:
        known: dict[fx.Node, Tensor] = {}
        for source, column in zip(operands, columns, strict=True):
            value = source.meta["val"]
            # A tensor without axes is weaker than others in type promotion: it must stay one.
            values = self._exact_values(column[:1].reshape(()) if value.dim() == 0 else column, value.dtype)
            assert values is not None
            known[source] = values
        result = carry_out(node, known, pointwise=True)
        if not isinstance(result, Tensor) or result.dtype != node.meta["val"].dtype:
            return None
        return result.expand(len(columns[0])) if result.dim() == 0 else result

    def _bound_pointwise(
        self, node: fx.Node, name: str, operands: Sequence[fx.Node], columns: Sequence[Tensor]
    ) -> Tensor:
        count = len(columns[0])
        dtype = node.meta["val"].dtype
        ranges: dict[fx.Node, Range] = {}
        for source, column in zip(operands, columns, strict=True):
            lo, hi, nan, _ = self._table.look_up(column)
            ranges[source] = Range(lo, hi, nan, column, source.meta["val"].dtype)
        rule = RULES.get(name)
        bounded: Range | None = None
        if rule is not None and not dtype.is_complex:
            args, kwargs = replaced(node, ranges)
            bounded = rule(dtype, count, args, kwargs)
        if bounded is None:
            low, high = dtype_limits(dtype)
            lo, hi = (torch.full((count,), x, dtype=torch.float64) for x in (low, high))
            return self._table.add(lo, hi, torch.full((count,), dtype.is_floating_point or dtype.is_complex))
        if name in ARITHMETIC and not dtype.is_floating_point:
            # Whole numbers without a bound may wrap around, and then the other bound does not hold either.
            unbounded = bounded.lo.isinf() | bounded.hi.isinf()
            lo, hi = torch.where(unbounded, -INF, bounded.lo), torch.where(unbounded, INF, bounded.hi)
            bounded = replace(bounded, lo=lo, hi=hi)
        return self._settle(bounded, dtype)

    def _settle(self, bounded: Range, dtype: torch.dtype) -> Tensor:
        """Numbers of a rule's results, with the bounds that values of the dtype can have."""
        lo, hi, nan = bounded.lo, bounded.hi, bounded.nan
        if dtype.is_floating_point:
            lo = lo.to(dtype).double().nan_to_num(-INF, INF, -INF)
            hi = hi.to(dtype).double().nan_to_num(INF, INF, -INF)
        elif dtype is torch.bool:
            lo, hi, nan = lo.clamp(0, 1), hi.clamp(0, 1), torch.zeros_like(nan)
        else:
            low, high = dtype_limits(dtype)
            large = (lo.isfinite() & (lo < -LARGEST_EXACT)) | (hi.isfinite() & (hi > LARGEST_EXACT))
            wraps = (lo < low) | (hi > high) | large | nan
            lo, hi = torch.where(wraps, low, lo), torch.where(wraps, high, hi)
            nan = torch.zeros_like(nan)
        numbers = bounded.number.clone()
        given = numbers == CONSTANT
        numbers[given] = self._table.add_constants(bounded.lo[given])
        fixed = (lo == hi) & ~nan & (numbers == NO_NUMBER)
        if dtype.is_floating_point:
            # Of a zero that depends on an input the sign is not known: it is no constant.
            fixed &= lo != 0
        numbers[fixed] = self._table.add_constants(lo[fixed])
        new = numbers == NO_NUMBER
        numbers[new] = self._table.add(lo[new], hi[new], nan[new])
        return numbers

    def reduce(self, node: fx.Node, dims: list[int], rule: Reduction) -> Numbers | None:
        """Values over some axes of the first operand, by a rule over their bounds; axes are kept with size 1."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        spread = self.value(source).spread(dims)
        if spread is None or 0 in spread.shape:
            return None
        lo, hi, nan, _ = self._table.look_up(spread.core)
        result = node.meta["val"]
        dtype = (result if isinstance(result, Tensor) else result[0]).dtype
        bounded = rule(Range(lo, hi, nan, spread.core, source.meta["val"].dtype), dims, dtype)
        if bounded is None:
            return None
        core_shape = [1 if d in dims else n for d, n in enumerate(spread.core.shape)]
        shape = [1 if d in dims else n for d, n in enumerate(spread.shape)]
        kept = [d for d in range(len(shape)) if d not in dims]
        rows = spread.core.permute(*kept, *dims).reshape(math.prod(core_shape), -1)
        if rows.numel() > _LARGEST_COMPARED:
            group = torch.arange(len(rows))
        else:
            _, group = torch.unique(rows, dim=0, return_inverse=True)
        first = representatives(group)
        lo, hi, nan = (x.reshape(-1)[first] for x in (bounded.lo, bounded.hi, bounded.nan))
        numbers = self._settle(Range(lo, hi, nan, torch.full_like(first, NO_NUMBER)), dtype)[group]
        places = tuple(None if d in dims else p for d, p in enumerate(spread.places))
        return Numbers(tuple(shape), numbers.reshape(core_shape), places)

    def accumulate(self, node: fx.Node, numbers: Numbers, dim: int) -> Numbers | None:
        """Running sums along an axis."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        spread = numbers.spread([dim])
        if spread is None:
            return None
        dtype = node.meta["val"].dtype
        lo, hi, nan, _ = self._table.look_up(spread.core)
        if not adds_exactly(Range(lo, hi, nan, spread.core, source.meta["val"].dtype), dtype):
            return None
        nan = nan.long().cumsum(dim) > 0
        lo, hi, nan = (x.reshape(-1) for x in (lo.cumsum(dim), hi.cumsum(dim), nan))
        sums = self._settle(Range(lo, hi, nan, torch.full((spread.core.numel(),), NO_NUMBER)), dtype)
        return replace(spread, core=sums.reshape(spread.core.shape))

    def cast(self, numbers: Numbers, source: torch.dtype, target: torch.dtype) -> Numbers:
        """The values of dtype `source` converted to `target`."""
        if source == target or source.is_complex or target.is_complex:
            return numbers if source == target else self._renewed(numbers)
        column, place = torch.unique(numbers.core, return_inverse=True)
        lo, hi, nan, known = self._table.look_up(column)
        result = torch.empty_like(column)
        result[known] = self._table.add_constants(lo[known].to(source).to(target))
        others = Range(lo[~known], hi[~known], nan[~known], column[~known], source)
        result[~known] = self._settle(convert(others, target), target)
        return replace(numbers, core=result[place].reshape(numbers.core.shape))

    def _renewed(self, numbers: Numbers) -> Numbers:
        """New values for old ones of which nothing more is known, equal where these are."""
        column, place = torch.unique(numbers.core, return_inverse=True)
        infinite = torch.full((len(column),), INF, dtype=torch.float64)
        fresh = self._table.add(-infinite, infinite, infinite > 0)
        return replace(numbers, core=fresh[place].reshape(numbers.core.shape))

    def filled(self, value: Tensor, shape: Sequence[int]) -> Numbers:
        """One value everywhere."""
        ones = torch.ones(tuple(min(n, 1) for n in shape), dtype=torch.int64)
        return Numbers.of(ones * self._table.add_constants(value), shape)


def input_names(program: Program) -> set[str]:
    """Placeholder names of the program's tensor inputs."""
    return {
        spec.arg.name
        for spec in program.exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    }


def _is_static(result: Any) -> bool:
    leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return all(isinstance(n, int) for x in leaves for n in x.shape)


def _is_real(value: Tensor) -> bool:
    return not isinstance(value, FakeTensor) and value.device.type != "meta"


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return torch.Tag.pointwise in target.tags or operator_name(node) in RULES


def _is_followed(node: fx.Node) -> bool:
    """Whether the result may depend on the operands alone, and knowing them may help."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return operator_name(node) not in _OPAQUE


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values can matter for this one's."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return list(node.all_input_nodes)
    name = operator_name(node)
    if name is None or name in _SHAPE_ONLY or not _is_followed(node):
        return []
    return list(node.all_input_nodes)


def _combinations(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, tuple[int, ...]]:
    """Distinct combinations of broadcast operands: each one's numbers [n], every element's place, the shape."""
    shape = tuple(torch.broadcast_shapes(*(core.shape for core in cores)))
    code = torch.zeros((), dtype=torch.int64)
    count = 1
    for core in cores:
        found, place = torch.unique(core, return_inverse=True)
        if count * len(found) >= 2**62:
            _, code = torch.unique(code, return_inverse=True)
            count = int(code.max()) + 1
        code = code * len(found) + place
        count *= len(found)
    _, group = torch.unique(code.expand(shape).reshape(-1), return_inverse=True)
    first = representatives(group)
    return [core.expand(shape).reshape(-1)[first] for core in cores], group, shape
