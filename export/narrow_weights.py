"""Store weights of matrix products in 16 bits and compute in float32, for CPUs without kernels in half precision.

onnxruntime computes at load what depends on constants alone, and would hold the widened weights. So the narrow ones are
listed among the graph's inputs too, which makes them defaults that a caller may override, not constants; a session's
inputs leave them out.

Input graph:
    y = MatMul(x, w)                     w float32 [K, N]
Output graph:
    y = MatMul(x, Cast(w, float32))      w float16 or bfloat16, an input with a default
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from t3compile.errors import ExportError
from t3compile.export.rounded_weights import Round, Rounding, product_weights, require_found
from t3compile.export.store_weights import LazyWeight

HalfDtype = Literal["float16", "bfloat16"]
_PRODUCTS = ("MatMul", "Gemm", "Conv")


def narrow_weights(model: ir.Model, dtype: HalfDtype) -> tuple[Rounding, dict[str, Round]]:
    """Narrow every float32 weight that only products read; what was done, and each weight's values as stored.

    Weights are converted when they are written, one at a time; ExportError then where one exceeds float16's range.
    """
    found = list(product_weights(model.graph, _PRODUCTS))
    require_found(found, dtype)
    before = sum(_lazy(value).nbytes for value in found)
    names = [_lazy(value).weight for value in found]
    for value in found:
        _narrow(model.graph, value, dtype)
    round_weight = partial(_rounded, dtype=dtype)
    return Rounding(dtype, len(found), before, before // 2), dict.fromkeys(names, round_weight)


def _lazy(value: ir.Value) -> LazyWeight:
    assert isinstance(value.const_value, LazyWeight)
    return value.const_value


def _narrow(graph: ir.Graph, value: ir.Value, dtype: HalfDtype) -> None:
    lazy, name = _lazy(value), value.name
    assert name is not None
    half = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
    stored = ir.LazyTensor(lambda: _converted(lazy, dtype), half, lazy.shape, name=f"{name}.{dtype}")
    narrow = ir.Value(name=stored.name, type=ir.TensorType(half), shape=lazy.shape, const_value=stored)
    cast = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.type = f"{name}.float32", lazy.shape, ir.TensorType(ir.DataType.FLOAT)
    readers = {use.node for use in value.uses()}
    first = next(node for node in graph if node in readers)
    ir.convenience.replace_all_uses_with(value, wide)
    graph.insert_before(first, cast)
    del graph.initializers[name]
    graph.register_initializer(narrow)
    graph.inputs.append(narrow)


def _converted(lazy: LazyWeight, dtype: HalfDtype) -> TorchTensor:
    wide = lazy.value()
    narrow = wide.to(getattr(torch, dtype))
    if not torch.isfinite(narrow).all() and torch.isfinite(wide).all():
        raise ExportError(
            f"the weight '{lazy.weight}' has values up to {float(wide.abs().max()):.3g}, which {dtype} cannot hold: "
            "take --weights-dtype bfloat16"
        )
    return TorchTensor(narrow)


def _rounded(weight: Tensor, dtype: HalfDtype) -> Tensor:
    return weight.to(getattr(torch, dtype)).to(weight.dtype)
