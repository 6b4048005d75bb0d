"""Write attention spelled out as product, softmax, product as one call.

The two products may be matmul, bmm, baddbmm, mm or einsum, with views, transposes, casts, scales and masks in between
and on the operands. Every axis is followed as atoms (passes.axis_atoms), and the match holds only if the first product
contracts depth, the softmax runs over all key atoms, and the second product contracts exactly these with the values.

A fill of -inf becomes a boolean mask (True: visible); rows that it hides entirely, NaN in the spelled-out form, become
zero as in every fused kernel. A finite fill at or below -1e4 becomes an additive mask of the dtype's lowest number:
hidden keys get weight zero, and a row that is hidden entirely stays the plain mean of its values. Additive masks pass
as they are; what is constant over the keys drops out of the softmax.

Input graph:
    scores = aten.matmul(q, aten.transpose(k, -2, -1))
    probabilities = aten.softmax(aten.mul(scores, s), -1)
    out = aten.matmul(probabilities, v)
Output graph:
    out = aten.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=s)     q, k, v [B, N, S, D]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from t3compile.passes.aten_calls import node_shape
from t3compile.passes.attention_product import Product, read_product
from t3compile.passes.axis_atoms import Atom, Atoms, Axes
from t3compile.passes.graph_pass import GraphPass, is_call
from t3compile.passes.matched_attention import Match, Operand, Step, write_call
from t3compile.passes.read_constant import constant_of, constants_of
from t3compile.program import Program, user_input_names

aten = torch.ops.aten

_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
_TRANSPOSES = (aten.permute, aten.transpose, aten.t, aten.mT, aten.numpy_T, aten.adjoint)
_COPIES = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
_CASTS = (aten._to_copy, aten.to, aten.type_as)
# From here down a filled score gets weight zero in every dtype.
_HIDING_FILL = -1e4
_MAX_STEPS = 48


class _NotAttentionError(Exception):
    """Why a softmax is not the middle of one attention."""


@dataclass(frozen=True)
class CanonicalizeSoftmaxAttention(GraphPass):
    """Replace every product, softmax, product that is attention; all else stays."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        constants = constants_of(program.exported)
        fed = _fed_by_inputs(graph_module.graph, user_input_names(program.exported))
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_call(node, *_SOFTMAX):
                continue
            match = _match(node, constants, fed)
            if isinstance(match, Match):
                write_call(match)
                modified = True
        return modified


def unrecognised_attention(program: Program) -> tuple[tuple[str, str], ...]:
    """(node name, reason) of every softmax over scores of queries and keys that stays as it is.

    Such a softmax looks like attention: a product of two tensors that depend on the model's inputs reaches it with
    its shape [..., S_q, S_k].
    """
    constants = constants_of(program.exported)
    fed = _fed_by_inputs(program.graph, user_input_names(program.exported))
    found = []
    for node in program.graph.nodes:
        if is_call(node, *_SOFTMAX) and _looks_like_attention(node, fed):
            match = _match(node, constants, fed)
            if isinstance(match, str):
                found.append((node.name, match))
    return tuple(found)


