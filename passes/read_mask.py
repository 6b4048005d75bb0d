"""Say of an attention mask what it can do to the tokens of a grid, whatever the model's inputs are.

Attention may be windowed only if its mask hides no grid key from a grid query, and if every grid query sees the same
of the other keys. Both are read from the bounds of passes.bound_values, never from example values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from t3compile.errors import GridError, InputsError
from t3compile.inputs import named_inputs
from t3compile.passes.bound_values import ValueBounds
from t3compile.passes.value_numbers import LARGEST, Numbers
from t3compile.program import Program


@dataclass(frozen=True)
class GridPlace:
    """Where queries and keys hold the tokens of a grid: behind the one's prefix and before its suffix, each its own."""

    query_prefix: int
    query_suffix: int
    prefix: int
    suffix: int
    grid_tokens: int

    @property
    def queries(self) -> int:
        return self.query_prefix + self.grid_tokens + self.query_suffix

    @property
    def keys(self) -> int:
        return self.prefix + self.grid_tokens + self.suffix


@dataclass(frozen=True)
class MaskReading:
    """What is proven of a mask.

    ``hides_grid``: a grid key may be hidden from a grid query, or weighted; or that it is not cannot be proven.
    ``same_rows``: all grid queries have the same row. ``has_effect``: False where the mask provably does nothing to
    any query. ``detail``: one phrase for the user. ``assumed``: inputs that were taken to hold only 0 and 1.
    """

    hides_grid: bool
    same_rows: bool
    has_effect: bool
    detail: str
    assumed: tuple[str, ...] = ()

    @property
    def allows_windows(self) -> bool:
        return not self.hides_grid and self.same_rows


def read_mask(bounds: ValueBounds, mask: fx.Node, shape: Sequence[int], place: GridPlace) -> MaskReading:
    """What a mask does in an attention of queries and keys that both hold one grid.

    ``mask`` yields a tensor that broadcasts to ``shape`` [B, N, S_q, S_k]: bool, True where visible, or floating,
    added to the scores. GridError where the grid's place does not fit the shape.
    """
    shape = tuple(shape)
    value = mask.meta["val"]
    given = tuple(int(n) for n in value.shape)
    query_prefix, prefix, grid_tokens = place.query_prefix, place.prefix, place.grid_tokens
    if shape[-2:] != (place.queries, place.keys) or torch.broadcast_shapes(given, shape) != shape:
        raise GridError(
            f"a mask of shape {given} for attention of shape {shape} does not fit "
            f"{query_prefix} + {grid_tokens} + {place.query_suffix} queries and "
            f"{prefix} + {grid_tokens} + {place.suffix} keys before, in and behind the grid"
        )
    numbers = bounds.numbers(mask)
    if numbers is None:
        return MaskReading(
            True, False, True, f"the mask {given} has more than {LARGEST} different elements: too large to prove"
        )
    whole = numbers.expand(shape).grouped()
    rows = whole.slice(len(shape) - 2, query_prefix, query_prefix + grid_tokens)
    block = rows.slice(len(shape) - 1, prefix, prefix + grid_tokens)
    by_input = _named(bounds.inputs_of(mask))
    visible = 1.0 if value.dtype is torch.bool else 0.0
    verb = "hidden" if value.dtype is torch.bool else "hidden or weighted"
    hidden = [prefix + key for key in _touched_keys(bounds, block, visible)]
    same_rows = _has_same_rows(bounds, rows)
    if hidden:
        certain = bool(_is_known(bounds, block).all())
        detail = f"grid keys {_runs(hidden)} {'are' if certain else 'may be'} {verb}{'' if certain else by_input}"
        return MaskReading(True, same_rows, True, detail)
    elsewhere = _touched_keys(bounds, whole, visible)
    if not elsewhere:
        return MaskReading(False, same_rows, False, "the mask hides nothing")
    outside = _touched_keys(bounds, rows, visible)
    if not outside:
        detail = f"keys {_runs(elsewhere)} may be {verb} from queries outside of the grid only{by_input}"
        return MaskReading(False, same_rows, True, detail)
    certain = bool(_is_known(bounds, rows).all())
    detail = f"keys {_runs(outside)} {'are' if certain else 'may be'} {verb}{'' if certain else by_input}"
    if not same_rows:
        detail += ", not alike for all grid queries"
    return MaskReading(False, same_rows, True, detail)


