"""Attention that was found spelled out, and the one call that takes its place.

Output graph:
    out = aten.scaled_dot_product_attention(q, k, v, mask?, 0.0, False, scale=s)     q, k, v [B, N, S, D]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from t3compile.passes.aten_calls import node_shape
from t3compile.passes.axis_atoms import Atom, Atoms, Axes
from t3compile.passes.graph_pass import Cursor, is_call, replace_node, viewable

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """One thing done to the scores; tensors come with the axes of the scores at that place."""

    kind: Literal["scale", "multiply", "divide", "add", "hide", "keep"]
    number: float = 1.0
    tensor: fx.Node | None = None
    axes: Axes = ()


@dataclass
class Operand:
    """A tensor and what its axes are."""

    node: fx.Node
    axes: Axes


@dataclass(frozen=True)
class Match:
    """A product, softmax, product that is attention: what its axes are, and what is done to the scores between."""

    atoms: Atoms
    q: Operand
    k: Operand
    v: Operand
    scale: float
    steps: tuple[Step, ...]
    batch: tuple[tuple[Atom, ...], ...]
    query: tuple[Atom, ...]
    key: tuple[Atom, ...]
    depth: tuple[Atom, ...]
    value_depth: tuple[Atom, ...]
    out: fx.Node
    out_axes: Axes


def write_call(match: Match) -> None:
    """Put the call in the place of the product with the values."""
    atoms, out = match.atoms, match.out
    cursor = Cursor(out)
    outer, heads = _batch_and_heads(match)
    query, key = atoms.leaves(match.query), atoms.leaves(match.key)
    depth, value_depth = atoms.leaves(match.depth), atoms.leaves(match.value_depth)
    dtype = _widest(*(x.node.meta["val"].dtype for x in (match.q, match.k, match.v)))
    q, k, v = (
        _cast(cursor, _arrange(cursor, atoms, operand, (outer, heads, rows, columns)), dtype)
        for operand, rows, columns in (
            (match.q, query, depth),
            (match.k, key, depth),
            (match.v, key, value_depth),
        )
    )
    builder = _MaskBuilder(cursor, atoms, (outer, heads, query, key), dtype)
    scale = match.scale
    later = [math.prod(s.number for s in match.steps[i + 1 :] if s.kind == "scale") for i in range(len(match.steps))]
    for step, factor in zip(match.steps, later, strict=True):
        if step.kind == "scale":
            scale *= step.number
        elif step.kind in ("multiply", "divide"):
            assert step.tensor is not None
            tensor = _cast(cursor, builder.arranged(step), dtype)
            target = aten.div.Tensor if step.kind == "divide" else aten.mul.Tensor
            if node_shape(tensor)[-1] == 1:
                q = cursor.call(target, q, tensor)
            else:
                k = cursor.call(target, k, cursor.call(aten.transpose.int, tensor, -2, -1))
            builder.rescale(target, tensor)
        else:
            builder.add(step, factor)
    if scale <= 0:
        # Kernels disagree on negative scales.
        q, scale = cursor.call(aten.mul.Tensor, q, scale), 1.0
    attended = cursor.call(
        aten.scaled_dot_product_attention.default, q, k, v, builder.mask(), 0.0, False, scale=float(scale)
    )
    axes: Axes = (outer, heads, query, value_depth)
    restored = _restore(cursor, atoms, attended, axes, match.out_axes, node_shape(out))
    replace_node(out, _cast(cursor, restored, out.meta["val"].dtype))


def _batch_and_heads(match: Match) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    """Batch axes as B and N: N is the last of them, with groups of queries that share keys."""
    atoms = match.atoms
    batch = [atoms.leaves(axis) for axis in match.batch]
    if len(batch) == 1:
        (only,) = batch
        return (only[:-1], only[-1:]) if len(only) > 1 else (only, ())
    if not batch:
        return (), ()
    last = len(batch) - 1
    with_keys = set(atoms.flat(match.k.axes))
    while last > 1 and batch[last] and not set(batch[last]) & with_keys:
        last -= 1
    outer = tuple(a for axis in batch[:last] for a in axis)
    return outer, tuple(a for axis in batch[last:] for a in axis)


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _cast(cursor: Cursor, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else cursor.call(aten._to_copy.default, node, dtype=dtype)


def _view(cursor: Cursor, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    if node_shape(node) == shape:
        return node
    target = aten.view.default if viewable(node.meta["val"], shape) else aten.reshape.default
    return cursor.call(target, node, list(shape))


def _permuted(cursor: Cursor, node: fx.Node, order: list[int]) -> fx.Node:
    moved = [i for i, source in enumerate(order) if i != source]
    if not moved:
        return node
    if len(moved) == 2:
        return cursor.call(aten.transpose.int, node, *moved)
    return cursor.call(aten.permute.default, node, order)


def _arrange(
    cursor: Cursor, atoms: Atoms, operand: Operand, groups: Axes, *, keep_ones: tuple[bool, ...] = (False,) * 4
) -> fx.Node:
    """The tensor with one axis for each group of atoms.

    Groups that the tensor lacks entirely stay of size one where `keep_ones`, else it is expanded.
    """
    have = [atoms.leaves(axis) for axis in operand.axes]
    present = {atom for axis in have for atom in axis}
    wanted = [tuple(atom for atom in group if atom in present) for group in groups]
    node = operand.node
    filled = [axis for axis in have if axis]
    whole = [group for group in wanted if group]
    if sorted(filled) == sorted(whole):
        # No axis has to be cut: one transpose at most, between axes as they are.
        source = _view(cursor, node, atoms.shape(tuple(have) if len(have) == 4 else tuple(filled)))
        shaped = have if len(have) == 4 else filled
        order = _axis_order(shaped, wanted if len(have) == 4 else whole)
        node = _permuted(cursor, source, order)
    else:
        flat = [atom for axis in have for atom in axis]
        node = _view(cursor, node, atoms.shape(tuple((atom,) for atom in flat)))
        ordered = [atom for group in wanted for atom in group]
        node = _permuted(cursor, node, [flat.index(atom) for atom in ordered])
    partial = [bool(got) and got != tuple(group) for got, group in zip(wanted, groups, strict=True)]
    if any(partial):
        fine = [atom for group in groups for atom in group]
        node = _view(cursor, node, tuple(atoms.size([a]) if a in present else 1 for a in fine))
        sizes = [
            atoms.size([atom]) if atom in present or part or not keep else 1
            for group, part, keep in zip(groups, partial, keep_ones, strict=True)
            for atom in group
        ]
        if tuple(sizes) != node_shape(node):
            node = cursor.call(aten.expand.default, node, sizes)
    shape = tuple(
        atoms.size(group) if (got or part) else 1 for got, part, group in zip(wanted, partial, groups, strict=True)
    )
    if math.prod(shape) == math.prod(node_shape(node)):
        node = _view(cursor, node, shape)
    full = tuple(
        1 if keep and not got else atoms.size(group) for got, keep, group in zip(wanted, keep_ones, groups, strict=True)
    )
    if node_shape(node) == full:
        return node
    if math.prod(shape) != math.prod(node_shape(node)):
        return _view(cursor, node, full)
    return cursor.call(aten.expand.default, node, list(full))


def _axis_order(have: list[tuple[Atom, ...]], wanted: list[tuple[Atom, ...]]) -> list[int]:
    """Which axis goes where; axes of size one keep their order."""
    left = list(range(len(have)))
    order = []
    for group in wanted:
        source = next(i for i in left if have[i] == group)
        left.remove(source)
        order.append(source)
    return order


def _restore(cursor: Cursor, atoms: Atoms, node: fx.Node, axes: Axes, wanted: Axes, shape: tuple[int, ...]) -> fx.Node:
    """The attended values with the axes that the second product had."""
    targets = [atoms.leaves(axis) for axis in wanted]
    if len(targets) == len(axes) and sorted(targets) == sorted(axes):
        return _view(cursor, _permuted(cursor, node, _axis_order(list(axes), targets)), shape)
    flat = [atom for axis in axes for atom in axis]
    node = _view(cursor, node, atoms.shape(tuple((atom,) for atom in flat)))
    ordered = [atom for target in targets for atom in target]
    node = _permuted(cursor, node, [flat.index(atom) for atom in ordered])
    return _view(cursor, node, shape)


@dataclass
class _MaskBuilder:
    """Collects what is added to the scores and what hides them, in their order."""

    cursor: Cursor
    atoms: Atoms
    groups: Axes
    dtype: torch.dtype
    added: fx.Node | None = None
    visible: fx.Node | None = None

    def arranged(self, step: Step) -> fx.Node:
        """The step's tensor as [B or 1, N or 1, S_q or 1, S_k or 1]."""
        assert step.tensor is not None
        shape = node_shape(step.tensor)
        axes: Axes = tuple(
            () if size == 1 else axis
            for size, axis in zip(shape, step.axes[len(step.axes) - len(shape) :], strict=True)
        )
        return _arrange(self.cursor, self.atoms, Operand(step.tensor, axes), self.groups, keep_ones=(True,) * 4)

    def add(self, step: Step, factor: float) -> None:
        if step.kind == "add":
            self._add(step, factor * step.number)
            return
        mask = _cast(self.cursor, self.arranged(step), torch.bool)
        if step.number == -math.inf:
            visible = mask if step.kind == "keep" else self._negated(mask)
            both = None if self.visible is None else self.cursor.call(aten.logical_and.default, self.visible, visible)
            self.visible = both or visible
            return
        hidden = mask if step.kind == "hide" else self._negated(mask)
        base = self.added
        if base is None:
            shape, device = list(node_shape(hidden)), hidden.meta["val"].device
            base = self.cursor.call(aten.full.default, shape, 0.0, dtype=self.dtype, device=device)
        self.added = self.cursor.call(aten.masked_fill.Scalar, base, hidden, torch.finfo(self.dtype).min)

    def _add(self, step: Step, factor: float) -> None:
        tensor = self.arranged(step)
        if node_shape(tensor)[-1] == 1:
            return  # the same for all keys of a query: the softmax takes it out again
        tensor = _cast(self.cursor, tensor, self.dtype)
        if factor != 1:
            tensor = self.cursor.call(aten.mul.Tensor, tensor, factor)
        self.added = tensor if self.added is None else self.cursor.call(aten.add.Tensor, self.added, tensor)

    def _negated(self, mask: fx.Node) -> fx.Node:
        if is_call(mask, aten.logical_not, aten.bitwise_not):
            source = mask.args[0]
            assert isinstance(source, fx.Node)
            if source.meta["val"].dtype == torch.bool:
                return source
        return self.cursor.call(aten.logical_not.default, mask)

    def rescale(self, target: Any, tensor: fx.Node) -> None:
        if self.added is not None:
            self.added = self.cursor.call(target, self.added, tensor)

    def mask(self) -> fx.Node | None:
        """A boolean mask, an additive one, or both as an additive one."""
        if self.visible is None or self.added is None:
            return self.visible if self.added is None else self.added
        hidden = self._negated(self.visible)
        return self.cursor.call(aten.masked_fill.Scalar, self.added, hidden, -math.inf)
