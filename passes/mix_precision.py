"""Matrix products in half precision, everything else in float32: what autocast does, written into the graph.

Norms, softmax inputs, RoPE tables and the time embedding keep float32; weights that only matrix products read are
stored in half. Inputs and outputs keep their dtypes.

Input graph:
    y = aten.linear(x, w, b)                                   x, w, b float32
Output graph:
    y = _to_copy(aten.linear(_to_copy(x, half), w, b), float32)    w, b half
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from t3compile.errors import ExportError
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionCall
from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.graph_pass import Cursor, GraphPass, compute_value, is_call
from t3compile.program import Program, copy_exported
from t3compile.weights import CastWeights

aten = torch.ops.aten
_VIEWS = (aten.view, aten.reshape, aten.permute, aten.transpose, aten.unsqueeze, aten.slice)


def _is_product(node: fx.Node) -> bool:
    return is_call(
        node,
        aten.linear,
        aten.matmul,
        aten.mm,
        aten.bmm,
        aten.addmm,
        aten.baddbmm,
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.convolution,
        aten.scaled_dot_product_attention,
        WINDOW_ATTENTION.overloadpacket,
    )


def _mask_of(node: fx.Node) -> fx.Node | None:
    if node.target is ATTENTION:
        return AttentionCall.read(node).mask
    if node.target is WINDOW_ATTENTION:
        mask: fx.Node | None = WindowAttentionCall.read(node.args, node.kwargs).mask
        return mask
    return None


def _is_float32(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32


@dataclass(frozen=True)
class MixPrecision(GraphPass):
    """Run float32 matrix products and attention in ``dtype`` ("float16" or "bfloat16")."""

    dtype: str = "float16"

    @property
    def _half(self) -> torch.dtype:
        half: torch.dtype = getattr(torch, self.dtype)
        return half

    def requires(self, program: Program) -> None:
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                other = str(value.dtype).removeprefix("torch.")
                if other != self.dtype:
                    raise ExportError(
                        f"the program was traced in {other} and cannot be exported in {self.dtype}: load the model "
                        f"with --dtype float32 or --dtype {self.dtype} and rewrite it again"
                    )

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        products = [node for node in graph_module.graph.nodes if _is_product(node) and _is_float32(node)]
        if not products:
            return False
        narrow = self._narrow_weights(graph_module.graph, program)
        casts: dict[fx.Node, fx.Node] = {}
        for node in products:
            self._narrow_product(node, narrow, casts)
        return True

    def _narrow_weights(self, graph: fx.Graph, program: Program) -> set[fx.Node]:
        """Parameters that only matrix products read, now half."""
        kinds = {s.arg.name: s.kind for s in program.exported.graph_signature.input_specs}
        narrow = set()
        for node in graph.nodes:
            if node.op != "placeholder" or kinds.get(node.name) != InputKind.PARAMETER:
                continue
            if node.users and _is_float32(node) and all(_is_product(user) for user in node.users):
                node.meta["val"] = node.meta["val"].to(self._half)
                narrow.add(node)
        return narrow

    def _narrow_product(self, node: fx.Node, narrow: set[fx.Node], casts: dict[fx.Node, fx.Node]) -> None:
        cursor = Cursor(node)

        def cast(used: fx.Node) -> fx.Node:
            if used in narrow or not _is_float32(used):
                return used
            if used not in casts:
                casts[used] = self._cast(cursor, used)
            return casts[used]

        self._clamp_mask(node, cursor)
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), cast)
        users = list(node.users)
        node.meta["val"] = compute_value(node)
        after = Cursor(node.next)
        wide = after.call(aten._to_copy.default, node, dtype=torch.float32)
        for user in users:
            user.replace_input_with(node, wide)

    def _clamp_mask(self, node: fx.Node, cursor: Cursor) -> None:
        """Additive masks of float32's most negative number would become infinite, and a fully masked row NaN."""
        mask = _mask_of(node)
        if mask is not None and _is_float32(mask):
            lowest = torch.finfo(self._half).min
            node.replace_input_with(mask, cursor.call(aten.clamp.default, mask, lowest))

    def _cast(self, cursor: Cursor, used: fx.Node) -> fx.Node:
        """`used` in half: where it is a view of a widened half tensor, the view of that tensor."""
        chain: list[fx.Node] = []
        source = used
        while is_call(source, *_VIEWS):
            chain.append(source)
            source = source.args[0]  # type: ignore[assignment]
        if is_call(source, aten._to_copy) and source.args[0].meta["val"].dtype == self._half:  # type: ignore[union-attr]
            value = source.args[0]
            for view in reversed(chain):
                target = aten.reshape.default if is_call(view, aten.view) else view.target
                value = cursor.call(target, value, *view.args[1:], **view.kwargs)  # type: ignore[arg-type]
            return value  # type: ignore[return-value]
        return cursor.call(aten._to_copy.default, used, dtype=self._half)

    def attach(self, graph_module: fx.GraphModule, program: Program) -> Program:
        signature = program.exported.graph_signature
        values = {n.name: n.meta["val"] for n in graph_module.graph.nodes if n.op == "placeholder"}
        dtypes = {
            target: values[name].dtype
            for name, target in signature.inputs_to_parameters.items()
            if values[name].dtype == self._half
        }
        state = {
            name: _like(tensor, dtypes[name]) if name in dtypes else tensor
            for name, tensor in program.exported.state_dict.items()
        }
        exported = copy_exported(program.exported, graph_module=graph_module, state_dict=state)
        return replace(program, exported=exported, weights=CastWeights(program.weights, dtypes), retrace=None)


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of another dtype that holds no data: values come from the program's weights."""
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
