"""Multiply-accumulates (MACs) of graphs, read from the shapes in their metadata."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from t3compile.cost import joint_pairs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionCall

aten = torch.ops.aten


def graph_macs(graph: fx.Graph) -> int:
    """MACs of a whole graph, attention and window attention included."""
    return sum(map(call_macs, graph.nodes))


def call_macs(node: fx.Node) -> int:
    """MACs of any call, attention and window attention included."""
    return node_macs(node) + _attention_macs(node)


def node_macs(node: fx.Node) -> int:
    """MACs of a matrix product, einsum or convolution; 0 for everything else, attention included."""
    match getattr(node.target, "overloadpacket", None):
        case aten.linear | aten.mm | aten.bmm | aten.matmul:
            return math.prod(_shape(node)) * _shape(node.args[0])[-1]
        case aten.addmm | aten.baddbmm:
            return math.prod(_shape(node)) * _shape(node.args[1])[-1]
        case aten.conv1d | aten.conv2d | aten.conv3d | aten.convolution:
            return math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])
        case aten.einsum:
            return _einsum_macs(node)
        case _:
            return 0


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _einsum_macs(node: fx.Node) -> int:
    """Product of the sizes of all indices, as if the operands were multiplied at once; 0 for a single operand."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    if len(operands) < 2:
        return 0
    sizes: dict[object, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        before, dots, after = term.partition("...")
        shape = _shape(operand)
        rest = len(shape) - len(before) - len(after) if dots else 0
        # Ellipses are aligned at their right ends.
        names = [*before, *range(-rest, 0), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return math.prod(sizes.values())


def _attention_macs(node: fx.Node) -> int:
    if getattr(node.target, "overloadpacket", None) is aten.scaled_dot_product_attention:
        q, k, v = (_shape(x) for x in node.args[:3])
        return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if node.target is WINDOW_ATTENTION:
        q, _, v = (_shape(x) for x in node.args[:3])
        args = WindowAttentionCall.read(node.args, node.kwargs).args
        pairs = joint_pairs(args.grid, args.extra_tokens, args.pattern, extra_queries=args.extra_queries)
        return math.prod(q[:-2]) * pairs * (q[-1] + v[-1])
    return 0
