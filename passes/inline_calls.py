"""Put a traced body in the place of every window attention call; equal calls share one trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

from t3compile.ops import WindowAttentionArgs, WindowAttentionCall
from t3compile.passes.graph_pass import inline_graph
from t3compile.program import trace


def inline_calls(calls: Iterable[fx.Node], body_of: Callable[[WindowAttentionArgs], nn.Module]) -> None:
    """``body_of`` makes the module that is traced once per configuration and form of q, k, v and the mask."""
    bodies: dict[object, fx.Graph] = {}
    for node in calls:
        call = WindowAttentionCall.read(node.args, node.kwargs)
        values = tuple(x.meta["val"] for x in call.tensors)
        key = (call.args, *((tuple(x.shape), x.stride(), x.dtype) for x in values))
        if key not in bodies:
            bodies[key] = trace(body_of(call.args), values).graph
        inline_graph(node, call.tensors, bodies[key])
