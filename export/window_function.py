"""One ONNX model-local function per window pattern: t3::WindowAttention_<hash>.

Contract (shared by every runtime): all constants baked in, no attributes, a body of standard operators of at most
eight axes; onnxruntime inlines the body, TensorRT takes a plugin of that name when one is registered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from t3compile.export.torch_onnx import OPSET, export_graph
from t3compile.ops import WindowAttention, WindowAttentionArgs
from t3compile.ops.window_attention import ONNX_NAME
from t3compile.program import trace

DOMAIN, OP_TYPE = ONNX_NAME.split("::")

# How attention is spelled inside a function body.
AttentionForm = Literal["attention", "matmul", "onnxruntime"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)


_TORCH_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}


@dataclass(frozen=True)
class FunctionKey:
    """Everything that is baked into a function."""

    args: WindowAttentionArgs
    batch: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: str
    form: AttentionForm

    @property
    def name(self) -> str:
        """WindowAttention_<first ten hex digits of the hash of the configuration>."""
        fields = (
            *self.args.as_op_args(),
            self.batch,
            self.heads,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.form,
        )
        return f"{OP_TYPE}_{hashlib.sha256(repr(fields).encode()).hexdigest()[:10]}"


def read_key(node: ir.Node, form: AttentionForm) -> FunctionKey:
    """The configuration that a legalized node carries in its attributes and the types of its inputs."""
    q, _, v = node.inputs[:3]
    assert q is not None and v is not None and q.shape is not None and v.shape is not None
    batch, heads, _, head_dim = (int(str(size)) for size in q.shape)
    assert q.dtype is not None
    given = node.attributes
    args = WindowAttentionArgs.from_op_args(
        list(given["grid"].as_ints()),
        list(given["splits"].as_ints()),
        given["branches"].as_string(),
        given["prefix"].as_int(),
        given["suffix"].as_int(),
        given["scale"].as_float() if "scale" in given else None,
    )
    return FunctionKey(args, batch, heads, head_dim, int(str(v.shape[-1])), _TORCH_NAMES[q.dtype], form)


def build_function(key: FunctionKey) -> ir.Function:
    """The function's body, exported from the torch implementation of the op."""
    tokens = key.args.extra_tokens + key.args.grid.tokens
    dtype = getattr(torch, key.dtype)
    depths = (key.head_dim, key.head_dim, key.value_dim)
    with FakeTensorMode():
        inputs = tuple(torch.empty(key.batch, key.heads, tokens, depth, dtype=dtype) for depth in depths)
    model = export_graph(trace(WindowAttention(key.args), inputs).exported)
    graph = model.graph
    _REWRITE_FORM[key.form](graph)
    _constants_into_nodes(graph)
    function = ir.Function(DOMAIN, key.name, graph=graph, attributes=[])
    for node in function:
        function.opset_imports.setdefault(node.domain, OPSET if node.domain == "" else 1)
    return function


def _constants_into_nodes(graph: ir.Graph) -> None:
    """Functions have no initializers: each becomes a Constant node in front of the body."""
    constants = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=None)
        constant = node.outputs[0]
        constant.name, constant.shape, constant.type = f"{name}_constant", value.shape, value.type
        constant.const_value = tensor
        ir.convenience.replace_all_uses_with(value, constant)
        del graph.initializers[name]
        constants.append(node)
    first = next(iter(graph))
    graph.insert_before(first, constants)


def _attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Attention" and node.domain == ""]


def _keep(graph: ir.Graph) -> None:
    """Opset-23 Attention: every runtime's own fused kernel."""


def _to_matmul(graph: ir.Graph) -> None:
    """MatMul-Softmax-MatMul with the query scaled first: for TensorRT before 10.14."""
    for node in _attention_nodes(graph):
        q, k, v = node.inputs[:3]
        assert q is not None and k is not None and v is not None and q.shape is not None
        depth = q.shape[-1]
        assert isinstance(depth, int) and q.dtype is not None
        scale_attr = node.attributes.get("scale")
        scale = depth**-0.5 if scale_attr is None else scale_attr.as_float()
        factor = ir.Value(
            name=f"{node.outputs[0].name}_scale",
            const_value=ir.tensor(scale, dtype=q.dtype),
            shape=ir.Shape([]),
            type=ir.TensorType(q.dtype),
        )
        graph.register_initializer(factor)
        scaled = ir.node("Mul", [q, factor])
        keys = ir.node("Transpose", [k], {"perm": [0, 1, 3, 2]})
        scores = ir.node("MatMul", [scaled.outputs[0], keys.outputs[0]])
        weights = ir.node("Softmax", [scores.outputs[0]], {"axis": -1})
        out = ir.node("MatMul", [weights.outputs[0], v])
        _replace(graph, node, [scaled, keys, scores, weights, out])


def _to_onnxruntime(graph: ir.Graph) -> None:
    """com.microsoft.MultiHeadAttention: never holds the scores, on the CPU; the file then needs onnxruntime."""
    for node in _attention_nodes(graph):
        values = list(node.inputs[:3])
        flat: list[ir.Node] = []
        for value in values:
            assert value is not None and value.shape is not None
            _, _, tokens, depth = value.shape
            assert isinstance(tokens, int) and isinstance(depth, int)
            shape = ir.Value(
                name=f"{node.outputs[0].name}_{value.name}_flat",
                const_value=ir.tensor([-1, tokens, depth]),
                shape=ir.Shape([3]),
                type=ir.TensorType(ir.DataType.INT64),
            )
            graph.register_initializer(shape)
            flat.append(ir.node("Reshape", [value, shape]))
        attributes: dict[str, int | float] = {"num_heads": 1}
        scale = node.attributes.get("scale")
        if scale is not None:
            attributes["scale"] = scale.as_float()
        fused = ir.node(
            "MultiHeadAttention",
            [reshape.outputs[0] for reshape in flat],
            attributes,
            domain="com.microsoft",
        )
        out_shape = node.outputs[0].shape
        assert out_shape is not None
        back = ir.Value(
            name=f"{node.outputs[0].name}_shape",
            const_value=ir.tensor([int(str(size)) for size in out_shape]),
            shape=ir.Shape([4]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.register_initializer(back)
        out = ir.node("Reshape", [fused.outputs[0], back])
        _replace(graph, node, [*flat, fused, out])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put the nodes in the place of `old`; the last one's output replaces its output."""
    source, target = old.outputs[0], new[-1].outputs[0]
    target.shape, target.type = source.shape, source.type
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(source, target)
    graph.remove(old, safe=True)


_REWRITE_FORM: dict[AttentionForm, Callable[[ir.Graph], None]] = {
    "attention": _keep,
    "matmul": _to_matmul,
    "onnxruntime": _to_onnxruntime,
}
