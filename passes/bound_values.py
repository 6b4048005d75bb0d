"""Bound the values of a graph's tensors for every value of its inputs, and say which of them are equal.

Abstract interpretation over passes.value_numbers: every element has a number, a number has a lower and an upper bound,
and two elements of one number hold the same value whatever the inputs are. What no input reaches is computed; what an
operation without a rule makes is unknown. Only the ancestors of the asked node are looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

from t3compile.errors import InputsError, WeightsError
from t3compile.passes.value_numbers import LARGEST, Numbers, align, concatenate, representatives
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
    all_of,
    any_of,
    convert,
    dtype_limits,
    largest_of,
    smallest_of,
    sum_of,
)
from t3compile.program import Program

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


class NumberTable:
    """Bounds of all value numbers; a constant has one number, whatever its dtype."""

    def __init__(self) -> None:
        self._bounds = torch.empty(2, 0, dtype=torch.float64)
        self._flags = torch.empty(2, 0, dtype=torch.bool)  # may be NaN; is a constant
        self._size = 0
        self._bits = torch.empty(0, dtype=torch.int64)  # sorted bit patterns of the constants
        self._bit_numbers = torch.empty(0, dtype=torch.int64)

    def look_up(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lo, hi, may be NaN, is a constant."""
        return (*(row[numbers] for row in self._bounds), *(row[numbers] for row in self._flags))

    def add(self, lo: Tensor, hi: Tensor, nan: Tensor) -> Tensor:
        """New numbers [n] for values of which only the bounds [n] are known."""
        return self._append(lo, hi, nan, constant=False)

    def add_constants(self, values: Tensor) -> Tensor:
        """Numbers of known values, in the values' shape."""
        flat = values.reshape(-1)
        if flat.is_complex():
            count = torch.ones(len(flat), dtype=torch.float64)
            return self.add(-INF * count, INF * count, count.bool()).reshape(values.shape)
        exact = flat.to(torch.float64)
        odd = exact.isnan()
        if not values.is_floating_point() and values.dtype is not torch.bool:
            odd = odd | (exact.abs() >= LARGEST_EXACT)
        bits, place = torch.unique(exact.view(torch.int64), return_inverse=True)
        at = torch.searchsorted(self._bits, bits)
        known = at < len(self._bits)
        known[known.clone()] = self._bits[at[known]] == bits[known]
        fresh = bits[~known]
        if len(fresh):
            new = fresh.view(torch.float64)
            nan = new.isnan()
            added = self._append(new.nan_to_num(-INF, INF, -INF), new.nan_to_num(INF, INF, -INF), nan, True)
            self._flags[1, added[nan]] = False
            merged, order = torch.cat([self._bits, fresh]).sort()
            self._bits, self._bit_numbers = merged, torch.cat([self._bit_numbers, added])[order]
            at = torch.searchsorted(self._bits, bits)
        numbers = self._bit_numbers[at][place]
        if bool(odd.any()):
            # An integer that float64 cannot hold, or NaN, which is not even equal to itself.
            large = exact[odd].nan_to_num(0.0)
            lo = torch.where(large > 0, LARGEST_EXACT, -INF)
            hi = torch.where(large < 0, -LARGEST_EXACT, INF)
            numbers[odd] = self.add(lo.double(), hi.double(), exact[odd].isnan())
        return numbers.reshape(values.shape)

    def _append(self, lo: Tensor, hi: Tensor, nan: Tensor, constant: bool) -> Tensor:
        count = len(lo)
        needed = self._size + count
        if needed > self._bounds.shape[1]:
            room = max(needed, 2 * self._size, 1024)
            for name in ("_bounds", "_flags"):
                old = getattr(self, name)
                grown = torch.empty(2, room, dtype=old.dtype)
                grown[:, : self._size] = old[:, : self._size]
                setattr(self, name, grown)
        self._bounds[0, self._size : needed] = lo
        self._bounds[1, self._size : needed] = hi
        self._flags[0, self._size : needed] = nan
        self._flags[1, self._size : needed] = constant
        numbers = torch.arange(self._size, needed)
        self._size = needed
        return numbers


