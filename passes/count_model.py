"""Count a graph outside its attention calls: MACs, parameters, bytes. Edits nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from t3compile.macs import node_macs
from t3compile.sites import ModelCounts

aten = torch.ops.aten

# Views share their source's memory; they cost nothing.
_VIEWS = {
    aten.view,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.slice,
    aten.select,
    aten.expand,
    aten.unsqueeze,
    aten.squeeze,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unbind,
    aten.unflatten,
    aten.alias,
    aten.detach,
}


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _tensors(item)]
    return []


def _bytes(value: object) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(value))


def _peak_activation_bytes(graph: fx.Graph, weights: Mapping[str, object]) -> int:
    """Largest sum of live intermediate tensors when nodes run in order and each is freed after its last use."""
    owner: dict[fx.Node, fx.Node] = {}
    last_use: dict[fx.Node, int] = {}
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        packet = getattr(node.target, "overloadpacket", None)
        shares = packet in _VIEWS or getattr(node.target, "__name__", "") == "getitem"
        source = node.args[0] if shares and node.args else None
        owner[node] = owner[source] if isinstance(source, fx.Node) else node
        for used in (node, *node.all_input_nodes):
            last_use[owner[used]] = i
    ends: dict[int, list[fx.Node]] = {}
    for node, i in last_use.items():
        ends.setdefault(i, []).append(node)
    live = peak = 0
    for i, node in enumerate(nodes):
        if owner[node] is node and node.name not in weights and node.op != "output":
            live += _bytes(node.meta.get("val"))
        peak = max(peak, live)
        for freed in ends.get(i, []):
            if freed.name not in weights and freed.op != "output":
                live -= _bytes(freed.meta.get("val"))
    return peak


def count_model(exported: ExportedProgram) -> ModelCounts:
    """Counts of a graph: parameters and weight bytes from its state_dict, the rest from node metadata."""
    signature = exported.graph_signature
    lifted: Iterable[Mapping[str, str]] = (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
    )
    weights: dict[str, object] = {name: None for mapping in lifted for name in mapping}
    parameters = [exported.state_dict[name] for name in signature.parameters]
    return ModelCounts(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(_bytes(tensor) for tensor in exported.state_dict.values()),
        other_macs=sum(node_macs(node) for node in exported.graph.nodes),
        peak_activation_bytes=_peak_activation_bytes(exported.graph, weights),
        nodes=len(exported.graph.nodes),
    )
