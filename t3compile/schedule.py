"""Schedules for any token grid, and the exact test that consecutive layers mix all tokens.

Source: arXiv 2512.13492 (T3-Video): a cycle of five patterns, the first frame-wise, two over whole
time, two that split time, of mixed size and aspect. The paper fixes the splits by hand for two
grids; here they are searched for, deterministically.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from math import log2, prod, sqrt
from operator import or_
from typing import Literal, NamedTuple

from t3compile.geometry import Splits, TokenGrid, Window, dilated_part, local_part
from t3compile.pattern import BRANCHES, Branch, Schedule, WindowPattern

MIXING_SPAN = 3
LAUNCH_LIMIT = 65_535  # fused attention kernels launch fewer problems than this at once
MIN_TOKENS, MAX_TOKENS = 500, 2200
CHOICES_PER_ROLE = 16

OCTAVE = 1000  # the unit of cost: one axis of a window is twice or half as long as ideal
UNEVEN_COST = 5 * OCTAVE // 4
NOT_64_COST = OCTAVE // 2
SAME_TOKENS_COST = OCTAVE // 2
SAME_ASPECT_COST = OCTAVE // 2


def mixes_within(grid: TokenGrid, patterns: Sequence[WindowPattern]) -> bool:
    """Whether every grid token reaches every other through these consecutive layers. Exact.

    A layer is the union of its branches, so a path takes one branch per layer, and for a given
    sequence of branches the axes are independent. The grid mixes iff any pairs of positions in t, h
    and w are connected by one sequence that they share. PatternError if a pattern does not fit.
    """
    for pattern in patterns:
        pattern.check_fit(grid)
    if not patterns:
        return grid.tokens == 1
    if patterns[0].splits.windows > patterns[-1].splits.windows:
        patterns = patterns[::-1]  # paths run both ways; fewer starts are less work
    branches = tuple(pattern.branches for pattern in patterns)
    counts_per_axis = zip(*(pattern.splits.counts for pattern in patterns), strict=True)
    short, middle, long = sorted(
        AxisCuts(length, counts, branches) for length, counts in zip(grid.sizes, counts_per_axis, strict=True)
    )
    if not all(_connect_all(axis, axis.all_sequences) for axis in (short, middle, long)):
        return False
    shared = {a & b for a, b in product(_pair_masks(short), _pair_masks(middle))}
    return all(_connect_all(long, sequences) for sequences in shared)


def cycle_mixes(grid: TokenGrid, schedule: Schedule, span: int = MIXING_SPAN) -> bool:
    """Whether every `span` consecutive layers mix, from every offset of the cycle."""
    return all(
        mixes_within(grid, [schedule.pattern_at(offset + layer) for layer in range(span)])
        for offset in range(len(schedule.patterns))
    )


class AxisCuts(NamedTuple):
    """One axis through consecutive layers. Bit s of a mask is the s-th of product(*branches)."""

    length: int
    counts: tuple[int, ...]
    branches: tuple[tuple[Branch, ...], ...]

    @property
    def all_sequences(self) -> int:
        return (1 << prod(map(len, self.branches))) - 1


@lru_cache(maxsize=1 << 14)
def _connect_all(axis: AxisCuts, sequences: int) -> bool:
    """Whether every pair of positions is connected by some branch sequence of the mask."""
    if 1 in axis.counts:
        return sequences != 0
    everything = (1 << axis.length) - 1
    chosen = [bit for bit in range(sequences.bit_length()) if sequences >> bit & 1]
    return all(reduce(or_, (row[bit] for bit in chosen), 0) == everything for row in _rows(axis))


@lru_cache(maxsize=1 << 14)
def _pair_masks(axis: AxisCuts) -> tuple[int, ...]:
    """For all pairs of positions, the masks of the sequences that connect them.

    Only the inclusion-minimal ones: the others cannot make an intersection empty.
    """
    if 1 in axis.counts:
        return (axis.all_sequences,)
    masks: set[int] = set()
    for row in _rows(axis):
        masks |= _masks_of_row(row, axis.length)
    return tuple(m for m in sorted(masks) if not any(m & o == o for o in masks if o != m))


def _masks_of_row(row: tuple[int, ...], length: int) -> set[int]:
    cells = {0: (1 << length) - 1}
    for bit, reached in enumerate(row):
        refined: dict[int, int] = {}
        for mask, positions in cells.items():
            inside = positions & reached
            if inside:
                refined[mask | 1 << bit] = inside
            if inside != positions:
                refined[mask] = positions ^ inside
        cells = refined
    return set(cells)


def _rows(axis: AxisCuts) -> Iterator[tuple[int, ...]]:
    """For every position, the sets (bits) that it reaches along each sequence; equals once."""
    length, counts, branches = axis
    starts = set(zip(*(_parts(length, counts[0], branch) for branch in branches[0]), strict=True))
    reached = [(branches[0].index(sequence[0]), _reached(length, counts, sequence)) for sequence in product(*branches)]
    return (tuple(sets[start[first]] for first, sets in reached) for start in starts)


@lru_cache(maxsize=1 << 11)
def _reached(length: int, counts: tuple[int, ...], sequence: tuple[Branch, ...]) -> tuple[int, ...]:
    """The set (bits) of positions that each part of the first layer reaches along one sequence."""
    here = _parts(length, counts[0], sequence[0])
    if len(counts) == 1:
        onward: Sequence[int] = [1 << i for i in range(length)]
        doors: Sequence[int] = range(length)
    else:
        onward = _reached(length, counts[1:], sequence[1:])
        doors = _parts(length, counts[1], sequence[1])
    reached = [0] * counts[0]
    for part, door in set(zip(here, doors, strict=True)):
        reached[part] |= onward[door]
    return tuple(reached)


@lru_cache(maxsize=1 << 10)
def _parts(length: int, count: int, branch: Branch) -> tuple[int, ...]:
    """The part of every position of one axis."""
    part_of = local_part if branch == "local" else dilated_part
    return tuple(part_of(i, length, count) for i in range(length))


@dataclass(frozen=True)
class Role:
    """What one of the four patterns after the frame-wise one is there for.

    `aspect` is the ideal w_w / w_h. `time_bias` is the ideal n_t over sqrt(T): the two biases
    multiply to 1, so the two n_t to about T, and local parts of one meet all dilated parts of the
    other.
    """

    time: Literal["whole", "split"]
    tokens: int
    aspect: float
    time_bias: float = 1.0


WHOLE_SQUARE = Role("whole", tokens=640, aspect=1.0)
WHOLE_TALL = Role("whole", tokens=1600, aspect=1 / 3)
SPLIT_WIDE = Role("split", tokens=1280, aspect=3.0, time_bias=2 / 3)
SPLIT_BROAD = Role("split", tokens=896, aspect=1.5, time_bias=3 / 2)

PRESET_ORDER = (WHOLE_SQUARE, WHOLE_TALL, SPLIT_WIDE, SPLIT_BROAD)
ALTERNATING_ORDER = (WHOLE_SQUARE, SPLIT_WIDE, WHOLE_TALL, SPLIT_BROAD)


@dataclass(frozen=True)
class Rules:
    """What the search holds to; `stretch` multiplies the window sizes and their bounds.

    Mixing and, where one window can be launched at all, the launch limit are never given up.
    """

    order: tuple[Role, Role, Role, Role]
    stretch: int
    time_roles: bool
    distinct: bool


def _relaxations(least_tokens: int) -> Iterator[Rules]:
    """All rules first, then what some grids force us to give up, the cheapest loss first.

    The order of the presets; the bounds of the windows; which patterns split time; that no pattern
    is repeated. Windows start at such a stretch that `least_tokens` fit, or too many are launched.
    """
    stretch = 1
    while stretch * MAX_TOKENS < 2 * least_tokens:
        stretch *= 2
    for distinct, time_roles in ((True, True), (True, False), (False, False)):
        for wider in (1, 2, 4):
            for order in (PRESET_ORDER, ALTERNATING_ORDER):
                yield Rules(order, stretch * wider, time_roles, distinct)


class Choice(NamedTuple):
    """Splits and how far they are from the ideal of their role; the lowest is the best."""

    cost: int
    window: Window
    splits: Splits


def generate_schedule(grid: TokenGrid, *, heads: int = 1, batch: int = 1) -> Schedule:
    """A cycle of five patterns for any grid, the frame-wise one first. Deterministic.

    Follows arXiv 2512.13492 as far as the grid allows; what gives way, and in which order, is in
    `_relaxations`. Any three consecutive layers mix all grid tokens, always. `heads` and `batch`
    are those of the attention call: windows * branches * heads * batch stay below LAUNCH_LIMIT.
    """
    launches = max(1, (LAUNCH_LIMIT - 1) // (heads * batch))
    first = _frame_wise(grid, launches)
    for rules in _relaxations(least_tokens=len(BRANCHES) * grid.tokens // launches):
        rest = _best_mixing(grid, first, rules, launches)
        if rest is not None:
            return Schedule("auto", tuple(map(WindowPattern, (first, *rest))))
    return Schedule("auto", tuple(map(WindowPattern, (first, *[Splits(1, 1, 1)] * 4))))


def _frame_wise(grid: TokenGrid, launches: int) -> Splits:
    """One window per frame, or per as few frames as the launch limit allows."""
    candidates = (Splits(n, 1, 1) for n in reversed(_split_counts(grid.t)))
    return next(splits for splits in candidates if _can_launch(grid, splits, launches))


def _can_launch(grid: TokenGrid, splits: Splits, launches: int) -> bool:
    return splits.windows == 1 or WindowPattern(splits).launched_windows(grid) <= launches


def _best_mixing(grid: TokenGrid, first: Splits, rules: Rules, launches: int) -> tuple[Splits, ...] | None:
    """The cheapest a, b, c, d so that the cycle first, a, b, c, d mixes, or None.

    The middle two are in the most spans of three layers: the pairs b, c are walked in order of
    cost, and completed by the cheapest a, then d, unless they cannot beat the best so far.
    """
    a_choices, b_choices, c_choices, d_choices = (_choices(grid, role, rules, launches) for role in rules.order)
    before = {b: [a for a in a_choices if _mix(grid, first, a, b)] for b in b_choices}
    after = {c: [d for d in d_choices if _mix(grid, c, d, first)] for c in c_choices}
    pairs = [(b, c) for b, c in product(b_choices, c_choices) if before[b] and after[c]]
    best: tuple[int, tuple[Choice, ...]] | None = None
    for b, c in sorted(pairs, key=lambda pair: pair[0].cost + pair[1].cost):
        least = b.cost + c.cost + before[b][0].cost + after[c][0].cost
        if best is None or least < best[0]:
            found = _completed(grid, first, (b, c), (before[b], after[c]), rules)
            best = found if best is None else min(best, found or best)
    return None if best is None else tuple(choice.splits for choice in best[1])


def _completed(
    grid: TokenGrid,
    first: Splits,
    middle: tuple[Choice, Choice],
    outer: tuple[list[Choice], list[Choice]],
    rules: Rules,
) -> tuple[int, tuple[Choice, ...]] | None:
    """These middle two with the cheapest choices around them, and what all four cost."""
    b, c = middle
    before, after = outer
    beside_b = _ranked([c], [b], rules)
    fitting = [d for d in after if _mix(grid, b, c, d)]
    if not beside_b or not fitting:
        return None
    middle_cost = b.cost + beside_b[0][0]
    for a_cost, a in _ranked(before, middle, rules):
        if not _mix(grid, a, b, c):
            continue
        for d_cost, d in _ranked(fitting, (a, b, c), rules):
            if _mix(grid, d, first, a):
                return middle_cost + a_cost + d_cost, (a, b, c, d)
    return None


def _mix(grid: TokenGrid, *layers: Choice | Splits) -> bool:
    splits = (layer.splits if isinstance(layer, Choice) else layer for layer in layers)
    return mixes_within(grid, tuple(map(WindowPattern, splits)))


def _ranked(choices: Sequence[Choice], others: Sequence[Choice], rules: Rules) -> list[tuple[int, Choice]]:
    """Choices by their cost beside the others: mixed ratios are better, repetition is ruled out."""
    return sorted(
        (choice.cost + sum(_likeness(choice.window, other.window) for other in others), choice)
        for choice in choices
        if not (rules.distinct and any(choice.splits == other.splits for other in others))
    )


def _likeness(a: Window, b: Window) -> int:
    return SAME_TOKENS_COST * (a.tokens == b.tokens) + SAME_ASPECT_COST * (a.h * b.w == a.w * b.h)


def _choices(grid: TokenGrid, role: Role, rules: Rules, launches: int) -> list[Choice]:
    """The splits nearest to the role's ideal window that keep the rules, nearest first."""
    ideal = _ideal_window(grid, role, rules.stretch)
    choices = (
        Choice(_cost(grid, splits, ideal), splits.largest_window(grid), splits)
        for splits in _splits_in_bounds(grid, role, rules)
        if _can_launch(grid, splits, launches)
    )
    return sorted(choices)[:CHOICES_PER_ROLE]


