"""Weights that an ONNX file stores in fewer bits: what was rounded, how, and the rounded values for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir
from torch import Tensor

from t3compile.errors import ExportError
from t3compile.export.store_weights import LazyWeight
from t3compile.mapped_files import Extent
from t3compile.weights import Weights

# float16, bfloat16: stored so, computed in float32. int8: blocks of 8 bits, computed in float32, or for
# int8-dynamic in 8 bits, the other operand rounded while the model runs.
WeightStorageKind = Literal["float16", "bfloat16", "int8", "int8-dynamic"]


@dataclass(frozen=True)
class Rounding:
    """How many weights are stored in which form, and their bytes before and after."""

    kind: WeightStorageKind
    tensors: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# A weight's values as the file has them, in the dtype that the graph computes in.
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RoundedWeights:
    """Another source's tensors, some of them as the file stores them."""

    source: Weights
    rounded: Mapping[str, Round]

    def names(self) -> Collection[str]:
        return self.source.names()

    def load(self, name: str) -> Tensor:
        tensor = self.source.load(name)
        return self.rounded[name](tensor.detach()) if name in self.rounded else tensor

    def view(self, name: str) -> Tensor:
        return self.load(name) if name in self.rounded else self.source.view(name)

    def locate(self, name: str) -> Extent | None:
        return None if name in self.rounded else self.source.locate(name)


def product_weights(graph: ir.Graph, op_types: Collection[str]) -> Iterator[ir.Value]:
    """The graph's float32 weights of two axes or more that such nodes alone read, and as their second operand."""
    for value in graph.initializers.values():
        lazy = value.const_value
        if not isinstance(lazy, LazyWeight) or lazy.dtype != ir.DataType.FLOAT or len(lazy.shape) < 2:
            continue
        uses = value.uses()
        are_products = all(
            use.node.domain == "" and use.node.op_type in op_types and use.idx == 1 and use.node.graph is graph
            for use in uses
        )
        if uses and are_products and not value.is_graph_output():
            yield value


def require_found(found: Collection[object], kind: WeightStorageKind) -> None:
    """Raise ExportError where there is nothing to round."""
    if not found:
        raise ExportError(
            f"no weight can be stored in {kind}: no float32 weight is read by matrix products alone; load the model "
            "with --dtype float32, or leave the option out"
        )