Value = Numbers | list[Numbers | None] | None
Structure = Callable[["ValueBounds", fx.Node], Value]


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
        self._values: dict[fx.Node, Value] = {}
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
        """Value numbers of the tensor that `node` yields; None where it is too large or not a tensor."""
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
                stack.extend(() if _name(current) in _SHAPE_ONLY else current.all_input_nodes)
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

    def _evaluate(self, node: fx.Node) -> Value:
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

    def _call(self, node: fx.Node) -> Value:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            values = self._values.get(source)
            return values[index] if isinstance(values, list) else None
        name = _name(node)
        if name is None or not _is_followed(node):
            return None
        if name in _STRUCTURES:
            try:
                value = _STRUCTURES[name](self, node)
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

    def _computed(self, node: fx.Node) -> Value:
        """What an operation on known tensors yields, by carrying it out; None where an operand is not known."""
        if "empty" in str(_name(node)) or sum(_sizes(node)) > LARGEST:
            return None
        try:
            known = {source: self.exact(source) for source in _operands(node)}
        except ValueError:
            return None
        result = _carry_out(node, known)
        if isinstance(result, Tensor):
            return self.constant(result)
        if isinstance(result, list | tuple):
            return [self.constant(x) if isinstance(x, Tensor) else None for x in result]
        return None

    def _elementwise(self, node: fx.Node, name: str) -> Value:
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
        result = _carry_out(node, known, pointwise=True)
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
            args, kwargs = _replaced(node, ranges)
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


def _name(node: fx.Node) -> str | None:
    """The operator's name without namespace and overload, for aten's own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet: str = target.overloadpacket.__name__
    if target._overloadname == "other" and packet in ("max", "min"):
        return f"{packet}imum"
    return _SAME_AS.get(packet, packet)


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return torch.Tag.pointwise in target.tags or _name(node) in RULES


def _is_followed(node: fx.Node) -> bool:
    """Whether the result may depend on the operands alone, and knowing them may help."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return _name(node) not in _OPAQUE


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values can matter for this one's."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return list(node.all_input_nodes)
    name = _name(node)
    if name is None or name in _SHAPE_ONLY or not _is_followed(node):
        return []
    return list(node.all_input_nodes)


def _sizes(node: fx.Node) -> Iterable[int]:
    return (x.numel() for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor))


