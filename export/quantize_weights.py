"""Store weights of linear layers in blocks of 8 bits, by onnxruntime's own quantizer; the file then needs onnxruntime.

Input graph:
    y = MatMul(x, w)                     w float32 [K, N]; or Gemm(x, w, b) with w transposed
Output graph:
    y = com.microsoft.MatMulNBits(x, blocks, scales, zero_points, bits=8)    blocks uint8 [N, K/block, block]
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from t3compile.errors import MissingExtraError
from t3compile.export.graph_values import put_in_place
from t3compile.export.rounded_weights import Round, Rounding, product_weights, require_found
from t3compile.export.store_weights import LazyWeight

Quantization = Literal["int8", "int8-dynamic"]
_DOMAIN = "com.microsoft"
# Larger blocks are faster in 8 bits, smaller ones err less.
_BLOCK: dict[Quantization, int] = {"int8": 32, "int8-dynamic": 128}
# onnxruntime's name for products in int8; unset, they are in float32.
_ACCURACY_INT8 = 4


@dataclass(frozen=True)
class Blocks:
    """8-bit blocks along K of a matrix [K, N]: uint8 [N, K/block, block], float32 and uint8 [N, K/block]."""

    values: Any
    scales: Any
    zero_points: Any

    def matrix(self, rows: int) -> Any:
        """The float32 matrix [K, N] that they stand for; ``rows`` is K, which the last block may exceed."""
        wide = self.values.astype(np.float32) - self.zero_points[:, :, None].astype(np.float32)
        return (wide * self.scales[:, :, None]).reshape(len(wide), -1)[:, :rows].T


def quantize_blocks(matrix: Any, block: int) -> Blocks:
    """Quantize a float32 matrix [K, N] in blocks along K, with onnxruntime's MatMulNBits quantizer."""
    quantizer = _quantizer(block)
    return Blocks(*quantizer.qbits_block_quant(np.ascontiguousarray(matrix)))


@functools.cache
def _quantizer(block: int) -> Any:
    root = logging.getLogger()
    # The module configures the root logger when it is imported, unless that has a handler.
    guard = logging.NullHandler()
    root.addHandler(guard)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu", "quantizing weights") from None
    finally:
        root.removeHandler(guard)
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=8)
    return DefaultWeightOnlyQuantizer(config)


def quantize_weights(model: ir.Model, kind: Quantization) -> tuple[Rounding, dict[str, Round]]:
    """Quantize every float32 matrix that only linear layers read; what was done, and each weight's values as stored.

    Weights are read and quantized when they are written, one at a time. "int8-dynamic" multiplies in 8 bits too.
    """
    block = _BLOCK[kind]
    _quantizer(block)
    graph = model.graph
    found = [value for value in product_weights(graph, ("MatMul", "Gemm")) if _is_linear(value)]
    require_found(found, kind)
    before = after = 0
    rounded: dict[str, Round] = {}
    for value in found:
        lazy = value.const_value
        assert isinstance(lazy, LazyWeight)
        before += lazy.nbytes
        is_transposed = _is_gemm(value)
        matrix = lazy.transposed((1, 0)) if is_transposed and lazy.permutation is None else lazy
        rounded[lazy.weight] = partial(_rounded, block=block, transposed=matrix.permutation is not None)
        after += _quantize(graph, value, matrix, block, kind)
    model.opset_imports.setdefault(_DOMAIN, 1)
    return Rounding(kind, len(found), before, after), rounded


def _is_gemm(value: ir.Value) -> bool:
    return any(use.node.op_type == "Gemm" for use in value.uses())


def _is_linear(value: ir.Value) -> bool:
    """A matrix, and where a Gemm reads it, transposed and unscaled as a linear layer has it."""
    nodes = [use.node for use in value.uses()]
    if value.shape is None or len(value.shape) != 2 or len({node.op_type for node in nodes}) != 1:
        return False
    wanted = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    defaults = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return all(
        node.op_type == "MatMul"
        or all(
            (node.attributes[name].value if name in node.attributes else defaults[name]) == number
            for name, number in wanted.items()
        )
        for node in nodes
    )


def _quantize(graph: ir.Graph, value: ir.Value, matrix: LazyWeight, block: int, kind: Quantization) -> int:
    """Replace the nodes that read the weight; the bytes of what is stored in its place."""
    rows, columns = (int(str(size)) for size in matrix.shape)
    count = -(-rows // block)

    @functools.lru_cache(maxsize=1)
    def blocks() -> Blocks:
        return quantize_blocks(matrix.value().numpy(), block)

    def stored(part: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[Blocks], Any]) -> ir.Value:
        name = f"{value.name}.{part}"
        lazy = ir.LazyTensor(lambda: ir.tensor(read(blocks()), name=name), dtype, ir.Shape(shape), name=name)
        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)
        graph.register_initializer(made)
        return made

    parts = [
        stored("blocks", ir.DataType.UINT8, (columns, count, block), lambda b: b.values),
        stored("scales", ir.DataType.FLOAT, (columns, count), lambda b: b.scales),
        stored("zero_points", ir.DataType.UINT8, (columns, count), lambda b: b.zero_points),
    ]
    attributes = {"K": rows, "N": columns, "bits": 8, "block_size": block}
    if kind == "int8-dynamic":
        attributes["accuracy_level"] = _ACCURACY_INT8
    for node in [use.node for use in value.uses()]:
        product = ir.node("MatMulNBits", [node.inputs[0], *parts], attributes, domain=_DOMAIN, name=f"{node.name}/8bit")
        made = [product]
        out = product.outputs[0]
        out.shape, out.type, out.name = node.outputs[0].shape, node.outputs[0].type, f"{node.outputs[0].name}/8bit"
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [out, node.inputs[2]], name=f"{node.name}/bias"))
        result = made[-1].outputs[0]
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        put_in_place(graph, node, made, result)
    assert value.name is not None
    del graph.initializers[value.name]
    return sum(part.const_value.nbytes for part in parts if part.const_value is not None)


def _rounded(weight: Tensor, block: int, transposed: bool) -> Tensor:
    matrix = (weight.T if transposed else weight).float().contiguous()
    dense = torch.from_numpy(np.ascontiguousarray(quantize_blocks(matrix.numpy(), block).matrix(len(matrix))))
    return (dense.T if transposed else dense).to(weight.dtype).contiguous()
