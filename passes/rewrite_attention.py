"""Carry out a plan: planned sites become t3::window_attention.

Input graph:
    out = aten.scaled_dot_product_attention(q, k, v, scale=s)
Output graph:
    out = t3.window_attention(q, k, v, [T, H, W], [n_t, n_h, n_w], "local+dilated", prefix, suffix, s)
or, where the queries have other extra tokens or there is a mask m (full size by expand of m):
    out = t3.window_attention(..., s, query_prefix, query_suffix, mask=m)
Grid and splits stand in the order in which the sequence runs over the axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from t3compile.errors import PlanError, RewriteError
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.plan import Plan, SitePlan
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RewriteAttention(GraphPass):
    """Replace every planned site; weights, inputs and outputs stay as they are."""

    plan: Plan

    def requires(self, program: Program) -> None:
        if program.plan == self.plan:
            return
        if program.plan is not None:
            raise PlanError("the program is rewritten already, with another plan: start from the original model")
        fingerprint = program.fingerprint()
        if fingerprint != self.plan.fingerprint:
            raise PlanError(
                f"the plan was made for another graph (fingerprint {self.plan.fingerprint[:12]}, this graph has "
                f"{fingerprint[:12]}): make a new one with 't3compile plan'"
            )

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        if program.plan is not None:
            return False
        nodes = {node.name: node for node in graph_module.graph.nodes}
        for planned in self.plan.rewritten:
            node = nodes.get(planned.node)
            if node is None or node.target is not ATTENTION:
                raise PlanError(f"the plan names '{planned.node}', which is no attention call of the graph")
            _rewrite_site(AttentionCall.read(node), planned)
        return bool(self.plan.rewritten)

    def attach(self, graph_module: fx.GraphModule, program: Program) -> Program:
        return replace(program.with_graph(graph_module), plan=self.plan, retrace=None)

    def ensures(self, result: Program) -> None:
        if result.plan is None and self.plan.rewritten:
            raise RewriteError("internal: the rewritten program carries no plan")
        written = sum(node.target is WINDOW_ATTENTION for node in result.graph.nodes)
        if written != len(self.plan.rewritten):
            raise RewriteError(
                f"internal: {written} window attention calls for {len(self.plan.rewritten)} planned sites"
            )


def _rewrite_site(call: AttentionCall, planned: SitePlan) -> None:
    keys, queries = call.shape(call.k)[-2], call.shape(call.q)[-2]
    if planned.tokens != keys:
        raise PlanError(
            f"site '{planned.node}': grid {planned.grid}, prefix {planned.prefix} and suffix {planned.suffix} "
            f"make {planned.tokens} tokens, but the sequence has {keys}"
        )
    if planned.query_tokens != queries:
        raise PlanError(
            f"site '{planned.node}': grid {planned.grid}, query_prefix {planned.query_prefix} and query_suffix "
            f"{planned.query_suffix} make {planned.query_tokens} queries, but the sequence has {queries}"
        )
    if call.is_causal or call.dropout:
        raise PlanError(f"site '{planned.node}' is causal or uses dropout: it cannot be windowed")
    assert planned.pattern is not None
    args = WindowAttentionArgs(
        planned.grid.in_order(planned.order),
        planned.pattern.in_order(planned.order),
        planned.prefix,
        planned.suffix,
        call.scale,
        planned.query_prefix,
        planned.query_suffix,
    )
    masked = {} if call.mask is None else {"mask": _unexpanded(call.mask)}
    new = Cursor(call.node).call(WINDOW_ATTENTION, call.q, call.k, call.v, *args.as_op_args(), **masked)
    replace_node(call.node, new)


def _unexpanded(mask: fx.Node) -> fx.Node:
    """The mask before it was expanded, to S x S for one: the op broadcasts by itself."""
    while is_call(mask, aten.expand):
        source = mask.args[0]
        assert isinstance(source, fx.Node)
        mask = source
    return mask
