"""Token grids and the two index laws of window attention, as integer arithmetic.

Source of the laws: arXiv 2512.13492 (T3-Video). Uneven axes are cut as numpy.array_split cuts:
longer parts first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from t3compile.errors import GridError, PatternError

AXES = ("t", "h", "w")
# The order in which a sequence runs over the axes, outermost first; "hwt" is index (h*W + w)*T + t.
FRAME_MAJOR = "thw"


def is_token_order(order: object) -> bool:
    """Whether this names an order of tokens: the letters t, h, w, each once."""
    return isinstance(order, str) and sorted(order) == sorted(AXES)


def permuted(values: tuple[int, int, int], order: str) -> tuple[int, int, int]:
    """A value per axis (t, h, w) in sequence order."""
    first, second, third = (values[AXES.index(axis)] for axis in order)
    return first, second, third


def _check_positive(kind: str, values: tuple[int, int, int], error: type[Exception]) -> None:
    for axis, value in zip(AXES, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise error(f"{kind} {values}: {axis} is {value!r}, but must be a whole number of at least 1")


@dataclass(frozen=True, order=True)
class TokenGrid:
    """The latent video after patchify, in tokens, frame-major: index = (t*H + h)*W + w."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        _check_positive("grid", self.sizes, GridError)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.t, self.h, self.w)

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    def in_order(self, order: str) -> TokenGrid:
        """The grid whose sizes stand as a sequence of this order runs over them."""
        return TokenGrid(*permuted(self.sizes, order))

    def index(self, t: int, h: int, w: int) -> int:
        return (t * self.h + h) * self.w + w

    def coordinates(self) -> Iterator[tuple[int, int, int]]:
        """All tokens (t, h, w) in sequence order."""
        return ((t, h, w) for t in range(self.t) for h in range(self.h) for w in range(self.w))

    @classmethod
    def parse(cls, text: str) -> TokenGrid:
        """Read ``TxHxW``, for example ``21x30x52``."""
        match = re.fullmatch(r"\s*(\d+)\s*[x×,]\s*(\d+)\s*[x×,]\s*(\d+)\s*", text)
        if match is None:
            raise GridError(f"grid '{text}' is not of the form TxHxW, for example 21x30x52 (tokens)")
        t, h, w = (int(part) for part in match.groups())
        return cls(t, h, w)

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


@dataclass(frozen=True)
class GridHint:
    """A token grid given by hand; ``start`` is the place of its first token among the keys, where that is not plain."""

    grid: TokenGrid
    start: int | None = None

    @classmethod
    def parse(cls, text: str) -> GridHint:
        """Read ``TxHxW`` or ``TxHxW@START``, for example ``1x64x64@77``."""
        grid, at, start = text.partition("@")
        if at and not start.strip().isdecimal():
            raise GridError(f"grid '{text}' is not of the form TxHxW@START, for example 1x64x64@77 (tokens)")
        return cls(TokenGrid.parse(grid), int(start) if at else None)

    def __str__(self) -> str:
        return str(self.grid) if self.start is None else f"{self.grid}@{self.start}"


@dataclass(frozen=True, order=True)
class Splits:
    """Number of windows per axis (n_t, n_h, n_w)."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        _check_positive("splits", self.counts, PatternError)

    @property
    def counts(self) -> tuple[int, int, int]:
        return (self.t, self.h, self.w)

    @property
    def windows(self) -> int:
        """Windows of one branch."""
        return self.t * self.h * self.w

    def check_fit(self, grid: TokenGrid) -> None:
        for axis, count, length in zip(AXES, self.counts, grid.sizes, strict=True):
            if count > length:
                raise PatternError(
                    f"splits {self} do not fit grid {grid}: axis {axis} has {length} tokens "
                    f"and cannot be cut into {count} windows"
                )

    def divide(self, grid: TokenGrid) -> bool:
        """Whether every window has the same size."""
        return all(length % count == 0 for count, length in zip(self.counts, grid.sizes, strict=True))

    def in_order(self, order: str) -> Splits:
        """The same splits for the grid in this order."""
        return Splits(*permuted(self.counts, order))

    def largest_window(self, grid: TokenGrid) -> Window:
        t, h, w = (-(-length // n) for length, n in zip(grid.sizes, self.counts, strict=True))
        return Window(t, h, w)

    def __str__(self) -> str:
        return f"({self.t},{self.h},{self.w})"


@dataclass(frozen=True, order=True)
class Window:
    """Tokens per axis that attend to each other (w_t, w_h, w_w)."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


@dataclass(frozen=True)
class Run:
    """A run of equally long parts of one axis: parts first_part..first_part+parts-1, each of `size` tokens."""

    first_part: int
    parts: int
    size: int


def part_runs(length: int, parts: int) -> tuple[Run, ...]:
    """The one or two runs of equally long parts when `length` tokens are cut into `parts`.

    Both laws give part p the same size, so the runs are shared by the local and the dilated branch.
    """
    size, longer = divmod(length, parts)
    if longer == 0:
        return (Run(0, parts, size),)
    return (Run(0, longer, size + 1), Run(longer, parts - longer, size))


def part_size(part: int, length: int, parts: int) -> int:
    """Tokens in one part."""
    size, longer = divmod(length, parts)
    return size + (part < longer)


def local_part(i: int, length: int, parts: int) -> int:
    """The contiguous part that holds token i when 0..length-1 is cut into `parts`, longer parts first."""
    size, longer = divmod(length, parts)
    in_longer = longer * (size + 1)
    return i // (size + 1) if i < in_longer else longer + (i - in_longer) // size


def dilated_part(i: int, length: int, parts: int) -> int:
    """The residue class of token i: tokens `parts` apart."""
    return i % parts


def square_sum(length: int, parts: int) -> int:
    """Sum over parts of size squared: query-key pairs of one axis."""
    return sum(run.parts * run.size * run.size for run in part_runs(length, parts))


def partitions_coincide(grid: TokenGrid, splits: Splits) -> bool:
    """Whether local and dilated windows are the same partition: on every axis one window, or windows of one token."""
    return all(n in (1, length) for n, length in zip(splits.counts, grid.sizes, strict=True))
