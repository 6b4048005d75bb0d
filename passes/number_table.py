"""The bounds of all value numbers of a graph, looked up by number."""

from __future__ import annotations

import torch
from torch import Tensor

from t3compile.passes.value_ranges import INF, LARGEST_EXACT


class NumberTable:
    """Bounds of all value numbers; a constant has one number, whatever its dtype."""

    def __init__(self) -> None:
        self._bounds = torch.empty(2, 0, dtype=torch.float64)
        self._flags = torch.empty(2, 0, dtype=torch.bool)  # may be NaN; is a constant
        self._size = 0
        self._bits = torch.empty(0, dtype=torch.int64)  # sorted bit patterns of the constants
        self._bit_numbers = torch.empty(0, dtype=torch.int64)

    def look_up(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float64 lowest and highest value, bool may be NaN and is a constant, in the shape of ``numbers``."""
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