class MaskReader:
    """Reads the masks of one program, with as few assumptions about its inputs as the proof needs."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._assumable = binary_inputs(program)
        self._bounds: dict[tuple[str, ...], ValueBounds] = {}

    def read(self, mask: fx.Node, shape: Sequence[int], place: GridPlace) -> MaskReading:
        """`read_mask`, under assumptions only where there is no proof without; ``assumed`` lists the needed ones."""

        def reading(names: Sequence[str]) -> MaskReading:
            result = read_mask(self._bounds_under(tuple(names)), mask, shape, place)
            return replace(result, assumed=tuple(names))

        unaided = reading(())
        names = [name for name in self._bounds_under(()).inputs_of(mask) if name in self._assumable]
        if unaided.allows_windows or not names:
            return unaided
        best = reading(names)
        if not best.allows_windows:
            return unaided
        for name in names:
            fewer = reading([other for other in best.assumed if other != name])
            if fewer.allows_windows:
                best = fewer
        return best

    def _bounds_under(self, names: tuple[str, ...]) -> ValueBounds:
        if names not in self._bounds:
            self._bounds[names] = ValueBounds(self._program, {name: self._assumable[name] for name in names})
        return self._bounds[names]


def binary_inputs(program: Program) -> Mapping[str, tuple[float, float]]:
    """Inputs that may be taken for masks, with the bounds (0, 1): an assumption about what an input means.

    They are integer or floating, reach the mask of some attention call, and hold only zeros and ones, at
    least one of these, in the example inputs. Who relies on it says so ("assumes that input
    'encoder_attention_mask' holds only 0 and 1"); without example inputs there are none.
    """
    bounds = ValueBounds(program)
    reaching: dict[str, None] = {}
    for node in program.graph.nodes:
        mask = _mask_of(node)
        if mask is not None:
            reaching.update(dict.fromkeys(bounds.inputs_of(mask)))
    try:
        examples = named_inputs(program)
    except InputsError:
        return {}
    return {name: (0.0, 1.0) for name in reaching if _is_binary(examples.get(name))}


def _is_binary(value: Tensor | None) -> bool:
    if value is None or value.dtype is torch.bool or value.is_complex():
        return False
    # All zeros look like anything: latents, positions, an additive mask.
    return bool(((value == 0) | (value == 1)).all()) and bool((value == 1).any())


def _mask_of(node: fx.Node) -> fx.Node | None:
    """The mask argument of an attention call."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _is_known(bounds: ValueBounds, numbers: Numbers) -> Tensor:
    """bool, of the core's shape: whether an element has one value only."""
    lo, hi, nan = bounds.look_up(numbers.core)
    return (lo == hi) & ~nan


def _touched_keys(bounds: ValueBounds, numbers: Numbers, visible: float) -> list[int]:
    """Key positions of which some query's element may be other than `visible`."""
    lo, hi, nan = bounds.look_up(numbers.core)
    touched = (lo != visible) | (hi != visible) | nan
    last = len(numbers.shape) - 1
    return torch.nonzero(touched.flatten(0, -2).any(0)[numbers.positions(last)]).flatten().tolist()


def _has_same_rows(bounds: ValueBounds, rows: Numbers) -> bool:
    """Whether all rows of the query axis are provably equal."""
    dim = len(rows.shape) - 2
    first = rows.core.narrow(dim, 0, 1)
    lo, _, _ = bounds.look_up(rows.core)
    known = _is_known(bounds, rows)
    equal_constants = known & known.narrow(dim, 0, 1) & (lo == lo.narrow(dim, 0, 1))
    return bool(((rows.core == first) | equal_constants).all())


def _runs(positions: Sequence[int]) -> str:
    """Ascending positions as "0..3, 7", the first three runs."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    shown = [f"{a}..{b}" if a != b else str(a) for a, b in runs[:3]]
    return ", ".join(shown) + (f" and {len(runs) - 3} more runs" if len(runs) > 3 else "")


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(f"'{name}'" for name in names)
    return f" by input {listed}" if len(names) == 1 else f" by inputs {listed}"
