"""Rules for values of which only bounds are known: what operations make of intervals.

Rounding is monotone, so bounds are rounded like values; what torch may compute before or after a conversion is bounded
for both. A rule that cannot say anything returns None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INF = math.inf
# Whole numbers up to here are exact in the bounds' float64.
LARGEST_EXACT = 2.0**53
# In place of a value's number: one of its own is to be made, or that of the constant which the bounds give.
NO_NUMBER = -1
CONSTANT = -2


@dataclass(frozen=True, eq=False)
class Range:
    """Bounds of a list of values: ``lo``, ``hi`` float64, ``nan`` bool, and the number of a value that they equal.

    ``number`` is -1 where the value is a new one.
    """

    lo: Tensor
    hi: Tensor
    nan: Tensor
    number: Tensor
    dtype: torch.dtype | None = None

    @classmethod
    def make(cls, lo: Tensor, hi: Tensor, nan: Tensor, number: Tensor | None = None) -> Range:
        """Bounds that arithmetic made: what is not a number bounds nothing, and the value may be NaN."""
        lo, hi, nan = (torch.as_tensor(x) for x in (lo, hi, nan))
        broken = lo.isnan() | hi.isnan()
        number = torch.full(lo.shape, NO_NUMBER) if number is None else number
        return cls(lo.nan_to_num(-INF, INF, -INF), hi.nan_to_num(INF, INF, -INF), nan | broken, number)

    @property
    def is_constant(self) -> Tensor:
        return (self.lo == self.hi) & ~self.nan


# A rule gets the result's dtype, the number of values n, and the call's arguments with Range for tensors.
Rule = Callable[[torch.dtype, int, list[Any], dict[str, Any]], Range | None]
# One over axes gets these, which it keeps with size 1, and the result's dtype.
Reduction = Callable[[Range, list[int], torch.dtype], Range | None]


def dtype_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Lowest and highest value; infinite for integers that float64 cannot hold, too."""
    if dtype is torch.bool:
        return 0.0, 1.0
    if dtype.is_floating_point or dtype.is_complex:
        return -INF, INF
    limits = torch.iinfo(dtype)
    return (limits.min, limits.max) if limits.max < LARGEST_EXACT else (-INF, INF)


def _operand(given: Range | float, dtype: torch.dtype, count: int) -> Range:
    """An operand of arithmetic in `dtype`, bounded before and after torch's conversion to it."""
    if isinstance(given, Range):
        x = given
    else:
        value = torch.full((count,), float(given), dtype=torch.float64)
        number = torch.full((count,), CONSTANT)
        x = Range(value, value, torch.zeros(count, dtype=torch.bool), number)
    if dtype is torch.bool or x.dtype is dtype:
        return x
    if not dtype.is_floating_point:
        return _to_integer(x, dtype)
    kept = x.number if x.dtype is None else _kept_number(x, dtype)
    lo, hi = _hull(x, (dtype, torch.float64 if dtype is torch.float64 else torch.float32))
    return Range(lo, hi, x.nan, torch.where((lo == x.lo) & (hi == x.hi), kept, NO_NUMBER), dtype)


def _hull(x: Range, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor]:
    lo, hi = x.lo, x.hi
    for dtype in dtypes:
        # What overflows a dtype without infinities becomes NaN, which bounds nothing.
        lo = torch.minimum(lo, x.lo.to(dtype).double().nan_to_num(-INF, INF, -INF))
        hi = torch.maximum(hi, x.hi.to(dtype).double().nan_to_num(INF, INF, -INF))
    return lo, hi


def _kept_number(x: Range, dtype: torch.dtype) -> Tensor:
    """The numbers of values that the conversion to a floating dtype does not change."""
    source = x.dtype
    assert source is not None
    if source.is_floating_point:
        keeps = torch.full(x.lo.shape, torch.promote_types(source, dtype) is dtype)
    else:
        largest = 1 / torch.finfo(dtype).eps
        keeps = (x.lo >= -largest) & (x.hi <= largest)
    return torch.where(keeps, x.number, NO_NUMBER)


