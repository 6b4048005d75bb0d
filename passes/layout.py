"""What the axes of a tensor stand for: mixed-radix digits of the axes of the model's inputs.

A digit is one factor of an input axis: patches of two rows of an axis of 272 are (stride 2, size 136). A
segment is a row-major product of digits, an axis a concatenation of segments. Flattening, splitting, permuting
and concatenating tokens are exact operations on digits, so a token order is derived, never guessed. An axis that
was lengthened before it is flattened (a reference frame put before the others, padding) is flattened as one digit
that remembers its parts. An axis of unknown meaning is a digit whose origin is the operation that made it: neutral
if no input reached it (tables, constants), else lost, with the inputs whose tokens may stand there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Origin:
    """Where a digit comes from: an axis of a model input, or (input None) the operation that made it.

    ``reach`` are the inputs whose values may stand at an unknown origin's positions; where there are none (a table, one
    position repeated) it is neutral: it says nothing about token order. ``parts`` are the stretches of an axis that was
    lengthened, which is named after the longest of them, or the axis that a reversal turned round. ``is_feature``: a
    weight made the axis, as a linear layer makes its channels; spread out in space they take the positions of the
    tokens that they are added to.
    """

    input_name: str | None
    axis: int
    length: int
    made_by: str = ""
    reach: frozenset[str] = frozenset()
    parts: Axis | None = None
    is_reversal: bool = False
    is_feature: bool = False

    @property
    def neutral(self) -> bool:
        return self.input_name is None and not self.reach

    @property
    def is_known(self) -> bool:
        return self.input_name is not None

    def __str__(self) -> str:
        if self.is_known:
            lengthened = "lengthened " if self.parts is not None else ""
            return f"{lengthened}axis {self.axis} of input '{self.input_name}'"
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
            normal_segments = (s for part in _expand_parts(_merge_digits(segment)) for s in _multiply_out(part))
            for normal in normal_segments:
                union = _continue_segment(joined[-1], normal) if joined else None
                if union is None:
                    joined.append(normal)
                else:
                    joined[-1] = union
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
    def reach(self) -> frozenset[str]:
        """Names of the model inputs whose tokens stand here, or may."""
        origins = [digit.origin for segment in self.segments for digit in segment]
        return frozenset(self.inputs).union(*(origin.reach for origin in origins))

    @property
    def is_neutral(self) -> bool:
        """Whether no part says anything about token order."""
        return all(digit.origin.neutral for segment in self.segments for digit in segment)

    @property
    def is_feature(self) -> bool:
        """Whether channels stand here that a weight made."""
        return all(digit.origin.is_feature for segment in self.segments for digit in segment)

    def split(self, sizes: Sequence[int]) -> list[Axis] | None:
        """The axis as a row-major product of `sizes`, or None where that is not a product of digits."""
        if len(self.segments) > 1:
            wide = [i for i, size in enumerate(sizes) if size != 1]
            if len(wide) == 1:
                return [self if i == wide[0] else ONE for i in range(len(sizes))]
            # Else windows of a rolled or padded axis: digits of one that remembers its parts.
            return self._split_alike(sizes) or Axis((_as_segment(self),)).split(sizes)
        remaining = list(self.segments[0]) if self.segments else []
        parts: list[Axis] = []
        for size in reversed(sizes):
            taken = _take_inner(remaining, size)
            if taken is None:
                return None
            parts.append(Axis.of(taken))
        return parts[::-1]

    def _split_alike(self, sizes: Sequence[int]) -> list[Axis] | None:
        """The split of a concatenation whose stretches all have the same inner factors, such as the batch."""
        outermost = next(i for i, size in enumerate(sizes) if size != 1)
        inner = sizes[outermost + 1 :]
        outer: list[Segment] = []
        taken: set[Segment | None] = set()
        for segment in self.segments:
            digits = list(segment)
            taken.add(_take_inner(digits, math.prod(inner)))
            outer.append(tuple(digits))
        factor = taken.pop()
        if taken or factor is None:
            return None
        parts = Axis.of(factor).split(inner)
        return None if parts is None else [*([ONE] * outermost), Axis.of(*outer), *parts]

    def placed(self) -> Iterator[tuple[int, Segment]]:
        """Every segment after the position where it starts."""
        position = 0
        for segment in self.segments:
            yield position, segment
            position += segment_size(segment)

    def slice(self, start: int, stop: int) -> Axis | None:
        """Positions start..stop-1, or None where a segment would be cut inside a digit product."""
        pieces: list[Segment] = []
        for position, segment in self.placed():
            low, high = max(start - position, 0), min(stop - position, segment_size(segment))
            if low < high:
                piece = _slice_segment(segment, low, high)
                if piece is None:
                    return None
                pieces.append(piece)
        return Axis.of(*pieces)

    def reversed(self, made_by: str = "a reversal") -> Axis:
        """The positions backwards: of unknown order until they are turned round again."""
        if len(self.segments) == 1 and len(self.segments[0]) == 1:
            (digit,) = self.segments[0]
            if digit.origin.is_reversal and digit.origin.parts is not None and digit.is_whole:
                return digit.origin.parts
        origin = Origin(None, 0, self.size, made_by, self.reach, self, is_reversal=True)
        return Axis.of((Digit(origin, 1, self.size, self.size),)) if self.size > 1 else self

    def take(self, positions: Sequence[int]) -> Axis | None:
        """The positions in the given order, or None where they are neither stretches nor whole reordered segments."""
        pieces: list[Axis] = []
        place = 0
        while place < len(positions):
            piece = self._reordered(positions, place) or self._stretch(positions, place)
            if piece is None or len(pieces) == _MOST_PIECES:
                return None
            pieces.append(piece)
            place += piece.size
        return concatenate(pieces)

    def _stretch(self, positions: Sequence[int], place: int) -> Axis | None:
        """The longest run of consecutive positions from ``place`` on."""
        first = positions[place]
        stop = place + 1
        while stop < len(positions) and positions[stop] == first + stop - place:
            stop += 1
        return self.slice(first, first + stop - place)

    def _reordered(self, positions: Sequence[int], place: int) -> Axis | None:
        """The segment that starts at ``place``, whole, its digits in another order."""
        for start, segment in self.placed():
            size = segment_size(segment)
            wanted = [position - start for position in positions[place : place + size]]
            if 2 <= len(segment) <= 4 and len(wanted) == size and all(0 <= p < size for p in (wanted[0], wanted[-1])):
                return _permuted(segment, wanted)
        return None


ONE = Axis(((),))
# An index that cuts an axis into more stretches than this is no reordering of tokens that anyone wrote.
_MOST_PIECES = 64


def _permuted(segment: Segment, wanted: list[int]) -> Axis | None:
    """The segment with its digits permuted so that its tokens come as wanted, or None."""
    sizes = [digit.size for digit in segment]
    steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    for order in itertools.permutations(range(len(segment))):
        places = [0]
        for i in order:
            places = [place + steps[i] * value for place in places for value in range(sizes[i])]
        if places == wanted:
            return Axis.of(tuple(segment[i] for i in order))
    return None


def concatenate(axes: Sequence[Axis]) -> Axis:
    return Axis.of(*(segment for axis in axes for segment in axis.segments))


def product(axes: Sequence[Axis]) -> Axis:
    """Row-major product.

    An outermost concatenation is multiplied out; where it lengthens one axis, and everywhere further in, it becomes
    one digit that remembers its parts.
    """
    wide = [axis for axis in axes if axis.size != 1]
    if len(wide) == 1:
        return wide[0]
    if wide and len(wide[0].segments) > 1 and _lengthened(wide[0]) is None:
        inner = [digit for axis in wide[1:] for digit in _as_segment(axis)]
        return Axis.of(*((*segment, *inner) for segment in wide[0].segments))
    return Axis.of(tuple(digit for axis in wide for digit in _as_segment(axis)))


def _as_segment(axis: Axis) -> Segment:
    if len(axis.segments) == 1:
        return axis.segments[0]
    leading = _lengthened(axis)
    name, position = (None, 0) if leading is None else (leading.input_name, leading.axis)
    whole = Origin(name, position, axis.size, "a concatenation", axis.reach, axis)
    return (Digit(whole, 1, axis.size, axis.size),)


def single_digit(axis: Axis) -> Digit | None:
    """The one digit that an axis is, or that padding or a frame put beside it makes longer; else None."""
    if len(axis.segments) > 1 and _lengthened(axis) is None:
        return None
    segment = _as_segment(axis)
    return segment[0] if len(segment) == 1 else None


def _lengthened(axis: Axis) -> Origin | None:
    """The origin of the longest stretch, if a concatenation makes one input axis longer.

    Text put beside a row of patches lengthens no axis, and a rolled axis is no longer in order.
    """
    known = [segment for segment in axis.segments if any(digit.origin.is_known for digit in segment)]
    if not known or any(len(segment) != 1 for segment in known):
        return None
    origins = {segment[0].origin for segment in known}
    whole = [segment for segment in known if segment[0].is_whole]
    # A first frame repeated before the others lengthens their axis; two stretches of one make a rolled one.
    is_repeated = len(origins) == len(whole) == 1
    if (len(origins) != len(known) and not is_repeated) or len({origin.axis for origin in origins}) != 1:
        return None
    return max(known, key=segment_size)[0].origin


def _expand_parts(segment: Segment) -> tuple[Segment, ...]:
    """A lengthened axis that stands alone, or a stretch of it, as its parts again."""
    if len(segment) != 1 or segment[0].origin.parts is None or segment[0].stride != 1:
        return (segment,)
    digit = segment[0]
    if digit.modulus != digit.origin.length or digit.origin.is_reversal or digit.origin.parts is None:
        return (segment,)
    stretch = digit.origin.parts.slice(digit.start, digit.start + digit.size)
    return (segment,) if stretch is None else stretch.segments


def join(first: Axis, second: Axis) -> Axis | None:
    """The meaning of an axis that two elementwise operands share; None where it is lost.

    A neutral operand says nothing, and neither does a lost one that holds values of other inputs only: it brings no
    tokens of this sequence. Tokens of different inputs that meet at one position carry the same coordinates if they
    are cut alike; a flat sequence takes those of a grid. Two orders of the same input's tokens leave none.
    """
    if first == second or second.is_neutral:
        return first
    if first.is_neutral:
        return second
    if [segment_size(s) for s in first.segments] == [segment_size(s) for s in second.segments]:
        if len(first.segments) == 1:
            segment = _join_segments(first.segments[0], second.segments[0])
            return None if segment is None else Axis.of(segment)
        pairs = zip(first.segments, second.segments, strict=True)
        return Axis.of(*(_join_segments(a, b) or _lost(a, b) for a, b in pairs))
    if first.reach & second.reach:
        return None
    for other, kept in ((first, second), (second, first)):
        is_flat_or_lost = len(other.segments) == 1 and (is_flat(other.segments[0]) or not other.is_known)
        if is_flat_or_lost and kept.is_known:
            return kept
    return None


def _lost(a: Segment, b: Segment) -> Segment:
    size = segment_size(a)
    origin = Origin(None, 0, size, "tokens of two orders that met", Axis((a, b)).reach)
    return (Digit(origin, 1, size, size),)


def _join_segments(a: Segment, b: Segment) -> Segment | None:
    if a == b or Axis((b,)).is_neutral:
        return a
    if Axis((a,)).is_neutral:
        return b
    if not Axis((a,)).reach & Axis((b,)).reach:
        # Neither brings tokens to the other: the fuller description stays.
        if _rank(a) != _rank(b):
            return max(a, b, key=_rank)
        if _rank(a) == 0:
            return a
    # Cut both alike: a value per frame, repeated over its patches, agrees with the frames and says nothing of patches.
    sizes = _common_sizes([digit.size for digit in a], [digit.size for digit in b])
    parts = [None if sizes is None else Axis((segment,)).split(sizes) for segment in (a, b)]
    if parts[0] is None or parts[1] is None:
        return None
    joined: list[Digit] = []
    for one, other in zip(parts[0], parts[1], strict=True):
        digits = _join_digits(one, other)
        if digits is None:
            return None
        joined.extend(digits)
    return Axis.of(tuple(joined)).segments[0]


def _rank(segment: Segment) -> int:
    """How much a stretch says of its tokens: lost, partly known, one axis or a stretch of it, a product of axes."""
    if not all(digit.origin.is_known for digit in segment):
        return int(any(digit.origin.is_known for digit in segment))
    if len(segment) == 1:
        return 2
    return 3 if all(digit.is_whole for digit in segment) else 1


def _join_digits(one: Axis, other: Axis) -> Segment | None:
    if one == other or other.is_neutral:
        return one.segments[0]
    if one.is_neutral:
        return other.segments[0]
    for features, tokens in ((one, other), (other, one)):
        if features.is_feature and tokens.is_known:
            return tokens.segments[0]
    if one.reach & other.reach:
        return None
    if one.is_known != other.is_known:
        return (one if one.is_known else other).segments[0]
    both = (*one.segments[0], *other.segments[0])
    return one.segments[0] if len(both) == 2 and all(digit.origin.is_known for digit in both) else None


def _common_sizes(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest factors that refine both products, outermost first."""
    cuts = set()
    for sizes in (a, b):
        product_inside = 1
        for size in reversed(sizes):
            product_inside *= size
            cuts.add(product_inside)
    ordered = sorted(cuts)
    factors: list[int] = []
    inside = 1
    for cut in ordered:
        if cut % inside:
            return None
        factors.insert(0, cut // inside)
        inside = cut
    return factors


def is_flat(segment: Segment) -> bool:
    """Whether the stretch is one whole axis of an input."""
    if len(segment) != 1:
        return False
    (digit,) = segment
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


def _multiply_out(segment: Segment) -> tuple[Segment, ...]:
    """A stretch of a lengthened axis times others: what stands there, where it is one of the parts."""
    if len(segment) < 2 or segment[0].origin.parts is None or segment[0].is_complete:
        return (segment,)
    return tuple((*part, *segment[1:]) for part in _expand_parts(segment[:1]))


Layout = tuple[Axis, ...]


def unknown_axis(made_by: str, position: int, size: int, reach: frozenset[str] = frozenset()) -> Axis:
    """An axis of `size` positions about which only its maker is known, and which inputs' values may stand there."""
    origin = Origin(None, position, size, made_by, reach)
    return Axis.of((Digit(origin, 1, size, size),)) if size != 1 else ONE


def input_axis(name: str, position: int, size: int) -> Axis:
    """A whole axis of a model input."""
    return Axis.of((Digit(Origin(name, position, size), 1, size, size),)) if size != 1 else ONE
