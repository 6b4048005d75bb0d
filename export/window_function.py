"""One ONNX model-local function per window pattern: t3::WindowAttention_<hash>.

Contract (shared by every runtime): all constants baked in, no attributes, a body of standard operators of at most
eight axes; onnxruntime inlines the body, TensorRT takes a plugin of that name when one is registered. The function's
metadata hold the configuration as JSON, for whoever makes such a plugin from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from t3compile.errors import EngineError
from t3compile.export.attention_forms import AttentionChoice, spell_attention
from t3compile.export.graph_values import sizes_of
from t3compile.export.merge_transposes import merge_transposes
from t3compile.export.torch_onnx import OPSET, export_graph
from t3compile.ops import WindowAttention, WindowAttentionArgs
from t3compile.ops.window_attention import ONNX_NAME
from t3compile.pattern import WindowPattern
from t3compile.program import trace

DOMAIN, OP_TYPE = ONNX_NAME.split("::")
CONFIGURATION_PROPERTY = "t3compile_window_attention"

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
    form: AttentionChoice
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


def read_key(node: ir.Node, form: AttentionChoice) -> FunctionKey:
    """The configuration that a legalized node carries in its attributes and the types of its inputs."""
    q, k, v = node.inputs[:3]
    assert q is not None and q.dtype is not None
    batch, heads, _, head_dim = sizes_of(q)
    _, key_heads, _, _ = sizes_of(k)
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
    return FunctionKey(args, batch, heads, head_dim, sizes_of(v)[-1], _TORCH_NAMES[q.dtype], form, mask, key_heads)


def _mask_key(mask: ir.Value | None) -> MaskKey:
    assert mask is not None and mask.shape is not None and mask.dtype is not None
    return MaskKey(sizes_of(mask), _TORCH_NAMES[mask.dtype])


def build_function(key: FunctionKey) -> ir.Function:
    """The function's body, exported from the torch implementation of the op."""
    graph = export_body(key)
    if key.form != "auto":  # else chosen where the body is written in place
        spell_attention(graph, key.form)
    merge_transposes(graph)
    constants_into_nodes(graph)
    function = ir.Function(DOMAIN, key.name, graph=graph, attributes=[])
    function.metadata_props[CONFIGURATION_PROPERTY] = key.dumps()
    for node in function:
        function.opset_imports.setdefault(node.domain, OPSET if node.domain == "" else 1)
    return function


def export_body(key: FunctionKey) -> ir.Graph:
    """The op as torch.onnx exports it, the same for every form."""
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
    return export_graph(trace(WindowAttention(key.args), inputs).exported).graph


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
