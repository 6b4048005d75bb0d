"""Put a traced body in the place of every window attention call; equal calls share one trace."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, WindowAttentionCall
from t3compile.passes.graph_pass import inline_graph
from t3compile.program import trace


def inline_calls(graph: fx.Graph, body_of: Callable[[WindowAttentionArgs], nn.Module]) -> bool:
    """``body_of`` makes the module that is traced once per configuration and form of q, k, v and the mask.

    Whether there was a call.
    """
    bodies: dict[object, fx.Graph] = {}
    for node in [node for node in graph.nodes if node.target is WINDOW_ATTENTION]:
        call = WindowAttentionCall.read(node.args, node.kwargs)
        values = tuple(x.meta["val"] for x in call.tensors)
        key = (call.args, *((tuple(x.shape), x.stride(), x.dtype) for x in values))
        if key not in bodies:
            bodies[key] = trace(body_of(call.args), values).graph
        inline_graph(node, call.tensors, bodies[key])
    return bool(bodies)