def _to_integer(x: Range, dtype: torch.dtype) -> Range:
    low, high = dtype_limits(dtype)
    largest = min(high, LARGEST_EXACT)
    lo, hi = x.lo.trunc(), x.hi.trunc()
    wraps = (lo < max(low, -largest)) | (hi > largest) | x.nan
    whole = x.dtype is None or not x.dtype.is_floating_point
    number = torch.where(wraps, NO_NUMBER, x.number) if whole else torch.full_like(x.number, NO_NUMBER)
    return Range(torch.where(wraps, low, lo), torch.where(wraps, high, hi), torch.zeros_like(x.nan), number, dtype)


def _truth(x: Any, count: int) -> Range:
    """Whether values are not zero."""
    x = _operand(x, torch.bool, count)
    nonzero = (x.lo > 0) | (x.hi < 0)
    zero = (x.lo == 0) & (x.hi == 0) & ~x.nan
    number = torch.full_like(x.number, NO_NUMBER)
    if x.dtype is not None and not x.dtype.is_floating_point:
        number = torch.where((x.lo >= 0) & (x.hi <= 1), x.number, number)
    return Range(nonzero.double(), (~zero).double(), torch.zeros_like(x.nan), number, torch.bool)


def convert(x: Range, dtype: torch.dtype) -> Range:
    """A cast."""
    if dtype is torch.bool:
        return _truth(x, len(x.lo))
    if not dtype.is_floating_point:
        return _to_integer(x, dtype)
    return Range(x.lo, x.hi, x.nan, _kept_number(x, dtype), dtype)


def _sum(a: Range, b: Range) -> Range:
    opposite = ((a.lo == -INF) & (b.hi == INF)) | ((a.hi == INF) & (b.lo == -INF))
    lo, hi = a.lo + b.lo, a.hi + b.hi
    return Range.make(lo.nan_to_num(-INF, INF, -INF), hi.nan_to_num(INF, INF, -INF), a.nan | b.nan | opposite)


def _negative(a: Range) -> Range:
    return Range.make(-a.hi, -a.lo, a.nan)


def _product(a: Range, b: Range) -> Range:
    corners = torch.stack([x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)])
    # Zero times infinity is NaN when it happens; the limit of what is beside it is zero.
    lo, hi = (f(corners.nan_to_num(0.0, INF, -INF), 0) for f in (torch.amin, torch.amax))
    return Range.make(lo, hi, a.nan | b.nan | _zero_meets_infinity(a, b) | _zero_meets_infinity(b, a))


def _zero_meets_infinity(a: Range, b: Range) -> Tensor:
    return (a.lo <= 0) & (a.hi >= 0) & (b.lo.isinf() | b.hi.isinf())


def _pair(dtype: torch.dtype, count: int, args: Sequence[Any]) -> tuple[Range, Range]:
    return _operand(args[0], dtype, count), _operand(args[1], dtype, count)