def _replaced(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments with values in place of nodes."""
    args, kwargs = pytree.tree_map_only(fx.Node, lambda used: values.get(used, used), (node.args, node.kwargs))
    return list(args), dict(kwargs)


def _carry_out(node: fx.Node, known: Mapping[fx.Node, Tensor], pointwise: bool = False) -> Any:
    """The call on real tensors; None where torch refuses."""
    args, kwargs = _replaced(node, known)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if pointwise:
        kwargs.pop("memory_format", None)
    args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return None


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


# Operations that move values.


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the schema's names, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def _out_shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _same(analysis: ValueBounds, node: fx.Node) -> Value:
    return analysis.value(node.args[0])


def _reshaped(analysis: ValueBounds, node: fx.Node) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.meta["val"].dtype != source.meta["val"].dtype:
        return None  # a view of the same bytes as another dtype
    return analysis.value(source).reshape(_out_shape(node))


def _expanded(analysis: ValueBounds, node: fx.Node) -> Value:
    return analysis.value(node.args[0]).expand(_out_shape(node))


def _permuted(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    rank = len(numbers.shape)
    return numbers.permute([d % rank for d in _arguments(node)["dims"]])


def _transposed(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    rank = len(numbers.shape)
    dims = list(range(rank))
    if rank > 1:
        given = _arguments(node)
        a, b = given.get("dim0", given.get("axis0", 0)) % rank, given.get("dim1", given.get("axis1", 1)) % rank
        dims[a], dims[b] = dims[b], dims[a]
    return numbers.permute(dims)


def _sliced(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    given = _arguments(node)
    dim = given["dim"] % len(numbers.shape)
    return numbers.take(dim, torch.arange(numbers.shape[dim])[slice(given["start"], given["end"], given["step"])])


def _narrowed(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    given = _arguments(node)
    dim = given["dim"] % len(numbers.shape)
    start = given["start"] % numbers.shape[dim]
    return numbers.slice(dim, start, start + given["length"])


def _selected(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    given = _arguments(node)
    dim = given["dim"] % len(numbers.shape)
    index = given["index"] % numbers.shape[dim]
    return numbers.slice(dim, index, index + 1).reshape(_out_shape(node))


def _cut(analysis: ValueBounds, node: fx.Node) -> Value:
    """split, chunk: consecutive stretches of one axis."""
    numbers = analysis.value(node.args[0])
    dim = _arguments(node)["dim"] % len(numbers.shape)
    stops = torch.tensor([value.shape[dim] for value in node.meta["val"]]).cumsum(0).tolist()
    return [numbers.slice(dim, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _unbound(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    dim = _arguments(node)["dim"] % len(numbers.shape)
    shape = (*numbers.shape[:dim], *numbers.shape[dim + 1 :])
    return [numbers.slice(dim, i, i + 1).reshape(shape) for i in range(numbers.shape[dim])]


def _index_selected(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    given = _arguments(node)
    return numbers.take(given["dim"] % len(numbers.shape), analysis.exact(given["index"]).reshape(-1).long())


def _flipped(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    for dim in _arguments(node)["dims"]:
        dim %= len(numbers.shape)
        numbers = numbers.take(dim, torch.arange(numbers.shape[dim]).flip(0))
    return numbers


def _repeated(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers = analysis.value(node.args[0])
    given = _arguments(node)
    repeats = list(given["repeats"] if "repeats" in given else given["dims"])
    numbers = numbers.lifted(max(len(repeats), len(numbers.shape)))
    repeats = [1] * (len(numbers.shape) - len(repeats)) + repeats
    for dim, repeat in enumerate(repeats):
        if repeat != 1:
            numbers = numbers.take(dim, torch.arange(numbers.shape[dim]).repeat(repeat))
    return numbers


def _interleaved(analysis: ValueBounds, node: fx.Node) -> Value:
    given = _arguments(node)
    numbers = analysis.value(given["self"])
    if not isinstance(given["repeats"], int) or given["dim"] is None:
        return None
    dim = given["dim"] % len(numbers.shape)
    return numbers.take(dim, torch.arange(numbers.shape[dim]).repeat_interleave(given["repeats"]))


def _cat(analysis: ValueBounds, node: fx.Node) -> Value:
    result = node.meta["val"]
    given = _arguments(node)
    tensors = [x for x in given["tensors"] if x.meta["val"].dim() == result.dim()]
    parts = [analysis.cast(analysis.value(x), x.meta["val"].dtype, result.dtype) for x in tensors]
    return concatenate(parts, given["dim"] % result.dim())


def _stacked(analysis: ValueBounds, node: fx.Node) -> Value:
    result = node.meta["val"]
    given = _arguments(node)
    dim = given["dim"] % result.dim()
    parts: list[Numbers] = []
    for x in given["tensors"]:
        numbers = analysis.cast(analysis.value(x), x.meta["val"].dtype, result.dtype)
        reshaped = numbers.reshape((*numbers.shape[:dim], 1, *numbers.shape[dim:]))
        if reshaped is None:
            return None
        parts.append(reshaped)
    return concatenate(parts, dim)


def _padded(analysis: ValueBounds, node: fx.Node) -> Value:
    numbers: Numbers | None = analysis.value(node.args[0])
    given = _arguments(node)
    if given.get("mode", "constant") != "constant":
        return None
    fill = torch.full((), given["value"] or 0, dtype=node.meta["val"].dtype)
    pads = given["pad"]
    for i in range(len(pads) // 2):
        if numbers is None:
            return None
        dim = len(numbers.shape) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        numbers = numbers.slice(dim, max(-before, 0), numbers.shape[dim] - max(-after, 0))
        around = [
            analysis.filled(fill, (*numbers.shape[:dim], max(size, 0), *numbers.shape[dim + 1 :]))
            for size in (before, after)
        ]
        numbers = concatenate([around[0], numbers, around[1]], dim)
    return numbers


def _filled(analysis: ValueBounds, node: fx.Node) -> Value:
    """full, zeros, ones and their kin."""
    name = _name(node)
    assert name is not None
    given = _arguments(node)
    value = given.get("fill_value", given.get("value", 1.0 if "ones" in name else 0.0))
    result = node.meta["val"]
    if isinstance(value, fx.Node):
        source = analysis.cast(analysis.value(value), value.meta["val"].dtype, result.dtype)
        return source.expand(_out_shape(node))
    if isinstance(value, complex):
        return None
    return analysis.filled(torch.full((), value, dtype=result.dtype), _out_shape(node))


def _converted(analysis: ValueBounds, node: fx.Node) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)


def _copied(analysis: ValueBounds, node: fx.Node) -> Value:
    source = node.args[1]
    assert isinstance(source, fx.Node)
    numbers = analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)
    return numbers.expand(_out_shape(node))


def _slice_scattered(analysis: ValueBounds, node: fx.Node) -> Value:
    """Contiguous stretches only: what is before, the new values, what is behind."""
    given = _arguments(node)
    base = analysis.value(given["self"])
    dim = given["dim"] % len(base.shape)
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(base.shape[dim])
    if step != 1:
        return None
    return _with_stretch(analysis, node, base, given["src"], dim, start, max(stop, start))


def _select_scattered(analysis: ValueBounds, node: fx.Node) -> Value:
    given = _arguments(node)
    base = analysis.value(given["self"])
    dim = given["dim"] % len(base.shape)
    index = given["index"] % base.shape[dim]
    return _with_stretch(analysis, node, base, given["src"], dim, index, index + 1)


def _with_stretch(
    analysis: ValueBounds, node: fx.Node, base: Numbers, source: fx.Node, dim: int, start: int, stop: int
) -> Value:
    inserted: Numbers | None = analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)
    shape = (*base.shape[:dim], stop - start, *base.shape[dim + 1 :])
    if inserted is not None and len(inserted.shape) < len(shape):
        inserted = inserted.reshape(shape)
    if inserted is None or start == stop:
        return base if start == stop else None
    parts = [base.slice(dim, 0, start), inserted.expand(shape), base.slice(dim, stop, base.shape[dim])]
    return concatenate(parts, dim)


def _triangle(analysis: ValueBounds, node: fx.Node) -> Value:
    """tril, triu: zeros outside of the triangle."""
    dense = analysis.value(node.args[0]).dense()
    if dense is None:
        return None
    inside = torch.ones(dense.shape[-2:], dtype=torch.bool)
    diagonal = _arguments(node)["diagonal"]
    inside = inside.tril(diagonal) if _name(node) == "tril" else inside.triu(diagonal)
    zero = analysis.constant(torch.zeros((), dtype=node.meta["val"].dtype)).core
    return Numbers.of(torch.where(inside, dense, zero))


def _moved(analysis: ValueBounds, node: fx.Node) -> Value:
    """Operations that only move values to constant places, carried out on the numbers themselves."""
    given = _arguments(node)
    if given.get("accumulate") or given.get("reduce"):
        return None
    dtype = node.meta["val"].dtype
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("self", "src", "source", "values") and isinstance(value, fx.Node):
            dense = analysis.value(value).dense()
            if dense is None or value.meta["val"].dtype != dtype:
                return None
            arguments[name] = dense
        elif name == "value":
            arguments[name] = int(analysis.constant(torch.full((), value, dtype=dtype)).core)
        else:
            arguments[name] = fx.map_arg(value, analysis.exact)
    if sum(_sizes(node)) > LARGEST:
        return None
    assert callable(node.target)
    moved = node.target(**arguments)
    return Numbers.of(moved)


def _dims(node: fx.Node) -> list[int]:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dim = _arguments(node).get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)] if rank else []


def _reduced(rule: Reduction) -> Structure:
    def reduction(analysis: ValueBounds, node: fx.Node) -> Value:
        dims = _dims(node)
        if not dims:
            return None
        reduced = analysis.reduce(node, dims, rule)
        result = node.meta["val"]
        if isinstance(result, Tensor):
            return None if reduced is None else reduced.reshape(tuple(result.shape))
        # max and min along an axis also say where; of that nothing is known.
        return [None if reduced is None else reduced.reshape(tuple(result[0].shape)), None]

    return reduction


def _accumulated(analysis: ValueBounds, node: fx.Node) -> Value:
    """cumsum."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    numbers = analysis.value(source)
    if not numbers.shape:
        return None
    return analysis.accumulate(node, numbers, _arguments(node)["dim"] % len(numbers.shape))


_STRUCTURES: dict[str, Structure] = {
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh"), _same),
    **dict.fromkeys(
        ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "ravel"),
        _reshaped,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t"), _transposed),
    "slice": _sliced,
    "narrow": _narrowed,
    "select": _selected,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _cut),
    "unbind": _unbound,
    "index_select": _index_selected,
    "flip": _flipped,
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _interleaved,
    "cat": _cat,
    "stack": _stacked,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    **dict.fromkeys(
        (
            *("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"),
            *("fill", "zero"),
        ),
        _filled,
    ),
    "to": _converted,
    "copy": _copied,
    "slice_scatter": _slice_scattered,
    "select_scatter": _select_scattered,
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(
        (
            *("gather", "take_along_dim", "index", "index_put", "index_copy", "scatter", "roll", "movedim"),
            *("diagonal", "unfold", "rot90"),
        ),
        _moved,
    ),
    "any": _reduced(any_of),
    "all": _reduced(all_of),
    **dict.fromkeys(("amax", "max"), _reduced(largest_of)),
    **dict.fromkeys(("amin", "min"), _reduced(smallest_of)),
    "sum": _reduced(sum_of),
    "cumsum": _accumulated,
}

_SAME_AS = {
    "_to_copy": "to",
    "type_as": "to",
    "_unsafe_view": "view",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "unsafe_split": "split",
    "unsafe_split_with_sizes": "split_with_sizes",
    "unsafe_chunk": "chunk",
}

# Of these only the operand's shape and dtype count.
_SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero", "empty_like", "new_empty"}
)

# Nothing is said of what these make, so their operands are not looked at.
_OPAQUE = frozenset(
    {
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "embedding"),
        *("convolution", "conv1d", "conv2d", "conv3d", "layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
        *("native_group_norm", "batch_norm", "softmax", "_softmax", "empty_like", "new_empty", "empty"),
    }
)
