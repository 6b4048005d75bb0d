"""One ONNX model-local function per window pattern: t3::WindowAttention_<hash>.

Contract (shared by every runtime): all constants baked in, no attributes, a body of standard operators of at most
eight axes; onnxruntime inlines the body, TensorRT takes a plugin of that name when one is registered. The function's
metadata hold the configuration as JSON, for whoever makes such a plugin from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from t3compile.errors import EngineError
from t3compile.export.torch_onnx import OPSET, export_graph
from t3compile.ops import WindowAttention, WindowAttentionArgs
from t3compile.ops.window_attention import ONNX_NAME
from t3compile.pattern import WindowPattern
from t3compile.program import trace

DOMAIN, OP_TYPE = ONNX_NAME.split("::")
CONFIGURATION_PROPERTY = "t3compile_window_attention"

# How attention is spelled inside a function body.
AttentionForm = Literal["attention", "matmul", "onnxruntime"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)


_TORCH_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class MaskKey:
    """Shape and dtype of a function's fourth input."""

    shape: tuple[int, ...]
    dtype: str


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
    mask: MaskKey | None = None
    key_heads: int = None  # type: ignore[assignment]  # not given: as many as the queries have

    def __post_init__(self) -> None:
        if self.key_heads is None:
            object.__setattr__(self, "key_heads", self.heads)

    @property
    def name(self) -> str:
        """WindowAttention_<first ten hex digits of the hash of the configuration>."""
        masked = () if self.mask is None else (self.mask.shape, self.mask.dtype)
        grouped = () if self.key_heads == self.heads else (("key_heads", self.key_heads),)
        fields = (
            *self.args.as_op_args(),
            self.batch,
            self.heads,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.form,
            *masked,
            *grouped,
        )
        return f"{OP_TYPE}_{hashlib.sha256(repr(fields).encode()).hexdigest()[:10]}"

    def dumps(self) -> str:
        """The configuration as JSON, as it stands in a function's metadata."""
        fields = {
            "kind": self.args.pattern.kind,
            **self.args.as_attributes(),
            "batch": self.batch,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "dtype": self.dtype,
            "form": self.form,
        }
        if self.key_heads != self.heads:
            fields["key_heads"] = self.key_heads
        if self.mask is not None:
            fields["mask"] = {"shape": list(self.mask.shape), "dtype": self.mask.dtype}
        return json.dumps(fields)

    @classmethod
    def loads(cls, text: str) -> FunctionKey:
        """The configuration that ``dumps`` wrote; EngineError where it is malformed."""
        try:
            fields = dict(json.loads(text))
            kind, mask, key_heads = fields.pop("kind"), fields.pop("mask", None), fields.pop("key_heads", None)
            if kind != WindowPattern.kind:
                raise EngineError(f"a function of this file is of kind '{kind}'; known: '{WindowPattern.kind}'")
            own = {name: fields.pop(name) for name in ("batch", "heads", "head_dim", "value_dim", "dtype", "form")}
            key = None if mask is None else MaskKey(tuple(mask["shape"]), mask["dtype"])
            return cls(args=WindowAttentionArgs.from_op_args(**fields), **own, mask=key, key_heads=key_heads)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"a window attention function carries a damaged configuration ({type(error).__name__}: {error}); "
                "export the model again"
            ) from None


def window_functions(model: ir.Model) -> Iterator[tuple[ir.Function, FunctionKey]]:
    """Every window attention function of a file with its configuration, in file order.

    EngineError where one carries none (an older export) or another's.
    """
    for function in model.functions.values():
        if function.domain != DOMAIN or not function.name.startswith(f"{OP_TYPE}_"):
            continue
        text = function.metadata_props.get(CONFIGURATION_PROPERTY)
        if text is None:
            raise EngineError(f"function '{function.name}' carries no configuration; export the model again")
        key = FunctionKey.loads(text)
        if key.name != function.name:
            raise EngineError(f"function '{function.name}' carries the configuration of '{key.name}'; export again")
        yield function, key


def read_key(node: ir.Node, form: AttentionForm) -> FunctionKey:
    """The configuration that a legalized node carries in its attributes and the types of its inputs."""
    q, k, v = node.inputs[:3]
    assert q is not None and q.dtype is not None
    batch, heads, _, head_dim = _sizes(q)
    _, key_heads, _, _ = _sizes(k)
    given = node.attributes
    args = WindowAttentionArgs.from_op_args(
        list(given["grid"].as_ints()),
        list(given["splits"].as_ints()),
        given["branches"].as_string(),
        given["prefix"].as_int(),
        given["suffix"].as_int(),
        given["scale"].as_float() if "scale" in given else None,
        given["query_prefix"].as_int() if "query_prefix" in given else None,
        given["query_suffix"].as_int() if "query_suffix" in given else None,
    )
    mask = _mask_key(node.inputs[3]) if len(node.inputs) > 3 else None
    return FunctionKey(args, batch, heads, head_dim, _sizes(v)[-1], _TORCH_NAMES[q.dtype], form, mask, key_heads)


