"""Merge Transposes with the Transposes and views before them, and make one Reshape of what moves no element.

Input graph:
    a = Transpose(x, perm=[0, 2, 1, 3])                    x [1, 1950, 12, 128]
    b = Reshape(a, [12, 5, 1, 15, 26, 128])
    y = Transpose(b, perm=[1, 2, 3, 4, 0, 5])
Output graph:
    y = Reshape(x, [5, 1, 15, 26, 12, 128])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from t3compile.export.graph_values import (
    int64_values,
    name_after,
    permutation_of,
    put_in_place,
    reshape_to,
    static_shape,
)

# TensorRT's limit.
MAX_AXES = 8
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Transpose")


@dataclass(frozen=True)
class MergeTransposes(ir.passes.InPlacePass):
    """A chain of views becomes one Reshape where it moves no element, and has one Transpose where it moves some.

    Views are Reshape, Squeeze, Unsqueeze and Transpose, of static shapes. There are never more Transposes than before.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph and the functions."""
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        modified = [merge_transposes(graph) for graph in graphs]
        return ir.passes.PassResult(model, any(modified))


@dataclass(frozen=True)
class Atom:
    """A factor of the source's elements: ``size`` steps of ``stride`` elements."""

    stride: int
    size: int


def merge_transposes(graph: ir.Graph) -> bool:
    """Merge the views of one graph; whether anything changed."""
    modified = False
    for node in list(graph):
        if _is_view(node):
            modified |= _merge(graph, node)
    if modified:
        _remove_unused(graph)
    return modified


def _is_view(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _VIEWS


def _merge(graph: ir.Graph, node: ir.Node) -> bool:
    for chain in _chains(node):
        source = chain[0].inputs[0]
        shape = static_shape(source)
        axes = None if shape is None else _follow(chain, shape)
        if source is None or shape is None or axes is None:
            continue
        flat = joined_atoms([atom for axis in axes for atom in axis])
        order = sorted(flat, key=lambda atom: -atom.stride)
        out_shape = tuple(math.prod(atom.size for atom in axis) for axis in axes)
        if flat == order:
            gains = len(chain) > 1 or node.op_type == "Transpose" or out_shape == shape
            # A graph's input cannot be its output.
            gains = gains and not (out_shape == shape and node.outputs[0].is_graph_output())
        else:
            gains = node.op_type == "Transpose" and sum(link.op_type == "Transpose" for link in chain) > 1
        if gains and len(flat) <= MAX_AXES:
            _write(graph, node, source, flat, order, out_shape)
            return True
    return False


def _chains(node: ir.Node) -> list[list[ir.Node]]:
    """Chains of views that end in the node, the longest first."""
    chain = [node]
    while (value := chain[0].inputs[0]) is not None and (producer := value.producer()) is not None:
        if not _is_view(producer) or producer.graph is not node.graph:
            break
        chain.insert(0, producer)
    return [chain[start:] for start in range(len(chain))]


def _follow(chain: Sequence[ir.Node], shape: tuple[int, ...]) -> list[list[Atom]] | None:
    """The factors of each axis at the end of the chain, unit ones left out; None where a view cuts no factor evenly."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axes = [[Atom(stride, size)] if size > 1 else [] for stride, size in zip(strides, shape, strict=True)]
    if 0 in shape:
        return None
    for node in chain:
        if node.op_type == "Transpose":
            axes = [axes[axis] for axis in permutation_of(node, len(axes))]
            continue
        target = static_shape(node.outputs[0]) or _view_shape(node, axes)
        regrouped = None if target is None else _regroup([atom for axis in axes for atom in axis], target)
        if regrouped is None:
            return None
        axes = regrouped
    return axes


def _view_shape(node: ir.Node, axes: Sequence[Sequence[Atom]]) -> tuple[int, ...] | None:
    """The shape that a Reshape of known sizes gives, where the value carries none."""
    given = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
    sizes = int64_values(given)
    if sizes is None:
        return None
    total = math.prod(atom.size for axis in axes for atom in axis)
    known = math.prod(size for size in sizes if size > 0)
    if 0 in sizes or total % known:
        return None
    return tuple(total // known if size == -1 else size for size in sizes)


def _regroup(atoms: list[Atom], shape: tuple[int, ...]) -> list[list[Atom]] | None:
    """Deal the factors to axes of these sizes, splitting them where needed."""
    waiting = joined_atoms(atoms)[::-1]
    axes: list[list[Atom]] = []
    for size in shape:
        axis: list[Atom] = []
        while size > 1:
            if not waiting:
                return None
            atom = waiting.pop()
            if atom.size > size and atom.size % size == 0:
                waiting.append(Atom(atom.stride, atom.size // size))
                atom = Atom(atom.stride * (atom.size // size), size)
            if size % atom.size:
                return None
            size //= atom.size
            axis.append(atom)
        axes.append(axis)
    return None if waiting else axes


def joined_atoms(atoms: Sequence[Atom]) -> list[Atom]:
    """Neighbours that lie behind one another in the source become one."""
    joined: list[Atom] = []
    for atom in atoms:
        if joined and joined[-1].stride == atom.stride * atom.size:
            joined[-1] = Atom(atom.stride, joined[-1].size * atom.size)
        else:
            joined.append(atom)
    return joined


def _write(
    graph: ir.Graph,
    node: ir.Node,
    source: ir.Value,
    flat: list[Atom],
    order: list[Atom],
    out_shape: Sequence[int],
) -> None:
    """Reshape, Transpose and Reshape in the node's place, each only where it does something."""
    made: list[ir.Node] = []
    value = source

    def view(to: Sequence[int]) -> None:
        nonlocal value
        if list(to) != list(static_shape(value) or ()):
            made.extend(reshape_to(value, to))
            value = made[-1].outputs[0]

    if flat != order:
        view([atom.size for atom in order])
        perm = [order.index(atom) for atom in flat]
        made.append(ir.node("Transpose", [value], {"perm": perm}))
        value = made[-1].outputs[0]
        value.shape, value.type = ir.Shape([atom.size for atom in flat]), source.type
    view(out_shape)
    name_after(node, made)
    put_in_place(graph, node, made, value)


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        unused = not any(output.uses() or output.is_graph_output() for output in node.outputs)
        if unused and (_is_view(node) or (node.domain == "" and node.op_type == "Constant")):
            graph.remove(node, safe=True)
