"""ONNX file -> TensorRT network: strongly typed, every parser error named with its node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from t3compile.errors import EngineError, ExportError
from t3compile.export.tensorrt_api import Messages, TensorRT, make_logger

# EXPLICIT_BATCH is the only kind from 10.x on; where the member exists it has to be asked for.
_NETWORK_FLAGS = ("EXPLICIT_BATCH", "STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")

_ONNXRUNTIME_DOMAIN = "com.microsoft"


def network_flags(tensorrt: TensorRT) -> int:
    """Bits for Builder.create_network: a strongly typed network that takes plugins' ahead-of-time kernels."""
    return tensorrt.flags("NetworkDefinitionCreationFlag", _NETWORK_FLAGS)


def parser_knows(tensorrt: TensorRT) -> Callable[[str], bool]:
    """A question to this version's ONNX parser: is there an importer for an operator type?"""
    trt = tensorrt.module
    logger = make_logger(trt, Messages())
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(tensorrt))
    parser = trt.OnnxParser(network, logger)
    answers: dict[str, bool] = {}

    def knows(op_type: str) -> bool:
        if op_type not in answers:
            answers[op_type] = bool(parser.supports_operator(op_type))
        return answers[op_type]

    return knows


def check_operators(model: ir.Model, knows: Callable[[str], bool], version: str) -> None:
    """Raise ExportError that names every standard operator of a model which the parser does not know."""
    unknown: dict[str, list[str]] = {}
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            if node.domain == _ONNXRUNTIME_DOMAIN:
                raise ExportError(
                    f"node '{node.name}' is {node.domain}::{node.op_type}, an operator of onnxruntime alone: export "
                    "the model with --attention attention and without --quantize"
                )
            if node.domain == "" and not knows(node.op_type):
                unknown.setdefault(node.op_type, []).append(node.name or "?")
    if unknown:
        listed = ", ".join(f"{op} ({len(names)}, first '{names[0]}')" for op, names in sorted(unknown.items()))
        raise ExportError(
            f"the ONNX parser of TensorRT {version} does not know {listed}; use a newer TensorRT, or run the file in "
            "onnxruntime"
        )


def parse_network(tensorrt: TensorRT, builder: Any, onnx: Path, logger: Any, messages: Messages) -> tuple[Any, Any]:
    """The network of an ONNX file, and its parser, which holds the weights and must live as long.

    EngineError lists every error of the parser with the node's name, operator and index.
    """
    trt = tensorrt.module
    network = builder.create_network(network_flags(tensorrt))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(onnx))
    errors = [_parser_error_text(parser.get_error(i)) for i in range(parser.num_errors)]
    if not parsed or errors:
        reasons = errors or [messages.last_error]
        raise EngineError(f"TensorRT {tensorrt.version_text} cannot parse '{onnx.name}': {'; '.join(reasons)}")
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape):
            raise EngineError(
                f"input '{tensor.name}' of '{onnx.name}' has open lengths, {list(shape)}; engines are built for one "
                "size: export the model with fixed shapes"
            )
    return network, parser


def _parser_error_text(error: Any) -> str:
    where = f"node {error.node()} '{error.node_name()}' ({error.node_operator()})"
    functions = list(error.local_function_stack())
    if functions:
        where += f" in function {' > '.join(functions)}"
    return f"{where}: {error.desc()} [{error.func()}]"
