"""In which precision an ONNX file computes: networks are strongly typed, so the graph alone decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from t3compile.errors import ExportError
from t3compile.export.window_function import window_functions

Precision = Literal["float32", "float16", "bfloat16"]
_NAMES: dict[ir.DataType, Precision] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})


def read_precision(model: ir.Model) -> str:
    """The dtype of most matrix products and window functions, e.g. "bfloat16"; norms and tables may be float32."""
    counts: Counter[str] = Counter()
    functions = {function.name: key.dtype for function, key in window_functions(model)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in functions:
            counts[functions[node.op_type]] += 1
        elif node.domain == "" and node.op_type in _PRODUCTS:
            value = node.inputs[0]
            if value is not None and value.dtype in _NAMES:
                counts[_NAMES[value.dtype]] += 1
    if not counts:
        return "float32"
    return counts.most_common(1)[0][0]


def check_precision(model: ir.Model, path: Path, wanted: Precision | None) -> str:
    """The file's precision; ExportError where another was asked for."""
    found = read_precision(model)
    if wanted is not None and found != wanted:
        raise ExportError(
            f"'{path}' computes in {found} and {wanted} was asked for: TensorRT networks are strongly typed, the "
            f"precision lives in the ONNX graph; export the model with --precision {wanted}, or leave the option out"
        )
    return found