def _mask_key(mask: ir.Value | None) -> MaskKey:
    assert mask is not None and mask.shape is not None and mask.dtype is not None
    return MaskKey(_sizes(mask), _TORCH_NAMES[mask.dtype])


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.shape is not None
    return tuple(int(str(size)) for size in value.shape)


def build_function(key: FunctionKey) -> ir.Function:
    """The function's body, exported from the torch implementation of the op."""
    dtype = getattr(torch, key.dtype)
    args = key.args
    sizes = (
        (key.heads, args.query_tokens, key.head_dim),
        (key.key_heads, args.tokens, key.head_dim),
        (key.key_heads, args.tokens, key.value_dim),
    )
    with FakeTensorMode():
        inputs = tuple(torch.empty(key.batch, *size, dtype=dtype) for size in sizes)
        if key.mask is not None:
            inputs = (*inputs, torch.empty(key.mask.shape, dtype=getattr(torch, key.mask.dtype)))
    model = export_graph(trace(WindowAttention(key.args), inputs).exported)
    graph = model.graph
    _REWRITE_FORM[key.form](graph)
    constants_into_nodes(graph)
    function = ir.Function(DOMAIN, key.name, graph=graph, attributes=[])
    function.metadata_props[CONFIGURATION_PROPERTY] = key.dumps()
    for node in function:
        function.opset_imports.setdefault(node.domain, OPSET if node.domain == "" else 1)
    return function


def attention_into_products(graph: ir.Graph) -> None:
    """Replace every opset-23 Attention node of a graph by MatMul-Softmax-MatMul.

    The nodes must be of the exporter's plain kind: no causal mask, soft cap, key-value cache or shared heads.
    """
    _to_matmul(graph)


def constants_into_nodes(graph: ir.Graph) -> None:
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