def _add(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _sum(*_pair(dtype, count, args)) if _is_unscaled(args, kwargs) else None


def _sub(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _pair(dtype, count, args)
    return _sum(a, _negative(b)) if _is_unscaled(args, kwargs) else None


def _rsub(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _pair(dtype, count, args)
    return _sum(b, _negative(a)) if _is_unscaled(args, kwargs) else None


def _is_unscaled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool((args[2] if len(args) > 2 else kwargs.get("alpha", 1)) == 1)


def _mul(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _pair(dtype, count, args)
    result = _product(a, b)
    number = torch.where(_is_value(a, 1), b.number, torch.where(_is_value(b, 1), a.number, NO_NUMBER))
    return Range(result.lo, result.hi, result.nan, number)


def _div(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    if kwargs.get("rounding_mode") is not None or not dtype.is_floating_point:
        return None
    a, b = _pair(dtype, count, args)
    corners = torch.stack([x / y for x in (a.lo, a.hi) for y in (b.lo, b.hi)])
    open_ended = ((b.lo <= 0) & (b.hi >= 0)) | b.lo.isinf() | b.hi.isinf() | corners.isnan().any(0)
    lo = torch.where(open_ended, -INF, corners.amin(0))
    hi = torch.where(open_ended, INF, corners.amax(0))
    return Range.make(lo, hi, a.nan | b.nan | open_ended)


def _neg(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _negative(_operand(args[0], dtype, count))


def _abs(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a = _operand(args[0], dtype, count)
    inside = (a.lo <= 0) & (a.hi >= 0)
    ends = torch.stack([a.lo.abs(), a.hi.abs()])
    return Range.make(torch.where(inside, 0.0, ends.amin(0)), ends.amax(0), a.nan)


def _maximum(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _larger(*_pair(dtype, count, args))


def _minimum(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _smaller(*_pair(dtype, count, args))


def _larger(a: Range, b: Range) -> Range:
    nan = a.nan | b.nan
    number = torch.where((a.lo > b.hi) & ~nan, a.number, torch.where((b.lo > a.hi) & ~nan, b.number, NO_NUMBER))
    number = torch.where((a.number == b.number) & (a.number >= 0), a.number, number)
    return Range(torch.maximum(a.lo, b.lo), torch.maximum(a.hi, b.hi), nan, number, a.dtype)


def _smaller(a: Range, b: Range) -> Range:
    nan = a.nan | b.nan
    number = torch.where((a.hi < b.lo) & ~nan, a.number, torch.where((b.hi < a.lo) & ~nan, b.number, NO_NUMBER))
    number = torch.where((a.number == b.number) & (a.number >= 0), a.number, number)
    return Range(torch.minimum(a.lo, b.lo), torch.minimum(a.hi, b.hi), nan, number, a.dtype)


def _clamp(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    x, low, high = (*args, None, None)[:3]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    result = _operand(x, dtype, count)
    if low is not None:
        result = _larger(result, _operand(low, dtype, count))
    return result if high is None else _smaller(result, _operand(high, dtype, count))


def _clamp_min(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _clamp(dtype, count, [args[0], args[1]], {})


def _clamp_max(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _clamp(dtype, count, [args[0], None, args[1]], {})


def _relu(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _clamp(dtype, count, [args[0], 0], {})


def _where(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    condition = _truth(args[0], count)
    a, b = _pair(dtype, count, args[1:])
    first, second = condition.lo == 1, condition.hi == 0
    lo = torch.where(first, a.lo, torch.where(second, b.lo, torch.minimum(a.lo, b.lo)))
    hi = torch.where(first, a.hi, torch.where(second, b.hi, torch.maximum(a.hi, b.hi)))
    nan = torch.where(first, a.nan, torch.where(second, b.nan, a.nan | b.nan))
    same = (a.number == b.number) & (a.number >= 0)
    number = torch.where(first | same, a.number, torch.where(second, b.number, NO_NUMBER))
    return Range(lo, hi, nan, number)


def _masked_fill(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    x, mask, value = args
    return _where(dtype, count, [mask, value, x], {})


def _conjunction(a: Range, b: Range) -> Range:
    same = (a.number == b.number) & (a.number >= 0)
    number = torch.where(_is_value(a, 1) | same, b.number, torch.where(_is_value(b, 1), a.number, NO_NUMBER))
    return Range(torch.minimum(a.lo, b.lo), torch.minimum(a.hi, b.hi), torch.zeros_like(a.nan), number)


def _disjunction(a: Range, b: Range) -> Range:
    same = (a.number == b.number) & (a.number >= 0)
    number = torch.where(_is_value(a, 0) | same, b.number, torch.where(_is_value(b, 0), a.number, NO_NUMBER))
    return Range(torch.maximum(a.lo, b.lo), torch.maximum(a.hi, b.hi), torch.zeros_like(a.nan), number)


def _difference(a: Range, b: Range) -> Range:
    """Exclusive or."""
    known = a.is_constant & b.is_constant
    unlike = (a.lo != b.lo).double()
    number = torch.where(_is_value(a, 0), b.number, torch.where(_is_value(b, 0), a.number, NO_NUMBER))
    lo, hi = torch.where(known, unlike, 0.0), torch.where(known, unlike, 1.0)
    return Range(lo, hi, torch.zeros_like(a.nan), number)


def _is_value(x: Range, value: float) -> Tensor:
    return x.is_constant & (x.lo == value)


def _logical(combine: Callable[[Range, Range], Range]) -> Rule:
    def rule(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
        return combine(_truth(args[0], count), _truth(args[1], count))

    return rule


def _bitwise(combine: Callable[[Range, Range], Range]) -> Rule:
    """Of truth values; integers that may be others than 0 and 1 have no bounds."""

    def rule(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
        a, b = _pair(dtype, count, args)
        if any(bool(((x.lo < 0) | (x.hi > 1)).any()) for x in (a, b)):
            return None
        return combine(a, b)

    return rule


def _logical_not(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    x = _truth(args[0], count)
    return Range.make(1 - x.hi, 1 - x.lo, x.nan)


def _bitwise_not(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    return _logical_not(dtype, count, args, kwargs) if dtype is torch.bool else None


def _compared(args: Sequence[Any], count: int) -> tuple[Range, Range]:
    """Both sides of a comparison, before and after any conversion to a common dtype."""
    given = [x.dtype for x in args[:2] if isinstance(x, Range) and x.dtype is not None]
    floating = [dtype for dtype in given if dtype.is_floating_point]
    if len(floating) < len(given) or len(given) < 2:
        # Integers and Python numbers are compared as what torch promotes them to.
        floating += [torch.float32] * (bool(floating) or any(isinstance(x, float) for x in args[:2]))
    sides: list[Range] = []
    for x in args[:2]:
        side = _operand(x, torch.bool, count)
        sides.append(Range(*_hull(side, floating), side.nan, side.number, side.dtype))
    return sides[0], sides[1]


def _less(a: Range, b: Range, or_equal: bool) -> Range:
    always = a.hi <= b.lo if or_equal else a.hi < b.lo
    possible = a.lo <= b.hi if or_equal else a.lo < b.hi
    nan = a.nan | b.nan
    return Range.make((always & ~nan).double(), possible.double(), torch.zeros_like(nan))


def _lt(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    return _less(a, b, or_equal=False)


def _le(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    return _less(a, b, or_equal=True)


def _gt(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    return _as_truth(_less(b, a, or_equal=False), a, b, 0)


def _ge(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    return _as_truth(_less(b, a, or_equal=True), a, b, 1)


def _eq(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    return _as_truth(_equal(a, b), a, b, 1)


def _ne(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    a, b = _compared(args, count)
    equal = _equal(a, b)
    return _as_truth(Range.make(1 - equal.hi, 1 - equal.lo, torch.zeros_like(equal.nan)), a, b, 0)


def _equal(a: Range, b: Range) -> Range:
    nan = a.nan | b.nan
    same = (a.is_constant & b.is_constant & (a.lo == b.lo)) | ((a.number == b.number) & (a.number >= 0))
    overlap = (a.lo <= b.hi) & (b.lo <= a.hi)
    return Range.make((same & ~nan).double(), overlap.double(), torch.zeros_like(nan))


def _as_truth(result: Range, x: Range, against: Range, value: float) -> Range:
    """A truth value compared so that it comes out as itself keeps its number."""
    if x.dtype is None or x.dtype.is_floating_point:
        return result
    itself = (x.lo >= 0) & (x.hi <= 1) & _is_value(against, value)
    return Range(result.lo, result.hi, result.nan, torch.where(itself, x.number, NO_NUMBER))


def _isnan(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    x = _operand(args[0], torch.bool, count)
    return Range.make(torch.zeros(count, dtype=torch.float64), x.nan.double(), torch.zeros_like(x.nan))


def _isinf(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
    x = _operand(args[0], torch.bool, count)
    infinite = x.lo.isinf() | x.hi.isinf()
    always = x.lo.isinf() & (x.lo == x.hi) & ~x.nan
    return Range.make(always.double(), infinite.double(), torch.zeros_like(x.nan))


def _rounded(function: Callable[[Tensor], Tensor]) -> Rule:
    def rule(dtype: torch.dtype, count: int, args: list[Any], kwargs: dict[str, Any]) -> Range | None:
        if len(args) > 1 or kwargs:
            return None
        x = _operand(args[0], dtype, count)
        return Range.make(function(x.lo), function(x.hi), x.nan)

    return rule


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "abs": _abs,
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "relu": _relu,
    "where": _where,
    "masked_fill": _masked_fill,
    "logical_and": _logical(_conjunction),
    "logical_or": _logical(_disjunction),
    "logical_xor": _logical(_difference),
    "logical_not": _logical_not,
    "bitwise_and": _bitwise(_conjunction),
    "bitwise_or": _bitwise(_disjunction),
    "bitwise_xor": _bitwise(_difference),
    "bitwise_not": _bitwise_not,
    "lt": _lt,
    "le": _le,
    "gt": _gt,
    "ge": _ge,
    "eq": _eq,
    "ne": _ne,
    "isnan": _isnan,
    "isinf": _isinf,
    "floor": _rounded(torch.floor),
    "ceil": _rounded(torch.ceil),
    "round": _rounded(torch.round),
    "trunc": _rounded(torch.trunc),
    "sign": _rounded(torch.sign),
}

ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "neg", "abs"})


def any_of(x: Range, dims: list[int], dtype: torch.dtype) -> Range | None:
    nonzero, zero = _nonzero(x)
    lo, hi = nonzero.amax(dims, True), (~zero).amax(dims, True)
    return Range.make(lo.double(), hi.double(), torch.zeros_like(lo))


def all_of(x: Range, dims: list[int], dtype: torch.dtype) -> Range | None:
    nonzero, zero = _nonzero(x)
    lo, hi = nonzero.amin(dims, True), (~zero).amin(dims, True)
    return Range.make(lo.double(), hi.double(), torch.zeros_like(lo))


def _nonzero(x: Range) -> tuple[Tensor, Tensor]:
    return (x.lo > 0) | (x.hi < 0), (x.lo == 0) & (x.hi == 0) & ~x.nan


def largest_of(x: Range, dims: list[int], dtype: torch.dtype) -> Range | None:
    return Range.make(x.lo.amax(dims, True), x.hi.amax(dims, True), x.nan.amax(dims, True))


def smallest_of(x: Range, dims: list[int], dtype: torch.dtype) -> Range | None:
    return Range.make(x.lo.amin(dims, True), x.hi.amin(dims, True), x.nan.amax(dims, True))


def sum_of(x: Range, dims: list[int], dtype: torch.dtype) -> Range | None:
    lo, hi = x.lo.sum(dims, True), x.hi.sum(dims, True)
    if not adds_exactly(x, dtype):
        return None
    return Range.make(lo, hi, x.nan.amax(dims, True))


def adds_exactly(x: Range, dtype: torch.dtype) -> bool:
    """Whether sums of the bounds are exact in the dtype's accumulator, so that in any order they bound the sum."""
    if bool((x.lo.isinf() | x.hi.isinf()).any()):
        return False
    if bool((x.lo != x.lo.trunc()).any() or (x.hi != x.hi.trunc()).any()):
        return False
    precise = dtype is torch.float64 or not dtype.is_floating_point
    return bool(torch.maximum(x.lo.abs(), x.hi.abs()).sum() < (LARGEST_EXACT if precise else 2.0**24))
