"""One attention per branch instead of one over the branches stacked: stacking and unstacking are copies.

One call serves GPUs better; on a CPU each call fills all cores.

Input graph:
    y = Attention(Reshape(Concat(q1, q2)), Reshape(Concat(k1, k2)), Reshape(Concat(v1, v2)), mask?)    axis 0
    y1, y2 = Slice(y, 0, 1), Slice(y, 1, 2)                                                            axis 0
Output graph:
    y1 = Attention(Reshape(q1), Reshape(k1), Reshape(v1), mask?)
    y2 = Attention(Reshape(q2), Reshape(k2), Reshape(v2), mask?)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from t3compile.export.attention_forms import is_attention, is_plain
from t3compile.export.graph_values import int64_values, reshape_to, sizes_of


@dataclass(frozen=True)
class SplitBranches(ir.passes.InPlacePass):
    """Split an attention whose first axis stacks as many equal parts as it has elements, where all uses take one."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph and the functions."""
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        modified = [split_branches(graph) for graph in graphs]
        return ir.passes.PassResult(model, any(modified))


def split_branches(graph: ir.Graph) -> bool:
    """Split the attention calls of one graph; whether there was one. Spell the calls afterwards."""
    modified = False
    for node in [node for node in graph if is_attention(node) and is_plain(node)]:
        parts = [_stacked(value) for value in node.inputs[:3]]
        slices = _slices(node.outputs[0])
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if any(part is None for part in parts) or slices is None or (mask is not None and sizes_of(mask)[0] != 1):
            continue
        _split(graph, node, [part for part in parts if part is not None], slices, mask)
        modified = True
    return modified


def _stacked(value: ir.Value | None) -> Sequence[ir.Value] | None:
    """The equal parts along axis 0 that a value [parts, ...] stacks, through one Reshape."""
    assert value is not None
    count = sizes_of(value)[0]
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.op_type == "Reshape":
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
    if producer is None or producer.domain != "" or producer.op_type != "Concat" or count < 2:
        return None
    parts = [part for part in producer.inputs if part is not None and part.shape is not None]
    if producer.attributes["axis"].as_int() != 0 or len(parts) != len(producer.inputs) or len(parts) != count:
        return None
    first = parts[0].shape
    return parts if first is not None and first.is_static() and all(part.shape == first for part in parts) else None


def _slices(value: ir.Value) -> dict[ir.Node, int] | None:
    """Which element of axis 0 each use takes; None where one takes something else."""
    taken: dict[ir.Node, int] = {}
    for use in value.uses():
        constants = [int64_values(x) for x in use.node.inputs[1:]]
        if use.node.domain != "" or use.node.op_type != "Slice" or len(constants) < 3 or None in constants:
            return None
        start, end, axis, *step = (x for x in constants if x is not None)
        if axis != [0] or step not in ([], [[1]]) or end[0] != start[0] + 1 or start[0] < 0:
            return None
        taken[use.node] = start[0]
    return None if value.is_graph_output() else taken


def _split(
    graph: ir.Graph,
    node: ir.Node,
    parts: Sequence[Sequence[ir.Value]],
    slices: dict[ir.Node, int],
    mask: ir.Value | None,
) -> None:
    calls: dict[int, ir.Value] = {}
    for index in sorted(set(slices.values())):
        made: list[ir.Node] = []
        values: list[ir.Value | None] = []
        for name, given, stacked in zip("qkv", node.inputs[:3], parts, strict=True):
            shape, view = reshape_to(stacked[index], (1, *sizes_of(given)[1:]))
            made += [shape, view]
            values.append(view.outputs[0])
            for new, what in ((shape, "shape"), (view, "part")):
                new.name = f"{node.name}/{index}/{name}_{what}"
                new.outputs[0].name = f"{node.outputs[0].name}/{index}/{name}_{what}"
        call = ir.Node("", "Attention", [*values, *([] if mask is None else [mask])], node.attributes.values())
        out = call.outputs[0]
        call.name, out.name = f"{node.name}/{index}", f"{node.outputs[0].name}/{index}"
        out.shape, out.type = ir.Shape((1, *sizes_of(node.outputs[0])[1:])), node.outputs[0].type
        graph.insert_before(node, [*made, call])
        calls[index] = out
    for taken, index in slices.items():
        ir.convenience.replace_all_uses_with(taken.outputs[0], calls[index], replace_graph_outputs=True)
        graph.remove(taken, safe=True)
    graph.remove(node, safe=True)
