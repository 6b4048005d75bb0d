"""Where a site's tokens stand, found out by experiment: an independent proof of what the graph analysis derived.

All attention is cut out, so that nothing but the token embedding brings tokens together. Then one patch of the latents
is changed at a time, and the positions that move among a site's queries and keys are watched: it must be the one
position where the derived layout has that patch. Nothing here looks at how the layout was derived.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from t3compile.errors import PlanError
from t3compile.execute import Watcher, watch
from t3compile.geometry import AXES, TokenGrid
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION
from t3compile.program import Program
from t3compile.progress import SILENT, Progress
from t3compile.sites import AttentionSite, GridAxis, SiteSurvey

Verdict = Literal["confirmed", "contradicted", "inconclusive"]
Side = Literal["queries", "keys"]
Cell = tuple[int, int, int]
# Input name, axis, first and one past the last position that belong to one cell.
_Patch = tuple[str, tuple[tuple[int, int, int], ...]]

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# Queries and keys of all sites are held while one patch is changed after the other; beyond this, of a site per stack.
_MOST_ELEMENTS = 2**24
# Differences of this many rounding steps are not a move.
_ROUNDING_STEPS = 16
# A position that moves so much more than the expected one has the patch in its place.
_FAR_MORE = 10.0
_SEED = 0


@dataclass(frozen=True)
class Contradiction:
    """One changed cell that moved another position than the layout says; the sequence is that of one side."""

    cell: Cell
    side: Side
    expected: int
    moved: tuple[int, ...]

    def __str__(self) -> str:
        where = ", ".join(map(str, self.moved))
        return (
            f"changing grid cell (t, h, w) = {self.cell} should move position {self.expected} of the {self.side}, "
            f"but moves {where}"
        )


@dataclass(frozen=True)
class SiteProbe:
    """What the experiment says about the layout of one site, and for which other sites it stands.

    ``cells`` is the number of cells that were changed, ``detail`` what was seen; ``contradiction`` is the first cell
    that moved elsewhere, where moves tell.
    """

    node: str
    stack: str
    grid: TokenGrid
    verdict: Verdict
    detail: str
    cells: int = 0
    contradiction: Contradiction | None = None
    stands_for: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "grid": list(self.grid.sizes)}


@dataclass(frozen=True)
class ProbeReport:
    """The probed sites; ``passed`` while none is contradicted."""

    sites: tuple[SiteProbe, ...]

    def having(self, verdict: Verdict) -> tuple[SiteProbe, ...]:
        return tuple(site for site in self.sites if site.verdict == verdict)

    @property
    def passed(self) -> bool:
        return not self.having("contradicted")

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "sites": [site.to_json() for site in self.sites]}


def probe(
    program: Program,
    survey: SiteSurvey,
    *,
    sites: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> ProbeReport:
    """Check the layouts of a survey's sites by experiment on the program's example inputs.

    ``sites`` are node names; None takes all, or where their queries and keys are too much to hold, the first of every
    stack. A layout is confirmed if every changed cell moves its own position of the queries and keys and no other
    grid position, contradicted if it moves another, and inconclusive where nothing moves or operations other than
    attention mix tokens. Of packed latents the order of the tokens is checked, not what rows they form. Raises
    PlanError for a survey of another graph or an unknown site, InputsError without example inputs.
    """
    if survey.fingerprint != program.fingerprint():
        raise PlanError("the survey was made of another graph: detect the sites of this program again")
    chosen = _choose(survey, sites)
    inputs = named_inputs(program)
    probes: dict[str, SiteProbe] = {}
    for group in _by_source(chosen).values():
        probes.update(_probe_group(program, inputs, group, progress))
    stands_for = _stands_for(survey, chosen) if sites is None else {}
    return ProbeReport(tuple(replace(probes[s.node], stands_for=stands_for.get(s.node, ())) for s in chosen))


def _choose(survey: SiteSurvey, names: Sequence[str] | None) -> list[AttentionSite]:
    if names is None:
        elements = sum(2 * site.batch * site.heads * site.tokens * site.head_dim for site in survey.found)
        if elements <= _MOST_ELEMENTS:
            return list(survey.found)
        return list({_alike(site): site for site in reversed(survey.found)}.values())[::-1]
    unknown = [name for name in names if survey.site(name) is None]
    if unknown:
        found = ", ".join(site.node for site in survey.found) or "none"
        raise PlanError(f"'{unknown[0]}' is no found site: {found}")
    return [site for site in survey.found if site.node in set(names)]


def _alike(site: AttentionSite) -> tuple[object, ...]:
    """What sites share whose layouts were derived alike."""
    return site.stack, site.grid, site.prefix, site.suffix, site.query_prefix, site.order, site.axes


def _stands_for(survey: SiteSurvey, chosen: Sequence[AttentionSite]) -> dict[str, tuple[str, ...]]:
    probed = {site.node for site in chosen}
    others: dict[tuple[object, ...], list[str]] = {}
    for site in survey.found:
        if site.node not in probed:
            others.setdefault(_alike(site), []).append(site.node)
    return {site.node: tuple(others.get(_alike(site), ())) for site in chosen}


def _by_source(sites: Sequence[AttentionSite]) -> dict[tuple[object, ...], list[AttentionSite]]:
    """Sites whose cells are the same patches of the inputs; they are watched together."""
    groups: dict[tuple[object, ...], list[AttentionSite]] = {}
    for site in sites:
        start = None if site.axes else (site.prefix, site.tokens)
        groups.setdefault((site.grid, site.axes, start), []).append(site)
    return groups


@dataclass(frozen=True)
class _Move:
    """How far every position of one side of a site moved; float64 [S]. ``floor``: moves below it are rounding."""

    cell: Cell
    side: Side
    expected: int
    start: int
    stop: int
    by: Tensor
    floor: float

    @property
    def positions(self) -> Tensor:
        return (self.by > self.floor).nonzero().flatten()

    def is_elsewhere(self) -> bool:
        """Whether another position has the patch: the expected one stays, or moves far less."""
        expected, most = float(self.by[self.expected]), float(self.by.max())
        if expected <= self.floor:
            return most > self.floor
        in_grid = float(self.by[self.start : self.stop].max())
        return in_grid > _FAR_MORE * expected

    def spilled(self) -> int:
        """Grid positions that moved beside the expected one."""
        moved = self.positions
        inside = (moved >= self.start) & (moved < self.stop) & (moved != self.expected)
        return int(inside.sum())

    def lead(self) -> float:
        """How many times as far as any other grid position the expected one moved."""
        others = self.by.clone()
        others[self.expected] = 0
        most = float(others[self.start : self.stop].max())
        return float(self.by[self.expected]) / most if most else math.inf

    def touches_grid(self) -> bool:
        moved = self.positions
        return bool(((moved >= self.start) & (moved < self.stop)).any())


def _probe_group(
    program: Program, inputs: Mapping[str, Tensor], sites: Sequence[AttentionSite], progress: Progress
) -> dict[str, SiteProbe]:
    """Probes of sites with one grid made of the same inputs."""
    first = sites[0]
    misfit = _misfit(first, inputs)
    if misfit is not None:
        return {site.node: _verdict_of(site, "contradicted", misfit) for site in sites}
    ways = [first.axes] if first.axes else list(_guess_sources(first, inputs))
    if not ways:
        words = f"no input has an axis of {first.grid.tokens} tokens, and the layout names no input axes"
        return {site.node: _verdict_of(site, "inconclusive", words) for site in sites}
    watched = _Watched(program, inputs, sites)
    seen: dict[str, dict[str, list[SiteProbe]]] = {site.node: {} for site in sites}
    for way in ways:
        name = way[0].input_name
        progress(f"probing grid {first.grid} through input '{name}'")
        moves = watched.moves(way, packed=not first.axes)
        for site in sites:
            seen[site.node].setdefault(name, []).append(_judge(site, moves[site.node], name, packed=not first.axes))
    return {site.node: _conclude(site, seen[site.node]) for site in sites}


def _verdict_of(site: AttentionSite, verdict: Verdict, detail: str, **more: Any) -> SiteProbe:
    return SiteProbe(site.node, site.stack, site.grid, verdict, detail, **more)


def _misfit(site: AttentionSite, inputs: Mapping[str, Tensor]) -> str | None:
    """Why the grid cannot be what the named input axes hold, or None."""
    if len({axis.input_name for axis in site.axes}) > 1:
        return "its axes come from several inputs"
    sizes = site.grid.sizes[-len(site.axes) :] if site.axes else ()
    for name, axis, size in zip(AXES[-len(sizes) :], site.axes, sizes, strict=bool(sizes)):
        tensor = inputs.get(axis.input_name)
        if tensor is None or axis.axis >= tensor.dim():
            return f"there is no axis {axis.axis} of an input '{axis.input_name}'"
        length = tensor.shape[axis.axis]
        if length // axis.patch != size:
            return (
                f"grid {site.grid} has {size} tokens along {name}, but axis {axis.axis} of input '{axis.input_name}' "
                f"holds {length // axis.patch} patches of {axis.patch}"
            )
    return None


def _guess_sources(site: AttentionSite, inputs: Mapping[str, Tensor]) -> Iterator[tuple[GridAxis, ...]]:
    """Axes of inputs that may be the packed tokens: one that counts them, or two that together do."""
    t, h, w = site.grid.sizes
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape)
        if tensor.dtype == torch.bool:
            continue
        for axis, length in enumerate(shape):
            if length in (site.grid.tokens, site.tokens) and length > 1:
                yield (GridAxis(name, axis, 1),)
        for a, b in itertools.combinations(range(len(shape)), 2):
            if shape[a] > 1 and shape[b] > 1 and (shape[a], shape[b]) in ((t, h * w), (t * h, w)):
                yield GridAxis(name, a, 1), GridAxis(name, b, 1)


def _cells(grid: TokenGrid) -> list[Cell]:
    """Origin, the end of every axis, the far corner, two random cells and one step from the last along every axis."""
    t, h, w = (size - 1 for size in grid.sizes)
    generator = torch.Generator().manual_seed(_SEED)
    cells = [(0, 0, 0), (t, 0, 0), (0, h, 0), (0, 0, w), (t, h, w)]
    for _ in range(2):
        picked = [int(torch.randint(0, size, (), generator=generator)) for size in grid.sizes]
        cells.append((picked[0], picked[1], picked[2]))
    for axis, size in enumerate(grid.sizes):
        step = list(picked)
        step[axis] += 1 if picked[axis] + 1 < size else -1
        if size > 1:
            cells.append((step[0], step[1], step[2]))
    return list(dict.fromkeys(cells))


def _index(site: AttentionSite, cell: Cell) -> int:
    """Place of a cell in the grid's stretch of the sequence, which runs over the axes in the site's order."""
    place = 0
    for name in site.order:
        axis = AXES.index(name)
        place = place * site.grid.sizes[axis] + cell[axis]
    return place


class _Watched:
    """Queries and keys of some sites on unchanged inputs, to compare with."""

    def __init__(self, program: Program, inputs: Mapping[str, Tensor], sites: Sequence[AttentionSite]) -> None:
        self._program, self._inputs, self._sites = program, inputs, sites
        self._cut = [node.name for node in program.graph.nodes if node.target in (_ATTENTION, WINDOW_ATTENTION)]
        nodes = {node.name: node for node in program.graph.nodes}
        self._sources: dict[tuple[str, Side], str] = {}
        for site in sites:
            call = nodes[site.node]
            if call.target is not _ATTENTION:
                raise PlanError(f"'{site.node}' is no attention call of the graph: probe the original model")
            self._sources[site.node, "queries"] = _argument(call, 0, "query").name
            self._sources[site.node, "keys"] = _argument(call, 1, "key").name
        self._before: dict[str, Tensor] = {}
        self._run(inputs, self._before.__setitem__)

    def _run(self, inputs: Mapping[str, Tensor], see: Callable[[str, Tensor], None]) -> None:
        names = dict.fromkeys(self._sources.values())
        watchers: dict[str, Watcher] = {name: functools.partial(see, name) for name in names}
        watch(self._program, inputs, watchers, cut=self._cut)

    def moves(self, axes: Sequence[GridAxis], *, packed: bool) -> dict[str, list[_Move]]:
        """By site: how far every position moved, for every cell and both sides."""
        found: dict[str, list[_Move]] = {site.node: [] for site in self._sites}
        for number, cell in enumerate(_cells(self._sites[0].grid)):
            changed = self._changed(axes, cell, packed, number)
            if changed is None:
                continue
            by: dict[str, Tensor] = {}
            self._run(changed, functools.partial(self._compare, by))
            for site in self._sites:
                found[site.node] += [self._move(site, cell, side, by) for side in ("queries", "keys")]
        return found

    def _compare(self, by: dict[str, Tensor], name: str, value: Tensor) -> None:
        by[name] = _moved_by(self._before[name], value)

    def _move(self, site: AttentionSite, cell: Cell, side: Side, by: Mapping[str, Tensor]) -> _Move:
        name = self._sources[site.node, side]
        start = site.query_prefix if side == "queries" else site.prefix
        before = self._before[name]
        floor = _ROUNDING_STEPS * torch.finfo(before.dtype).eps * float(before.abs().max())
        return _Move(cell, side, start + _index(site, cell), start, start + site.grid.tokens, by[name], floor)

    def _changed(self, axes: Sequence[GridAxis], cell: Cell, packed: bool, seed: int) -> dict[str, Tensor] | None:
        """The inputs with the cell's patch changed; None where the patch holds nothing that can change."""
        site = self._sites[0]
        tensor = self._inputs[axes[0].input_name]
        where: list[slice] = [slice(None)] * tensor.dim()
        for axis, place in zip(axes, _places(site, axes, cell, tensor, packed), strict=True):
            where[axis.axis] = slice(place * axis.patch, (place + 1) * axis.patch)
        patch = tensor[tuple(where)]
        other = _other_values(tensor, patch, seed)
        if other is None:
            return None
        changed = tensor.clone()
        changed[tuple(where)] = other
        return {**self._inputs, axes[0].input_name: changed}