def _fed_by_inputs(graph: fx.Graph, inputs: tuple[str, ...]) -> frozenset[fx.Node]:
    """Nodes that depend on the model's inputs."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and node.name in inputs
        if is_input or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return frozenset(fed)


def _looks_like_attention(softmax: fx.Node, fed: frozenset[fx.Node]) -> bool:
    shape = node_shape(softmax)
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return False
    pending: list[object] = [softmax.args[0]]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _MAX_STEPS:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen or not isinstance(node.meta.get("val"), Tensor):
            continue
        seen.add(node)
        product = read_product(node)
        if product is not None:
            if all(operand in fed for operand in product.operands):
                return True
            continue
        if node.op == "call_function" and node.meta["val"].numel() * 2 > softmax.meta["val"].numel():
            pending += node.all_input_nodes
    return False


def _match(softmax: fx.Node, constants: Mapping[str, Tensor], fed: frozenset[fx.Node]) -> Match | str:
    """The attention around a softmax, or why there is none."""
    reason = ""
    try:
        for product, path in _paths(softmax):
            try:
                return _interpret(product, path, softmax, constants, fed)
            except _NotAttentionError as error:
                reason = reason or str(error)
    except _NotAttentionError as error:
        reason = reason or str(error)
    return reason or "the scores are no product of queries and keys"


def _paths(softmax: fx.Node) -> Iterator[tuple[Product, tuple[fx.Node, ...]]]:
    """Products that reach a softmax through steps that attention may have, each with these steps in their order."""
    start = softmax.args[0]
    assert isinstance(start, fx.Node)
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(start, ())]
    seen: set[fx.Node] = set()
    ended: list[str] = []
    while pending:
        node, path = pending.pop()
        product = read_product(node)
        if product is not None:
            yield product, path
        if node in seen or product is not None:
            continue
        seen.add(node)
        sources = _score_sources(node) if len(path) < _MAX_STEPS else []
        if not sources:
            ended.append(f"the scores come through {_name(node)} ('{node.name}')")
        pending += [(source, (node, *path)) for source in reversed(sources)]
    if ended:
        raise _NotAttentionError(ended[0])


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return "an input" if node.op == "placeholder" else node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(packet)


def _score_sources(node: fx.Node) -> list[fx.Node]:
    """Arguments of a step that may be the scores, the likeliest first."""
    if is_call(node, *_VIEWS, *_TRANSPOSES, *_COPIES, *_CASTS, aten.dropout, aten.expand, aten.masked_fill):
        chosen = node.args[:1]
    elif is_call(node, aten.mul, aten.add, aten.sub):
        chosen = node.args[:2]
    elif is_call(node, aten.div):
        chosen = node.args[:1] if "rounding_mode" not in node.kwargs else ()
    elif is_call(node, aten.where):
        chosen = node.args[1:3]
    else:
        return []
    keeps_shape = not is_call(node, *_VIEWS, *_TRANSPOSES)
    shape = node_shape(node)
    return [x for x in chosen if isinstance(x, fx.Node) and (not keeps_shape or node_shape(x) == shape)]


def _interpret(
    product: Product,
    path: tuple[fx.Node, ...],
    softmax: fx.Node,
    constants: Mapping[str, Tensor],
    fed: frozenset[fx.Node],
) -> Match:
    atoms = Atoms()
    of_letter = {letter: atoms.new(size) for letter, size in product.sizes.items()}
    sides = [tuple(() if x is None else of_letter[x] for x in term) for term in product.letters]
    axes: Axes = tuple(of_letter[letter] for letter in product.out)
    scale = product.alpha
    steps: list[Step] = []
    if product.addend is not None:
        steps.append(Step("add", product.beta, product.addend, axes))
    previous = product.node
    for node in path:
        moved = _moved(node, axes, atoms)
        if moved is not None:
            axes = moved
        else:
            steps += _read_step(node, previous, axes, constants)
        previous = node

    dim = softmax.args[1]
    assert isinstance(dim, int)
    key = set(atoms.leaves(axes[dim]))
    if not key:
        raise _NotAttentionError("the softmax runs over one element")
    k_side = next((i for i in (0, 1) if key <= set(atoms.flat(sides[i]))), None)
    q_side = None if k_side is None else 1 - k_side
    if q_side is None or k_side is None or key & set(atoms.flat(sides[q_side])):
        raise _NotAttentionError("the softmax runs over an axis that is not the keys alone")
    left, right = (set(atoms.flat(side)) for side in sides)
    outward = set(atoms.flat(axes))
    depth = (left & right) - outward
    # Letters of one operand alone that the product sums away are no axes of attention.
    if (left ^ right) - outward:
        raise _NotAttentionError("the product of the scores sums an axis of one operand alone")
    k_atoms, q_atoms = set(atoms.flat(sides[k_side])), set(atoms.flat(sides[q_side]))
    if not depth and 1 not in product.sizes.values():
        raise _NotAttentionError("the scores contract no depth axis")

    end, probabilities = _follow_down(softmax, axes, atoms)
    second = read_product(end.node)
    assert second is not None
    p_side = 0 if second.operands[0] is end.source else 1
    if second.operands[0] is second.operands[1]:
        raise _NotAttentionError("the probabilities are multiplied with themselves")
    if second.alpha != 1 or second.addend is not None:
        raise _NotAttentionError(f"'{end.node.name}' scales or adds to the attended values")
    p_letters, v_letters = second.letters[p_side], second.letters[1 - p_side]
    named = {letter: axis for letter, axis in zip(p_letters, probabilities, strict=True) if letter is not None}
    contracted = {letter for letter in named if letter in v_letters and letter not in second.out}
    if {a for letter in contracted for a in atoms.leaves(named[letter])} != key or any(
        letter not in second.out and letter not in v_letters and named[letter] for letter in named
    ):
        raise _NotAttentionError(
            f"'{end.node.name}' does not contract the probabilities with values over the keys alone"
        )
    value_depth: list[Atom] = []
    for letter in v_letters:
        if letter is not None and letter not in named:
            named[letter] = atoms.new(second.sizes[letter])
            value_depth += named[letter]
            if letter not in second.out:
                raise _NotAttentionError(f"'{end.node.name}' sums the values over another axis")
    for letter in second.out:
        named.setdefault(letter, ())
    v_axes: Axes = tuple(() if x is None else named[x] for x in v_letters)
    out_axes: Axes = tuple(named[letter] for letter in second.out)

    # Batch axes are what all of them may share: none of the keys, and neither of the values' queries.
    extra = k_atoms - depth - key - q_atoms
    if extra:
        raise _NotAttentionError("the softmax runs over part of the keys' axes")
    v_atoms = set(atoms.flat(v_axes))
    free = q_atoms - depth - k_atoms
    shared = free & v_atoms
    # An axis of the queries that the values have too is a batch axis along which the keys are broadcast.
    outward_axes: Axes = tuple(of_letter[letter] for letter in product.out)
    alone = [axis for axis in outward_axes if axis and set(atoms.leaves(axis)) <= free - shared]
    rows = _query_axes(atoms, alone, atoms.size(key))
    query = [a for axis in rows for a in atoms.leaves(axis)]
    batch = tuple(axis for axis in outward_axes if not set(atoms.leaves(axis)) & (key | set(query)))
    if shared and not query:
        raise _NotAttentionError("the values vary with the queries")
    grouped = {a for axis in batch for a in atoms.leaves(axis)}
    if grouped != (q_atoms | k_atoms) - depth - key - set(query):
        raise _NotAttentionError("an axis mixes batch and queries")

    q, k = Operand(product.operands[q_side], sides[q_side]), Operand(product.operands[k_side], sides[k_side])
    v = Operand(second.operands[1 - p_side], v_axes)
    for role, operand in (("queries", q), ("keys", k), ("values", v)):
        if operand.node not in fed and (role != "queries" or not query):
            raise _NotAttentionError(f"the {role} '{operand.node.name}' do not depend on the model's inputs")
    if len(softmax.meta["val"].shape) < 2:
        raise _NotAttentionError("the softmax runs over a vector")
    _refuse_own_masks(product.node, steps)
    _refuse_factors(atoms, steps, key, set(query))
    roles = _Roles(atoms, grouped, constants)
    dtype = v.node.meta["val"].dtype
    q, q_scale, found = roles.peel(q, dtype, with_scale=True)
    k, k_scale, _ = roles.peel(k, dtype, with_scale=True)
    v, _, _ = roles.peel(v, dtype, with_scale=False)
    return Match(
        atoms,
        q,
        k,
        v,
        scale * q_scale * k_scale,
        tuple(steps),
        found if found is not None else batch,
        tuple(query),
        tuple(a for a in atoms.flat(k.axes) if a in set(atoms.leaves(key))),
        tuple(a for a in atoms.flat(q.axes) if a in set(atoms.leaves(depth))),
        tuple(value_depth),
        end.node,
        out_axes,
    )


def _query_axes(atoms: Atoms, alone: list[tuple[Atom, ...]], keys: int) -> list[tuple[Atom, ...]]:
    """Which of the axes that only queries have count queries; the others are heads that share keys."""
    for start in reversed(range(len(alone))):
        if math.prod(atoms.size(atoms.leaves(axis)) for axis in alone[start:]) == keys:
            return alone[start:]
    return alone[-1:]


def _refuse_factors(atoms: Atoms, steps: list[Step], key: set[Atom], query: set[Atom]) -> None:
    """Factors of the scores go to the queries or to the keys; one that varies with both has no place."""
    is_filled = False
    for step in steps:
        if step.kind in ("hide", "keep"):
            is_filled = True
        if step.kind not in ("multiply", "divide"):
            continue
        assert step.tensor is not None
        shape = node_shape(step.tensor)
        aligned = zip(shape, step.axes[len(step.axes) - len(shape) :], strict=True)
        varies = {a for size, axis in aligned if size > 1 for a in atoms.leaves(axis)}
        if varies & key and varies & query:
            raise _NotAttentionError(f"the factors '{step.tensor.name}' vary with queries and keys")
        if is_filled:
            # The sign of the factor decides what becomes of a hidden score.
            raise _NotAttentionError(f"hidden scores are multiplied with '{step.tensor.name}'")


def _refuse_own_masks(scores: fx.Node, steps: list[Step]) -> None:
    """A mask chosen by the scores themselves, such as top-k, needs all of them."""
    for step in steps:
        if step.tensor is None or (step.kind == "add" and node_shape(step.tensor)[-1:] == (1,)):
            continue
        pending, seen = [step.tensor], {step.tensor}
        while pending:
            node = pending.pop()
            if node is scores:
                raise _NotAttentionError(f"'{step.tensor.name}' depends on the scores themselves")
            if node > scores:
                fresh = [source for source in node.all_input_nodes if source not in seen]
                seen.update(fresh)
                pending += fresh


@dataclass(frozen=True)
class _End:
    node: fx.Node
    source: fx.Node


def _follow_down(softmax: fx.Node, axes: Axes, atoms: Atoms) -> tuple[_End, Axes]:
    """From the softmax to the product with the values, and the axes of the probabilities there."""
    node = softmax
    for _ in range(_MAX_STEPS):
        users = [user for user in node.users if _is_live(user)]
        if len(users) != 1:
            uses = ", ".join(f"'{user.name}'" for user in users) or "nothing"
            raise _NotAttentionError(f"the probabilities '{node.name}' are used by {uses}")
        (user,) = users
        if read_product(user) is not None and node in user.all_input_nodes:
            product = read_product(user)
            assert product is not None
            if node in product.operands:
                return _End(user, node), axes
            raise _NotAttentionError(f"the probabilities are added to a product ('{user.name}')")
        moved = _moved(user, axes, atoms)
        if moved is None or user.args[0] is not node:
            what = "returned" if user.op == "output" else f"changed by {_name(user)} ('{user.name}')"
            raise _NotAttentionError(f"the probabilities are {what}")
        axes, node = moved, user
    raise _NotAttentionError("the probabilities go through too many steps")


def _is_live(node: fx.Node) -> bool:
    """Whether something of the output depends on a node."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "output" or current.is_impure():
            return True
        for user in current.users:
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _moved(node: fx.Node, axes: Axes, atoms: Atoms) -> Axes | None:
    """The axes after a step that moves elements or copies them; None where it computes."""
    if is_call(node, *_COPIES):
        return axes
    if is_call(node, *_CASTS):
        return axes if node.meta["val"].is_floating_point() else None
    if is_call(node, aten.dropout):
        probability, train = node.args[1:3]
        return axes if not train or not probability else None
    if is_call(node, aten.expand):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        same = math.prod(node_shape(source)) == math.prod(node_shape(node))
        return atoms.regroup(axes, node_shape(node)) if same else None
    if is_call(node, *_VIEWS):
        moved = atoms.regroup(axes, node_shape(node))
        if moved is None:
            raise _NotAttentionError(f"'{node.name}' cuts the axes of the scores at no whole factor")
        return moved
    order = _order(node, len(axes))
    return None if order is None else tuple(axes[i] for i in order)


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """Output axis -> input axis of a transposing call."""
    order = list(range(rank))
    if is_call(node, aten.permute):
        dims = node.args[1]
        assert isinstance(dims, list | tuple)
        return [int(d) % rank for d in dims]  # type: ignore[arg-type]
    if is_call(node, aten.transpose):
        a, b = node.args[1:3]
    elif is_call(node, aten.t, aten.mT, aten.adjoint, aten.numpy_T) and rank == 2:
        a, b = 0, 1
    elif is_call(node, aten.mT, aten.adjoint):
        a, b = -1, -2
    else:
        return None
    assert isinstance(a, int) and isinstance(b, int)
    order[a], order[b] = order[b], order[a]
    return order


