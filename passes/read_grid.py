"""Read a sequence axis as stretches of tokens: which of them are whole token grids, in which order. Edits nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from t3compile.errors import GridError
from t3compile.geometry import AXES, GridHint, TokenGrid
from t3compile.passes.layout import Axis, Digit, Origin, Segment, is_flat, segment_size
from t3compile.passes.read_raster import Raster, find_raster
from t3compile.passes.read_values import ValueReader
from t3compile.passes.track_layout import Beside, LayoutTracker
from t3compile.sites import GridAxis, Reason

_BATCH_AXIS = 0
# Blocks repeat the same tables; the first few say all.
_MOST_TABLES = 8


@dataclass(frozen=True)
class Refusal:
    """Why something is no site."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Stretch:
    """A whole token grid in a sequence; ``order`` lists its axes as the sequence runs over them, outermost first."""

    start: int
    segment: Segment
    grid: TokenGrid
    order: str
    axes: tuple[GridAxis, ...]
    assumptions: tuple[str, ...] = ()


def describe_tokens(axis: Axis) -> str:
    """The tokens of an axis in words."""
    parts = []
    for segment in axis.segments:
        inner = " x ".join(f"{digit.size} of {digit.origin}" for digit in segment)
        parts.append(inner or "1 token")
    return " then ".join(parts)


class GridReader:
    """Reads the sequence axes of a graph's attention calls."""

    def __init__(self, tracker: LayoutTracker, values: ValueReader, placeholders: Sequence[fx.Node]) -> None:
        self._tracker = tracker
        self._values = values
        self._placeholders = {node.name: node for node in placeholders}
        self._rasters: dict[Origin, tuple[Raster, frozenset[str]] | Refusal | None] = {}

    def tokens(self, node: fx.Node) -> Axis:
        """The sequence axis of [B, N, S, D]."""
        return self._tracker.layout(node)[-2]

    def stretches(self, node: fx.Node) -> list[Stretch | Refusal]:
        """What every segment of the sequence axis of [B, N, S, D] is."""
        *outer, tokens, _ = self._tracker.layout(node)
        dropped = self._tracker.dropped(node)
        read: list[Stretch | Refusal] = []
        for start, segment in tokens.placed():
            found = self._read(_with_rest(segment, tokens), segment, start, outer, dropped)
            if isinstance(found, Refusal) and found.reason == "already-windowed" and _is_scattered(segment, tokens):
                found = Refusal("unknown-layout", f"the tokens are in an order of parts: {describe_tokens(tokens)}")
            read.append(found)
        return read

    def _read(
        self,
        whole: Segment,
        segment: Segment,
        start: int,
        outer: Sequence[Axis],
        dropped: frozenset[tuple[str, int]],
    ) -> Stretch | Refusal:
        refusal = _refuse(whole, outer, dropped)
        if refusal is not None:
            return refusal
        if is_flat(segment):
            return self._packed(segment, start)
        if len(segment) == 1:
            return Refusal("no-grid", f"the tokens are one axis cut into patches: {describe_tokens(Axis((segment,)))}")
        by_axis = sorted(segment, key=lambda digit: digit.origin.axis)
        names = dict(zip(by_axis, AXES[-len(by_axis) :], strict=True))
        sizes = tuple(digit.size for digit in by_axis)
        order = "thw"[: 3 - len(segment)] + "".join(names[digit] for digit in segment)
        axes = tuple(_grid_axis(digit) for digit in by_axis)
        return Stretch(start, segment, _grid_of(sizes), order, () if None in axes else axes)  # type: ignore[arg-type]

    def _packed(self, segment: Segment, start: int) -> Stretch | Refusal:
        """A flat input axis: a grid, or text and a grid, where a table of positions says so."""
        origin = segment[0].origin
        if origin not in self._rasters:
            self._rasters[origin] = self._raster(origin)
        raster = self._rasters[origin]
        if isinstance(raster, Refusal):
            return raster
        if raster is None:
            return Refusal(
                "no-grid",
                f"the tokens are {origin}, a flat sequence of {origin.length} without positions: give --grid TxHxW",
            )
        place, inputs = raster
        grid = _grid_of(place.sizes)
        named = " and ".join(f"'{name}'" for name in sorted(inputs))
        assumption = (
            f"the token grid {grid} is read from the example values of input {named}: "
            "the rewritten model is right for these positions only"
        )
        (tokens,) = (Axis((segment,)).slice(place.start, place.start + grid.tokens) or Axis((segment,))).segments
        return Stretch(start + place.start, tokens, grid, "thw", (), (assumption,) if inputs else ())

    def _raster(self, origin: Origin) -> tuple[Raster, frozenset[str]] | Refusal | None:
        found: dict[Raster, frozenset[str]] = {}
        tables = 0
        for beside in self._candidates(origin):
            table = self._values.read(beside.node)
            if table is None or tables == _MOST_TABLES:
                continue
            tables += 1
            rows = table.value.movedim(beside.dim, 0)[beside.start : beside.start + origin.length]
            raster = find_raster(rows.flatten(1)) if rows.dim() > 1 else None
            if raster is not None:
                found.setdefault(raster, table.inputs)
        if len(found) > 1:
            grids = " and ".join(f"{_grid_of(raster.sizes)}@{raster.start}" for raster in found)
            return Refusal("two-grids", f"the tables of positions say {grids}: choose with --grid TxHxW@START")
        return next(iter(found.items()), None)

    def _candidates(self, origin: Origin) -> Iterator[Beside]:
        """Tensors that may hold the positions of an input's tokens: itself, position inputs, tables made of them."""
        own = self._placeholders.get(str(origin.input_name))
        if own is not None:
            yield Beside(own, origin.axis, 0)
        for beside in self._tracker.beside(origin):
            for start, segment in self._tracker.layout(beside.node)[beside.dim].placed():
                ids = self._placeholders.get(str(segment[0].origin.input_name)) if is_flat(segment) else None
                offset = beside.start - start
                if ids is not None and offset >= 0 and offset + origin.length <= segment[0].size:
                    yield Beside(ids, segment[0].origin.axis, offset)
            yield beside


