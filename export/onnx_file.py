"""What an ONNX file must be before it is loaded, and which of its tensors lie in other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from t3compile.errors import EngineError
from t3compile.loading.recognize import TENSORRT_MAGIC

_REMEDY = "give the .onnx file that 't3compile export' wrote, or copy it again"


def check_onnx_file(path: Path) -> None:
    """Raise EngineError unless `path` is an ONNX model whose external data stays in its own folder."""
    if path.is_dir():
        raise EngineError(f"'{path}' is a folder; give the .onnx file that 't3compile export' wrote")
    if not path.is_file():
        raise EngineError(f"'{path}' does not exist; give the .onnx file that 't3compile export' wrote")
    with path.open("rb") as file:
        if file.read(4) in TENSORRT_MAGIC:
            raise EngineError(
                f"'{path}' is a TensorRT engine, which onnxruntime cannot run; give the .onnx file it was built from"
            )
    try:
        model = ir.load(path)
    except Exception as error:
        raise EngineError(f"'{path}' is not an ONNX model, or is damaged ({type(error).__name__}); {_REMEDY}") from None
    if not model.graph.outputs:
        raise EngineError(f"'{path}' is not an ONNX model: it has no outputs; {_REMEDY}")
    folder = path.resolve().parent
    for tensor in external_tensors(model):
        location = Path(str(tensor.location))
        target = (folder / location).resolve()
        if location.is_absolute() or folder not in target.parents:
            raise EngineError(
                f"'{path}' refers to external data outside its folder ('{location}'): such a file is not loaded"
            )
        if not target.is_file():
            raise EngineError(f"'{path}' needs its external data '{location}', which is not beside it: copy both files")


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor of a model that lies in another file: initializers, attributes and those of subgraphs."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        tensors = _initializers(root) if isinstance(root, ir.Graph) else []
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                tensors += _attribute_tensors(attribute)
        yield from (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def _initializers(graph: ir.Graph) -> list[object]:
    return [value.const_value for value in graph.initializers.values()]


def _attribute_tensors(attribute: ir.Attr) -> list[object]:
    """Tensors of an attribute, those of its subgraphs' initializers included."""
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return [attribute.value]
        case ir.AttributeType.TENSORS:
            return list(attribute.value)
        case ir.AttributeType.GRAPH:
            return _initializers(attribute.value)
        case ir.AttributeType.GRAPHS:
            return [tensor for graph in attribute.value for tensor in _initializers(graph)]
        case _:
            return []