def _read_step(node: fx.Node, scores: fx.Node, axes: Axes, constants: Mapping[str, Tensor]) -> list[Step]:
    """What a call does to the scores, one of its arguments."""
    if is_call(node, aten.mul, aten.div):
        other = node.args[1] if node.args[0] is scores else node.args[0]
        if other is scores:
            raise _NotAttentionError(f"the scores are squared ('{node.name}')")
        is_division = is_call(node, aten.div)
        number = constant_of(other, constants)
        if number is not None:
            if is_division and number == 0:
                raise _NotAttentionError(f"'{node.name}' divides by zero")
            return [Step("scale", 1 / number if is_division else number)]
        assert isinstance(other, fx.Node)
        return [Step("divide" if is_division else "multiply", tensor=other, axes=axes)]
    if is_call(node, aten.add, aten.sub):
        factor = node.kwargs.get("alpha", 1)
        assert isinstance(factor, int | float)
        sign = -1.0 if is_call(node, aten.sub) else 1.0
        if node.args[0] is scores:
            return _added(node.args[1], sign * factor, axes)
        return [Step("scale", sign * factor), *_added(node.args[0], 1.0, axes)]
    if is_call(node, aten.masked_fill):
        mask, fill = node.args[1:3]
        return _filled("hide", mask, fill, axes, constants, node)
    if is_call(node, aten.where):
        condition, chosen, other = node.args[:3]
        if chosen is scores:
            return _filled("keep", condition, other, axes, constants, node)
        return _filled("hide", condition, chosen, axes, constants, node)
    raise _NotAttentionError(f"the scores go through {_name(node)} ('{node.name}')")


