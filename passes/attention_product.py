"""Read a matrix product, however it is spelled, as one contraction with a letter for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t3compile.passes.aten_calls import node_shape
from t3compile.passes.graph_pass import is_call

aten = torch.ops.aten

Letters = tuple[int | None, ...]


@dataclass(frozen=True)
class Product:
    """node = alpha * contraction(left, right) + beta * addend.

    ``letters`` of the two operands and ``out`` name the axes; None is an axis of size one that is broadcast. Letters of
    both operands that are missing in ``out`` are contracted.
    """

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    letters: tuple[Letters, Letters]
    out: tuple[int, ...]
    sizes: dict[int, int]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 0.0


def read_product(node: fx.Node) -> Product | None:
    """The contraction that a node computes; None where it is no product of two tensors."""
    if is_call(node, aten.matmul, aten.bmm, aten.mm):
        return _matrices(node, *node.args[:2])
    if is_call(node, aten.baddbmm, aten.addmm):
        addend, left, right = node.args[:3]
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
            return None
        used = addend if beta and isinstance(addend, fx.Node) else None
        return _matrices(node, left, right, alpha=float(alpha), addend=used, beta=float(beta))
    if is_call(node, aten.einsum):
        return _einsum(node)
    return None


def _matrices(node: fx.Node, left: Any, right: Any, **rest: Any) -> Product | None:
    """left [..., i, d] @ right [..., d, j]"""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    ranks = len(node_shape(left)), len(node_shape(right))
    if min(ranks) < 2:
        return None
    batch = max(ranks) - 2
    row, column, depth = batch, batch + 1, batch + 2
    letters = (
        (*range(batch - ranks[0] + 2, batch), row, depth),
        (*range(batch - ranks[1] + 2, batch), depth, column),
    )
    return _sized(node, (left, right), letters, tuple(range(batch + 2)), **rest)


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    if len(operands) != 2 or not all(isinstance(x, fx.Node) for x in operands):
        return None
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if not arrow:
        named = given.replace(",", "").replace("...", "")
        out = ("..." if "..." in given else "") + "".join(sorted(x for x in set(named) if named.count(x) == 1))
    # An ellipsis stands for the leading axes that no letter names, aligned at their end.
    hidden = [
        len(node_shape(x)) - len(term.replace("...", "")) if "..." in term else 0
        for term, x in zip(terms, operands, strict=True)
    ]
    most = max(hidden)
    numbers = {name: most + i for i, name in enumerate(sorted(set(given) - set(",.")))}

    def read(term: str, count: int) -> tuple[int, ...]:
        before, dots, after = term.partition("...")
        middle = range(most - count, most) if dots else ()
        return (*(numbers[x] for x in before), *middle, *(numbers[x] for x in after))

    letters = tuple(read(term, count) for term, count in zip(terms, hidden, strict=True))
    outward = read(out, most)
    if any(len(set(term)) != len(term) for term in (*letters, outward)):
        return None
    return _sized(node, tuple(operands), letters, outward)


def _sized(
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    letters: Sequence[tuple[int, ...]],
    out: tuple[int, ...],
    **rest: Any,
) -> Product:
    sizes: dict[int, int] = {}
    for operand, term in zip(operands, letters, strict=True):
        for letter, size in zip(term, node_shape(operand), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    left, right = (
        tuple(letter if size == sizes[letter] else None for letter, size in zip(term, node_shape(operand), strict=True))
        for operand, term in zip(operands, letters, strict=True)
    )
    return Product(node, operands, (left, right), out, sizes, **rest)