def _with_rest(segment: Segment, tokens: Axis) -> Segment:
    """The segment as if whole, where the other parts of its leading axis stand elsewhere in the same sequence."""
    if not segment or segment[0].is_complete:
        return segment
    leading = segment[0]
    covered: set[int] = set()
    for other in tokens.segments:
        same = other[1:] == segment[1:] and other and other[0].origin == leading.origin
        if same and (other[0].stride, other[0].modulus) == (leading.stride, leading.modulus):
            covered |= set(range(other[0].start, other[0].start + other[0].size))
    if len(covered) < leading.modulus:
        return segment
    return (replace(leading, start=0, size=leading.modulus), *segment[1:])


def _is_scattered(segment: Segment, tokens: Axis) -> bool:
    """Whether the sequence has as many tokens of the segment's input as that has, in stretches that are no rows."""
    parts = [other for other in tokens.segments if Axis((other,)).inputs == Axis((segment,)).inputs]
    finest: dict[Origin, int] = {}
    for digit in (digit for part in parts for digit in part):
        finest[digit.origin] = min(finest.get(digit.origin, digit.stride), digit.stride)
    count = math.prod(origin.length // stride for origin, stride in finest.items())
    return len(parts) > 1 and sum(segment_size(part) for part in parts) == count


def _grid_of(sizes: Sequence[int]) -> TokenGrid:
    return TokenGrid(*((1,) * (3 - len(sizes)) + tuple(sizes)))


def _grid_axis(digit: Digit) -> GridAxis | None:
    origin = digit.origin
    if origin.parts is not None:
        return None
    return GridAxis(str(origin.input_name), origin.axis, origin.length // digit.size)


def _refuse(segment: Segment, outer: Sequence[Axis], dropped: frozenset[tuple[str, int]]) -> Refusal | None:
    """Why a segment is not all tokens of one input, or None."""
    words = describe_tokens(Axis((segment,)))
    if not segment or not all(digit.origin.is_known for digit in segment):
        made_by = next((digit.origin for digit in segment if not digit.origin.is_known), None)
        if made_by is not None and made_by.parts is not None and made_by in _origins(outer):
            return Refusal("already-windowed", f"tokens attend within parts of {describe_tokens(made_by.parts)}")
        return Refusal("unknown-layout", f"the order of the tokens is lost: {made_by or 'no tokens'}")
    if len({digit.origin.input_name for digit in segment}) > 1:
        return Refusal("unknown-layout", f"tokens of several inputs are mixed: {words}")
    name = segment[0].origin.input_name
    axes = [digit.origin.axis for digit in segment]
    outside = {
        digit.origin.axis
        for axis in outer
        for part in axis.segments
        for digit in part
        if digit.origin.input_name == name
    } - {_BATCH_AXIS}
    outside |= {axis for input_name, axis in dropped if input_name == name} - {_BATCH_AXIS, *axes}
    if not outside and len(set(axes)) != len(axes) and _are_all_tokens(segment):
        return Refusal("unknown-layout", f"the tokens are in an order of blocks, not of rows: {words}")
    if outside or not all(digit.is_whole for digit in segment) or len(set(axes)) != len(axes):
        return Refusal("already-windowed", f"tokens attend within parts: {words}")
    if len(axes) > 3:
        return Refusal("unknown-layout", f"more than three axes: {words}")
    return None


def _origins(axes: Sequence[Axis]) -> set[Origin]:
    return {digit.origin for axis in axes for segment in axis.segments for digit in segment}


def _are_all_tokens(segment: Segment) -> bool:
    """Whether digits that share axes together run over every patch of each."""
    covered: dict[Origin, int] = {}
    finest: dict[Origin, int] = {}
    for digit in segment:
        if not digit.is_complete:
            return False
        covered[digit.origin] = covered.get(digit.origin, 1) * digit.size
        finest[digit.origin] = min(finest.get(digit.origin, digit.stride), digit.stride)
    return all(covered[origin] * finest[origin] == origin.length for origin in covered)


def refine_grid(stretch: Stretch, hint: GridHint) -> Stretch | Refusal:
    """The stretch under a grid given by hand: the same, or rows and columns of an axis that the graph keeps flat."""
    if hint.start is not None and hint.start != stretch.start:
        raise GridError(
            f"--grid {hint} contradicts the grid {stretch.grid}@{stretch.start} that the graph tells; leave --grid out"
        )
    if hint.grid == stretch.grid:
        return stretch
    if hint.grid.tokens != stretch.grid.tokens:
        return Refusal("grid-mismatch", f"the graph's grid is {stretch.grid}, not {hint.grid}")
    sizes = [digit.size for digit in stretch.segment]
    if stretch.order != "thw" or not _refines(hint.grid.sizes, sizes):
        raise GridError(
            f"--grid {hint} contradicts the grid {stretch.grid} derived from "
            f"{describe_tokens(Axis((stretch.segment,)))}; leave --grid out"
        )
    return Stretch(stretch.start, stretch.segment, hint.grid, "thw", ())


def _refines(given: Sequence[int], derived: Sequence[int]) -> bool:
    """Whether each derived axis is a row-major product of neighbouring given ones, such as H*W flattened to one."""
    rest = list(given)
    for size in derived:
        product = 1
        while rest and product < size:
            product *= rest.pop(0)
        if product != size:
            return False
    return all(size == 1 for size in rest)


def is_tensor_input(node: fx.Node) -> bool:
    """Whether a placeholder is a tensor."""
    return node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