def _mask_of(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _keep(graph: ir.Graph) -> None:
    """Opset-23 Attention: every runtime's own fused kernel. onnxruntime's wants a mask with a row for each query."""
    for node in _attention_nodes(graph):
        mask = _mask_of(node)
        if mask is None:
            continue
        sizes = _sizes(mask)
        wanted = (*sizes[:2], _sizes(node.inputs[0])[2], _sizes(node.inputs[1])[2])
        if sizes == wanted:
            continue
        shape = _initializer(graph, f"{node.outputs[0].name}_mask_shape", ir.tensor(list(wanted)))
        full = ir.node("Expand", [mask, shape])
        graph.insert_before(node, full)
        node.replace_input_with(3, full.outputs[0])


def _to_matmul(graph: ir.Graph) -> None:
    """MatMul-Softmax-MatMul with the query scaled first: for TensorRT before 10.14."""
    for node in _attention_nodes(graph):
        q, k, v = node.inputs[:3]
        assert q is not None and k is not None and v is not None and q.dtype is not None
        factor = _initializer(graph, f"{node.outputs[0].name}_scale", ir.tensor(_scale(node), dtype=q.dtype))
        scaled = ir.node("Mul", [q, factor])
        keys = ir.node("Transpose", [k], {"perm": [0, 1, 3, 2]})
        scores = ir.node("MatMul", [scaled.outputs[0], keys.outputs[0]])
        biased = _biased(graph, node, scores.outputs[0])
        weights = ir.node("Softmax", [biased[-1].outputs[0] if biased else scores.outputs[0]], {"axis": -1})
        out = ir.node("MatMul", [weights.outputs[0], v])
        _replace(graph, node, [scaled, keys, scores, *biased, weights, out])


def _biased(graph: ir.Graph, node: ir.Node, scores: ir.Value) -> list[ir.Node]:
    """Nodes that add the mask to the scores."""
    mask = _mask_of(node)
    if mask is None:
        return []
    bias = _additive(graph, node, mask)
    return [*bias, ir.node("Add", [scores, bias[-1].outputs[0] if bias else mask])]


def _additive(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that make 0 and -inf, in the dtype of the queries, of a bool mask; none where it is additive."""
    q = node.inputs[0]
    assert q is not None and q.dtype is not None
    if mask.dtype != ir.DataType.BOOL:
        return [] if mask.dtype == q.dtype else [ir.node("Cast", [mask], {"to": q.dtype})]
    name = f"{node.outputs[0].name}_mask"
    visible, hidden = (
        _initializer(graph, f"{name}_{part}", ir.tensor(value, dtype=q.dtype))
        for part, value in (("visible", 0.0), ("hidden", float("-inf")))
    )
    return [ir.node("Where", [mask, visible, hidden])]


def _to_onnxruntime(graph: ir.Graph) -> None:
    """com.microsoft.MultiHeadAttention: never holds the scores, on the CPU; the file then needs onnxruntime.

    It holds them where it gets a bias, so a mask that all queries share becomes a component of the keys instead.
    """
    for node in _attention_nodes(graph):
        mask = _mask_of(node)
        made: list[ir.Node] = []
        values = list(node.inputs[:3])
        widened = mask is not None and _sizes(mask)[2] == 1
        if mask is not None and widened:
            made = _mask_into_keys(graph, node, mask)
            values[:2] = [made[-2].outputs[0], made[-1].outputs[0]]
        flat: list[ir.Value | None] = []
        for i, (value, given) in enumerate(zip(values, node.inputs[:3], strict=True)):
            _, _, tokens, depth = _sizes(given)
            depth += widened and i < 2
            shape = _initializer(graph, f"{node.outputs[0].name}_{i}_flat", ir.tensor([-1, tokens, depth]))
            made.append(ir.node("Reshape", [value, shape]))
            flat.append(made[-1].outputs[0])
        if mask is not None and not widened:
            made += _bias_of_queries(graph, node, mask)
            flat += [None, None, made[-1].outputs[0]]
        attributes: dict[str, int | float] = {"num_heads": 1}
        if mask is not None or "scale" in node.attributes:
            attributes["scale"] = _scale(node)
        fused = ir.node("MultiHeadAttention", flat, attributes, domain="com.microsoft")
        back = _initializer(graph, f"{node.outputs[0].name}_shape", ir.tensor(list(_sizes(node.outputs[0]))))
        out = ir.node("Reshape", [fused.outputs[0], back])
        _replace(graph, node, [*made, fused, out])


def _scale(node: ir.Node) -> float:
    given = node.attributes.get("scale")
    return float(_sizes(node.inputs[0])[-1] ** -0.5) if given is None else given.as_float()


def _mask_into_keys(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that append 1 to every query and the mask over the scale to every key; the last two are q and k."""
    q, k = node.inputs[:2]
    assert q is not None and q.dtype is not None
    name = f"{node.outputs[0].name}_mask"
    scale = _initializer(graph, f"{name}_scale", ir.tensor(_scale(node), dtype=q.dtype))
    one = _initializer(graph, f"{name}_one", ir.tensor(1.0, dtype=q.dtype))
    q_shape, k_shape = (
        _initializer(graph, f"{name}_{part}_shape", ir.tensor([*_sizes(x)[:3], 1])) for part, x in (("q", q), ("k", k))
    )
    bias = _additive(graph, node, mask)
    divided = ir.node("Div", [bias[-1].outputs[0] if bias else mask, scale])
    column = ir.node("Transpose", [divided.outputs[0]], {"perm": [0, 1, 3, 2]})
    of_keys = ir.node("Expand", [column.outputs[0], k_shape])
    of_queries = ir.node("Expand", [one, q_shape])
    wide_q = ir.node("Concat", [q, of_queries.outputs[0]], {"axis": -1})
    wide_k = ir.node("Concat", [k, of_keys.outputs[0]], {"axis": -1})
    return [*bias, divided, column, of_keys, of_queries, wide_q, wide_k]


def _bias_of_queries(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that make the additive mask [1 or B*N, 1, Sq, S] for heads folded into the batch."""
    batch, heads, queries, _ = _sizes(node.inputs[0])
    keys = _sizes(node.inputs[1])[2]
    name = f"{node.outputs[0].name}_mask"
    bias = _additive(graph, node, mask)
    whole = (1, 1, queries, keys) if _sizes(mask)[:2] == (1, 1) else (batch, heads, queries, keys)
    whole_shape = _initializer(graph, f"{name}_whole_shape", ir.tensor(list(whole)))
    flat_shape = _initializer(graph, f"{name}_flat_shape", ir.tensor([-1, 1, queries, keys]))
    full = ir.node("Expand", [bias[-1].outputs[0] if bias else mask, whole_shape])
    return [*bias, full, ir.node("Reshape", [full.outputs[0], flat_shape])]


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put the nodes in the place of `old`; the last one's output replaces its output, under its name."""
    source, target = old.outputs[0], new[-1].outputs[0]
    target.shape, target.type = source.shape, source.type
    for index, node in enumerate(new):
        node.name = f"{old.name}/{index}"
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(source, target, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    target.name = source.name


_REWRITE_FORM: dict[AttentionForm, Callable[[ir.Graph], None]] = {
    "attention": _keep,
    "matmul": _to_matmul,
    "onnxruntime": _to_onnxruntime,
}