def _argument(call: fx.Node, position: int, name: str) -> fx.Node:
    node = call.args[position] if position < len(call.args) else call.kwargs[name]
    assert isinstance(node, fx.Node)
    return node


def _places(site: AttentionSite, axes: Sequence[GridAxis], cell: Cell, tensor: Tensor, packed: bool) -> list[int]:
    """Where the cell stands on each of the axes, in patches."""
    if not packed:
        return list(cell[-len(axes) :])
    index = site.grid.index(*cell)
    if len(axes) == 1:
        is_whole_sequence = tensor.shape[axes[0].axis] != site.grid.tokens
        return [index + site.prefix * is_whole_sequence]
    return list(divmod(index, tensor.shape[axes[1].axis]))


def _other_values(tensor: Tensor, patch: Tensor, seed: int) -> Tensor | None:
    """Values that differ from the patch's: noise of the input's size, or other whole numbers that the input holds."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.is_floating_point():
        noise = torch.randn(patch.shape, generator=generator, dtype=torch.float64)
        size = max(float(tensor.abs().max()), 1.0)
        return (patch.double() + size * noise).to(tensor.dtype)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    low, high = int(tensor.min()), int(tensor.max())
    return None if low == high else torch.where(patch == high, low, patch + 1).to(tensor.dtype)


def _moved_by(before: Tensor, after: Tensor) -> Tensor:
    """Largest change at every position of [B, N, S, D]; [S]."""
    return (after - before).abs().amax((0, 1, 3)).double()


def _judge(site: AttentionSite, moves: Sequence[_Move], input_name: str, *, packed: bool) -> SiteProbe:
    """The verdict of the cells changed in one input."""
    if not moves:
        return _verdict_of(site, "inconclusive", f"nothing of input '{input_name}' can be changed")
    cells = len({move.cell for move in moves})
    short = next((move for move in moves if move.stop > len(move.by)), None)
    if short is not None:
        words = f"the {short.side} have {len(short.by)} positions, but the grid would end at {short.stop}"
        return _verdict_of(site, "contradicted", words, cells=cells)
    if not all(math.isfinite(float(move.by.max())) and math.isfinite(move.floor) for move in moves):
        words = "queries or keys are not finite on the example inputs: give others with --inputs FILE"
        return _verdict_of(site, "inconclusive", words, cells=cells)
    touched = any(move.touches_grid() for move in moves)
    elsewhere = next((move for move in moves if move.is_elsewhere()), None)
    # An axis of the right length may be that of text: then it says nothing of the grid.
    if elsewhere is not None and (touched or not packed):
        by_size = elsewhere.by.sort(descending=True, stable=True).indices[: min(8, len(elsewhere.positions))]
        contradiction = Contradiction(
            elsewhere.cell, elsewhere.side, elsewhere.expected, tuple(map(int, by_size.tolist()))
        )
        words = f"input '{input_name}': {contradiction}"
        return _verdict_of(site, "contradicted", words, cells=cells, contradiction=contradiction)
    still = [move for move in moves if float(move.by[move.expected]) <= move.floor]
    if still:
        words = (
            f"changing input '{input_name}' moves no position for {len({move.cell for move in still})} of {cells} "
            "cells: with attention cut out, the tokens do not reach this call"
        )
        return _verdict_of(site, "inconclusive", words, cells=cells)
    spill = max(moves, key=_Move.spilled)
    if spill.spilled():
        words = (
            f"spills: changing grid cell {spill.cell} moves its own position of the {spill.side} and {spill.spilled()} "
            f"others, its own at least {min(move.lead() for move in moves):.2g} times as far in every cell: "
            "an operation other than attention mixes tokens"
        )
        return _verdict_of(site, "inconclusive", words, cells=cells)
    words = f"{cells} cells of input '{input_name}' each move their own position alone"
    if packed:
        words += " (the order of the tokens; rows and columns are those of the positions or of --grid)"
    return _verdict_of(site, "confirmed", words, cells=cells)


def _conclude(site: AttentionSite, by_input: Mapping[str, Collection[SiteProbe]]) -> SiteProbe:
    """One verdict of all inputs that may hold the tokens: an input counts by the best of its ways."""
    best = []
    for ways in by_input.values():
        best.append(min(ways, key=lambda way: ("confirmed", "contradicted", "inconclusive").index(way.verdict)))
    return min(best, key=lambda way: ("contradicted", "confirmed", "inconclusive").index(way.verdict))