def _splits_in_bounds(grid: TokenGrid, role: Role, rules: Rules) -> Iterator[Splits]:
    time_counts = _split_counts(grid.t)
    if rules.time_roles and grid.t > 1:
        time_counts = (1,) if role.time == "whole" else time_counts[1:]
    least, most = rules.stretch * MIN_TOKENS, rules.stretch * MAX_TOKENS
    for t, h, w in product(time_counts, _split_counts(grid.h), _split_counts(grid.w)):
        if least <= -(-grid.t // t) * -(-grid.h // h) * -(-grid.w // w) <= most:
            yield Splits(t, h, w)


@lru_cache(maxsize=64)
def _split_counts(length: int) -> tuple[int, ...]:
    """For every window length the fewest parts that keep to it; all divisors are among them."""
    return tuple(sorted({-(-length // size) for size in range(1, length + 1)}))


def _ideal_window(grid: TokenGrid, role: Role, stretch: int) -> tuple[float, float, float]:
    """The role's window (w_t, w_h, w_w) for this grid, were tokens divisible."""
    tokens = role.tokens * stretch
    time_splits = 1.0 if role.time == "whole" else max(1.0, sqrt(grid.t) * role.time_bias)
    area = max(1.0, tokens * time_splits / grid.t)
    h = _clamp(sqrt(area / role.aspect), grid.h)
    w = _clamp(area / h, grid.w)
    h = _clamp(area / w, grid.h)
    return _clamp(tokens / (h * w), grid.t), h, w


def _clamp(size: float, length: int) -> float:
    return min(max(size, 1.0), float(length))


def _cost(grid: TokenGrid, splits: Splits, ideal: tuple[float, float, float]) -> int:
    """Octaves from the ideal, and the price of uneven windows and of no multiple of 64."""
    cost = 0
    for length, count, size in zip(grid.sizes, splits.counts, ideal, strict=True):
        cost += round(OCTAVE * abs(log2(length / count / size)))
        cost += UNEVEN_COST * (length % count != 0)
    multiple_of_64 = splits.divide(grid) and splits.largest_window(grid).tokens % 64 == 0
    return cost + NOT_64_COST * (not multiple_of_64)
