"""Load an ONNX file in onnxruntime and call it like the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from t3compile.errors import EngineError, InputsError, MissingExtraError, MissingKernelError, first_line
from t3compile.export.name_inputs import name_inputs
from t3compile.loading.recognize import TENSORRT_MAGIC

_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


_REMEDY = "give the .onnx file that 't3compile export' wrote, or copy it again"


@dataclass(frozen=True)
class EngineInput:
    """Name, shape and numpy dtype of one input."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


class OnnxEngine:
    """An ONNX file in onnxruntime on the CPU.

    Call it with tensors or arrays, by position or by input name. Complex inputs [...] are given to the file as real
    [..., 2]; complex outputs come back so. Returns torch tensors when the first input is one, else numpy arrays: the
    only output, or a tuple of them.
    """

    runtime = "onnxruntime-cpu"

    def __init__(self, path: str | Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "cpu", "running an ONNX file") from None
        path = Path(path)
        check_onnx_file(path)
        options = onnxruntime.SessionOptions()
        # The arena doubles the peak memory of large activations and gains no time (see BENCHMARKS.md).
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3  # errors; warnings are about its own optimisations
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            kind = MissingKernelError if "NOT_IMPLEMENTED" in str(error) else EngineError
            raise kind(f"onnxruntime cannot load '{path}': {first_line(error)}") from error
        self._path = path
        self.inputs = tuple(_engine_input(value) for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._named(args, kwargs)
        arrays = {spec.name: _checked(spec, given[spec.name]) for spec in self.inputs}
        try:
            outputs = self._session.run(None, arrays)
        except Exception as error:
            raise EngineError(f"onnxruntime cannot run '{self._path}': {first_line(error)}") from error
        if any(isinstance(value, Tensor) for value in given.values()):
            outputs = [torch.from_numpy(output) for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        expected = ", ".join(map(str, self.inputs))
        known = [spec.name for spec in self.inputs]
        named = name_inputs(args, kwargs, known, expected)
        for name in named:
            if name not in known:
                raise InputsError(f"unknown input '{name}'; the model's inputs are {expected}")
        for spec in self.inputs:
            if spec.name not in named:
                raise InputsError(f"input '{spec.name}' is missing; the model's inputs are {expected}")
        return named


def _engine_input(value: Any) -> EngineInput:
    if value.type not in _NUMPY_TYPES:
        raise EngineError(f"input '{value.name}' has type {value.type}, which numpy cannot hold")
    return EngineInput(value.name, tuple(value.shape), _NUMPY_TYPES[value.type])


def _checked(spec: EngineInput, value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        raise InputsError(f"input '{spec.name}' has dtype bfloat16, expected {spec.dtype}")
    array = value.detach().cpu().resolve_conj().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag], axis=-1)
    if array.dtype != spec.dtype:
        raise InputsError(f"input '{spec.name}' has dtype {array.dtype}, expected {spec.dtype}")
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(spec.shape, array.shape, strict=False)
    )
    if not fits:
        raise InputsError(f"input '{spec.name}' has shape {list(array.shape)}, expected {list(spec.shape)}")
    return array


def check_onnx_file(path: Path) -> None:
    """Raise EngineError unless `path` is an ONNX model whose external data stays in its own folder."""
    if path.is_dir():
        raise EngineError(f"'{path}' is a folder; give the .onnx file that 't3compile export' wrote")
    if not path.is_file():
        raise EngineError(f"'{path}' does not exist; give the .onnx file that 't3compile export' wrote")
    with path.open("rb") as file:
        if file.read(4) in TENSORRT_MAGIC:
            raise EngineError(
                f"'{path}' is a TensorRT engine, which this version of t3compile cannot run; give the .onnx file it "
                "was built from"
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