def _added(other: Any, factor: float, axes: Axes) -> list[Step]:
    # One number for all scores drops out of the softmax.
    return [Step("add", factor, other, axes)] if isinstance(other, fx.Node) else []


def _filled(
    kind: Literal["hide", "keep"], mask: Any, fill: Any, axes: Axes, constants: Mapping[str, Tensor], node: fx.Node
) -> list[Step]:
    value = constant_of(fill, constants)
    if value is None:
        raise _NotAttentionError(f"'{node.name}' fills scores with values that are not one constant")
    if not value <= _HIDING_FILL:
        raise _NotAttentionError(f"'{node.name}' fills scores with {value:g}, which does not hide them")
    assert isinstance(mask, fx.Node)
    return [Step(kind, value, mask, axes)]


@dataclass
class _Roles:
    """Which atoms are batch-like, to look through what stands before the operands."""

    atoms: Atoms
    batch: set[Atom]
    constants: Mapping[str, Tensor]

    def peel(
        self, operand: Operand, dtype: torch.dtype, *, with_scale: bool
    ) -> tuple[Operand, float, tuple[tuple[Atom, ...], ...] | None]:
        """The operand before transposes, copies, scales by a number, and views that only merge batch axes.

        Also the product of these scales, and the batch axes as the operand had them before they were merged.
        """
        node, axes, scale = operand.node, operand.axes, 1.0
        merged: tuple[tuple[Atom, ...], ...] | None = None
        while node.op == "call_function":
            source = node.args[0] if node.args else None
            if is_call(node, aten.mul, aten.div) and with_scale:
                read = self._scale(node)
                if read is None:
                    break
                node, factor = read
                scale *= factor
                continue
            if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
                break
            before = self._before(node, source, axes, dtype)
            if before is None:
                break
            if len(before) > len(axes):
                merged = self._batch_axes(before) or merged
            node, axes = source, before
        return Operand(node, axes), scale, merged

    def _scale(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        left, right = node.args[:2]
        is_division = is_call(node, aten.div)
        if is_division and "rounding_mode" in node.kwargs:
            return None
        pairs = [(left, right)] if is_division else [(left, right), (right, left)]
        for source, other in pairs:
            number = constant_of(other, self.constants)
            if number and isinstance(source, fx.Node) and node_shape(source) == node_shape(node):
                return source, 1 / number if is_division else number
        return None

    def _before(self, node: fx.Node, source: fx.Node, axes: Axes, dtype: torch.dtype) -> Axes | None:
        """The axes of a step's source; None where the step has to stay."""
        if is_call(node, *_CASTS):
            return axes if source.meta["val"].dtype == dtype else None
        if is_call(node, *_COPIES):
            return axes
        if is_call(node, aten.dropout):
            probability, train = node.args[1:3]
            return axes if not train or not probability else None
        order = _order(node, len(axes))
        if order is not None:
            before: list[tuple[Atom, ...]] = [()] * len(order)
            for i, origin in enumerate(order):
                before[origin] = axes[i]
            return tuple(before)
        if is_call(node, aten.repeat_interleave):
            return self._repeated(node, axes, node_shape(source))
        same = math.prod(node_shape(source)) == math.prod(node_shape(node))
        if not is_call(node, *_VIEWS, aten.expand) or not same:
            return None
        return self._merged(axes, node_shape(source))

    def _repeated(self, node: fx.Node, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
        """The axes before heads were repeated for groups of queries."""
        repeats = node.args[1]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if not isinstance(repeats, int) or not isinstance(dim, int):
            return None
        dim %= len(axes)
        if not set(self.atoms.leaves(axes[dim])) <= set(self.atoms.leaves(self.batch)):
            return None
        split = self.atoms.regroup((axes[dim],), (shape[dim], repeats))
        if split is None:
            return None
        self.batch = set(self.atoms.leaves(self.batch))
        return (*axes[:dim], split[0], *axes[dim + 1 :])

    def _merged(self, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
        """The axes before a view, where this splits nothing but batch axes and leaves no axis of several roles."""
        trial = Atoms(list(self.atoms.sizes), dict(self.atoms.parts))
        before = trial.regroup(axes, shape)
        if before is None:
            return None
        batch = set(self.atoms.leaves(self.batch))
        split = set(trial.parts) - set(self.atoms.parts)
        split = {atom for atom in split if atom < len(self.atoms.sizes)}
        if not split <= batch:
            return None
        parts = {leaf for atom in batch for leaf in trial.leaves([atom])}
        mixed = any(len(trial.leaves(axis)) > 1 for axis in before)
        # Even where the view stays, it may tell which batch and heads an axis is made of.
        self.atoms.sizes[:], self.atoms.parts = trial.sizes, trial.parts
        self.batch = parts
        return None if mixed else before

    def _batch_axes(self, axes: Axes) -> tuple[tuple[Atom, ...], ...] | None:
        """The batch axes of [..., S, D] in some order, where no other axis could be one of size one."""
        others = [axis for axis in axes if axis and not set(self.atoms.leaves(axis)) <= self.batch]
        if len(others) != 2 or len(axes) < 4:
            return None
        return tuple(axis for axis in axes if axis not in others)
