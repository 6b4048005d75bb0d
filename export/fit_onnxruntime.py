"""Write a graph as onnxruntime's CPU kernels run it fastest: what its own optimizer leaves to the exporter.

Which passes gain what is in BENCHMARKS.md, from profiles before and after; the graph then needs onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from t3compile.export.attention_forms import AttentionChoice, spell_attention
from t3compile.export.fuse_rotary import FuseRotary
from t3compile.export.gather_transposes import GatherTransposes
from t3compile.export.merge_transposes import MergeTransposes
from t3compile.export.split_branches import SplitBranches

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class DropWholeSlices(ir.passes.InPlacePass):
    """A Slice that takes all of its input is its input: onnxruntime would copy it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        whole = [node for node in model.graph if node.domain == "" and node.op_type == "Slice" and _is_whole(node)]
        for node in whole:
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(whole))


def _is_whole(node: ir.Node) -> bool:
    source, out = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or out.shape is None or out.is_graph_output():
        return False
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    tensor = None if steps is None else ir.convenience.get_const_tensor(steps)
    forward = steps is None or (tensor is not None and bool((tensor.numpy() > 0).all()))
    return source.shape.is_static() and source.shape == out.shape and forward


@dataclass(frozen=True)
class SpellGelu(ir.passes.InPlacePass):
    """Gelu by tanh is com.microsoft.FastGelu: the same numbers from a faster kernel."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        found = [node for node in model.graph if _is_tanh_gelu(node)]
        for node in found:
            node.op_type, node.domain = "FastGelu", _DOMAIN
            node.attributes.clear()
        if found:
            model.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, bool(found))


def _is_tanh_gelu(node: ir.Node) -> bool:
    kind = node.attributes.get("approximate")
    value = node.inputs[0] if node.inputs else None
    is_float = value is not None and value.dtype == ir.DataType.FLOAT
    return node.domain == "" and node.op_type == "Gelu" and kind is not None and kind.as_string() == "tanh" and is_float


@dataclass(frozen=True)
class SpellAttention(ir.passes.InPlacePass):
    """Every attention call in the form that the measured rule names."""

    choice: AttentionChoice = "auto"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        counts = spell_attention(model.graph, self.choice)
        if counts.get("onnxruntime"):
            model.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, bool(counts))


PASSES: tuple[ir.passes.PassBase, ...] = (
    common.InlinePass(),  # first: copies merge across the borders of functions
    DropWholeSlices(),  # before the branches: a single one is sliced off as a whole
    SplitBranches(),  # before attention is spelled
    SpellAttention(),
    FuseRotary(),  # before the views: it is found by them
    MergeTransposes(),
    GatherTransposes(),  # of what is left of them
    SpellGelu(),
    common.RemoveUnusedNodesPass(),  # last: the tables' and shapes' constants that nothing reads any more
)


def fit_onnxruntime(model: ir.Model) -> ir.Model:
    """The model for onnxruntime on a CPU, without functions; the given one is changed."""
    return ir.passes.Sequential(*PASSES)(model).model
