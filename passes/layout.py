"""What the axes of a tensor stand for: mixed-radix digits of the axes of the model's inputs.

A digit is one factor of an input axis: patches of two rows of an axis of 272 are (stride 2, size 136). A
segment is a row-major product of digits, an axis a concatenation of segments. Flattening, splitting, permuting
and concatenating tokens are exact operations on digits, so a token order is derived, never guessed. An axis of
unknown meaning is a digit whose origin is the operation that made it: neutral if no input reached it (tables,
constants), else lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Origin:
    """Where a digit comes from: an axis of a model input, or (input None) the operation that made it.

    ``neutral``: no input reached it, or it repeats one position; it says nothing about token order.
    """

    input_name: str | None
    axis: int
    length: int
    made_by: str = ""
    neutral: bool = False

    @property
    def is_known(self) -> bool:
        return self.input_name is not None

    def __str__(self) -> str:
        if self.is_known:
            return f"axis {self.axis} of input '{self.input_name}'"
        return f"unknown tokens made by {self.made_by}"


@dataclass(frozen=True)
class Digit:
    """Values start..start+size-1 of (index // stride) % modulus of an origin's axis."""

    origin: Origin
    stride: int
    size: int
    modulus: int
    start: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the digit takes every value it can."""
        return self.size == self.modulus

    @property
    def is_whole(self) -> bool:
        """Whether the digit runs over every patch of its axis."""
        return self.is_complete and self.stride * self.modulus == self.origin.length


Segment = tuple[Digit, ...]


def segment_size(segment: Segment) -> int:
    return math.prod(digit.size for digit in segment)


def _merge_digits(segment: Segment) -> Segment:
    """Drop digits of axes of length one and join neighbours that are one stretch of the same axis."""
    merged: list[Digit] = []
    for digit in segment:
        if digit.size == 1 and digit.is_whole:
            continue
        if merged:
            outer = merged[-1]
            neighbours = outer.origin == digit.origin and outer.stride == digit.stride * digit.size
            if neighbours and digit.is_complete:
                size = digit.size
                merged[-1] = Digit(
                    digit.origin, digit.stride, outer.size * size, outer.modulus * size, outer.start * size
                )
                continue
        merged.append(digit)
    return tuple(merged)


@dataclass(frozen=True)
class Axis:
    """One tensor axis: a concatenation of segments."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, *segments: Segment) -> Axis:
        """Normal form: digits merged, empty stretches dropped, neighbouring stretches of one digit joined."""
        joined: list[Segment] = []
        for segment in segments:
            if segment_size(segment) == 0:
                continue
            normal = _merge_digits(segment)
            if joined:
                union = _continue_segment(joined[-1], normal)
                if union is not None:
                    joined[-1] = union
                    continue
            joined.append(normal)
        return cls(tuple(joined))

    @property
    def size(self) -> int:
        return sum(segment_size(segment) for segment in self.segments)

    @property
    def inputs(self) -> set[str]:
        """Names of the model inputs whose tokens stand here."""
        names = (digit.origin.input_name for segment in self.segments for digit in segment)
        return {name for name in names if name is not None}

    @property
    def is_known(self) -> bool:
        return bool(self.inputs)

    @property
    def is_neutral(self) -> bool:
        """Whether no part says anything about token order."""
        return all(digit.origin.neutral for segment in self.segments for digit in segment)

    def split(self, sizes: Sequence[int]) -> list[Axis] | None:
        """The axis as a row-major product of `sizes`, or None where that is not a product of digits."""
        if len(self.segments) > 1:
            wide = [i for i, size in enumerate(sizes) if size != 1]
            if len(wide) != 1:
                return None
            return [self if i == wide[0] else ONE for i in range(len(sizes))]
        remaining = list(self.segments[0]) if self.segments else []
        parts: list[Axis] = []
        for size in reversed(sizes):
            taken = _take_inner(remaining, size)
            if taken is None:
                return None
            parts.append(Axis.of(taken))
        return parts[::-1]

    def slice(self, start: int, stop: int) -> Axis | None:
        """Positions start..stop-1, or None where a segment would be cut inside a digit product."""
        pieces: list[Segment] = []
        position = 0
        for segment in self.segments:
            size = segment_size(segment)
            low, high = max(start - position, 0), min(stop - position, size)
            if low < high:
                piece = _slice_segment(segment, low, high)
                if piece is None:
                    return None
                pieces.append(piece)
            position += size
        return Axis.of(*pieces)


ONE = Axis(((),))


def concatenate(axes: Sequence[Axis]) -> Axis:
    return Axis.of(*(segment for axis in axes for segment in axis.segments))


def product(axes: Sequence[Axis]) -> Axis | None:
    """Row-major product, or None where a concatenation would have to be multiplied out."""
    wide = [axis for axis in axes if axis.size != 1]
    if len(wide) == 1:
        return wide[0]
    if any(len(axis.segments) != 1 for axis in wide):
        return None
    return Axis.of(tuple(digit for axis in wide for digit in axis.segments[0]))


def join(first: Axis, second: Axis) -> Axis | None:
    """The meaning of an axis that two elementwise operands share; None where it is lost.

    A neutral operand says nothing. Tokens of different inputs that meet at one position carry the same
    coordinates if they are cut alike; a flat sequence takes those of a grid. Two orders of the same input's tokens,
    or an order that is lost already, leave none.
    """
    if first == second or second.is_neutral:
        return first
    if first.is_neutral:
        return second
    if [segment_size(s) for s in first.segments] == [segment_size(s) for s in second.segments]:
        segments = [_join_segments(a, b) for a, b in zip(first.segments, second.segments, strict=True)]
        if any(segment is None for segment in segments):
            return None
        return Axis.of(*(segment for segment in segments if segment is not None))
    if first.inputs & second.inputs:
        return None
    for flat, other in ((first, second), (second, first)):
        if _is_flat(flat.segments) and other.is_known:
            return other
    return None


def _join_segments(a: Segment, b: Segment) -> Segment | None:
    if a == b or Axis((b,)).is_neutral:
        return a
    if Axis((a,)).is_neutral:
        return b
    if not all(digit.origin.is_known for digit in (*a, *b)) or Axis((a,)).inputs & Axis((b,)).inputs:
        return None
    if [(d.size, d.is_whole) for d in a] == [(d.size, d.is_whole) for d in b]:
        return a
    for flat, other in ((a, b), (b, a)):
        if _is_flat((flat,)):
            return other
    return None


def _is_flat(segments: tuple[Segment, ...]) -> bool:
    """Whether the axis is one whole axis of an input."""
    if len(segments) != 1 or len(segments[0]) != 1:
        return False
    (digit,) = segments[0]
    return digit.origin.is_known and digit.stride == 1 and digit.is_whole


def _continue_segment(left: Segment, right: Segment) -> Segment | None:
    """left followed by right as one segment, if right goes on where left's leading digit stopped."""
    if not left or not right or left[1:] != right[1:]:
        return None
    a, b = left[0], right[0]
    if (a.origin, a.stride, a.modulus) != (b.origin, b.stride, b.modulus) or a.start + a.size != b.start:
        return None
    return (replace(a, size=a.size + b.size), *left[1:])


def _take_inner(digits: list[Digit], size: int) -> Segment | None:
    """Remove an innermost factor of `size` from the digits, cutting a digit where needed."""
    taken: list[Digit] = []
    while size > 1:
        if not digits:
            return None
        digit = digits.pop()
        if size % digit.size == 0:
            taken.insert(0, digit)
            size //= digit.size
            continue
        if digit.size % size or digit.start % size or digit.modulus % size:
            return None
        taken.insert(0, Digit(digit.origin, digit.stride, size, size))
        outer = (digit.stride * size, digit.size // size, digit.modulus // size, digit.start // size)
        digits.append(Digit(digit.origin, *outer))
        size = 1
    return tuple(taken)


def _slice_segment(segment: Segment, start: int, stop: int) -> Segment | None:
    if start == 0 and stop == segment_size(segment):
        return segment
    if not segment:
        return None
    inner = segment_size(segment[1:])
    if start % inner or stop % inner:
        if stop - start > inner or start // inner != (stop - 1) // inner:
            return None
        head = replace(segment[0], start=segment[0].start + start // inner, size=1)
        rest = _slice_segment(segment[1:], start % inner, start % inner + stop - start)
        return None if rest is None else (head, *rest)
    low, high = start // inner, stop // inner
    return (replace(segment[0], start=segment[0].start + low, size=high - low), *segment[1:])


Layout = tuple[Axis, ...]


def unknown_axis(made_by: str, position: int, size: int, *, neutral: bool = False) -> Axis:
    """An axis of `size` positions about which only its maker is known."""
    origin = Origin(None, position, size, made_by, neutral)
    return Axis.of((Digit(origin, 1, size, size),)) if size != 1 else ONE


def input_axis(name: str, position: int, size: int) -> Axis:
    """A whole axis of a model input."""
    return Axis.of((Digit(Origin(name, position, size), 1, size, size),)) if size != 1 else ONE
