"""Compute once what depends on no input and no weight: position tables, index lists, masks.

Exporters write these out operation by operation, float64, complex and scattered writes included, which runtimes may
have no kernels for.

Input graph:
    positions = aten.arange(16, dtype=float64)
    angles = aten.cos(aten.outer(positions, frequencies))             frequencies: a constant
    out = aten.mul(x, angles)
Output graph:
    out = aten.mul(x, folded)                                         folded: a constant [16, 8]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from t3compile.passes.graph_pass import GraphPass, insert_constant, is_call
from t3compile.program import Program

aten = torch.ops.aten

# Smaller in a file as calls than as values, and every exporter knows them.
_FILLS = (aten.arange, aten.full, aten.ones, aten.zeros, aten.empty, aten.scalar_tensor)
_FILLS_LIKE = (aten.full_like, aten.ones_like, aten.zeros_like, aten.empty_like)
_FILLS_NEW = (aten.new_full, aten.new_ones, aten.new_zeros, aten.new_empty)
_REPEATS = (aten.expand, aten.repeat)


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Replace constant subgraphs by their values, as far as no value takes more than ``limit_bytes``.

    Values may be larger where constants they are made from are as large. Calls that only fill or repeat stay.
    """

    limit_bytes: int = 16 * 2**20

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        graph = graph_module.graph
        values = known_values(graph, program)
        sizes = {node: _bytes(value) for node, value in values.items()}
        constant: set[fx.Node] = set()
        for node in graph.nodes:
            if is_pure(node) and all(used in constant or used in values for used in node.all_input_nodes):
                largest = max((sizes[used] for used in node.all_input_nodes), default=0)
                sizes[node] = _bytes(node.meta.get("val"))
                if sizes[node] <= max(self.limit_bytes, largest):
                    constant.add(node)
        folded = _ends(graph, constant)
        # All values first: a constant may be made from another, whose call insertion replaces.
        computed = [compute_constant(node, values) for node in folded]
        for node, value in zip(folded, computed, strict=True):
            insert_constant(node, value)
        return bool(folded)


def known_values(graph: fx.Graph, program: Program) -> dict[fx.Node, Any]:
    """The constants of the program: lifted tensors and buffers that are no weights."""
    specs = {spec.arg.name: spec for spec in program.exported.graph_signature.input_specs}
    known = {}
    for node in graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or not (
            spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and spec.persistent is False)
        ):
            continue
        value = program.exported.constants.get(str(spec.target))
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu":
            known[node] = value
    return known


def is_pure(node: fx.Node) -> bool:
    """A call whose result is the same each time, on the CPU."""
    if node.op != "call_function" or node.is_impure():
        return False
    if node.target is not operator.getitem and not _is_repeatable(node.target):
        return False
    tensors = _tensors(node.meta.get("val"))
    return bool(tensors) and all(value.device.type == "cpu" and _is_static(value) for value in tensors)


def _is_repeatable(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _is_static(value: Tensor) -> bool:
    """Whether no size depends on data."""
    return all(isinstance(size, int) for size in value.shape)


def _ends(graph: fx.Graph, constant: set[fx.Node]) -> list[fx.Node]:
    """The constant calls whose values others need, in graph order."""
    ends = []
    kept: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in constant or all(user in constant and user not in kept for user in node.users):
            continue
        # What is kept needs its own operands.
        if not isinstance(node.meta["val"], Tensor) or _is_cheap(node):
            kept.add(node)
        else:
            ends.append(node)
    ends.reverse()
    return ends


def _is_cheap(node: fx.Node) -> bool:
    if node.meta["val"].is_complex():
        return False
    return is_call(node, *_FILLS, *_FILLS_LIKE, *_FILLS_NEW) or (
        is_call(node, *_REPEATS) and _bytes(node.meta["val"]) > _bytes(node.args[0].meta["val"])  # type: ignore[union-attr]
    )


def compute_constant(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """The value of a constant call; those of the calls before it are kept in `values`."""
    pending = [node]
    with torch.no_grad():
        while pending:
            last = pending[-1]
            missing = [used for used in last.all_input_nodes if used not in values]
            if missing:
                pending += missing
                continue
            pending.pop()
            if last not in values:
                args, kwargs = fx.map_arg((last.args, last.kwargs), lambda used: values[used])
                assert callable(last.target)
                values[last] = last.target(*args, **kwargs)
    value: Tensor = values[node]
    return value


def _bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [x for x in items if isinstance(x, Tensor)]
