"""Program -> ONNX file: one model-local function per window pattern, weights as external data."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch._subclasses.fake_tensor import FakeTensor

from t3compile.errors import ExportError
from t3compile.export.engine_inputs import FROZEN_PROPERTY
from t3compile.export.torch_onnx import export_graph
from t3compile.export.window_function import (
    DOMAIN,
    OP_TYPE,
    AttentionForm,
    FunctionKey,
    build_function,
    read_key,
)
from t3compile.files import staged_outputs
from t3compile.inputs import frozen_arguments
from t3compile.program import Program, user_input_names

PLAN_PROPERTY = "t3compile_plan"
# onnxruntime keeps small tensors inline; shapes and scalars must not need a second file.
_INLINE_BYTES = 1024


def write_onnx(
    program: Program, path: Path, *, form: AttentionForm = "attention", inline: bool = False
) -> tuple[str, ...]:
    """Write ``path`` and ``path``.data, beside first, then renamed; checked by onnx.checker before.

    ``inline`` writes the functions' bodies in place, for tools that do not know functions. Returns the functions'
    names.
    """
    model = to_onnx_model(program, form=form)
    functions = tuple(identifier[1] for identifier in model.functions)
    if inline:
        model = InlinePass()(model).model
    with staged_outputs(path, needed_bytes=program.weight_bytes) as stage:
        staged = stage / path.name
        ir.save(
            model,
            staged,
            external_data=f"{path.name}.data",
            size_threshold_bytes=_INLINE_BYTES,
        )
        _check(staged)
    return functions


def to_onnx_model(program: Program, *, form: AttentionForm = "attention") -> ir.Model:
    """The model in memory, from a legalized program: nodes t3::WindowAttention_<hash> and their functions."""
    for name, value in program.exported.constants.items():
        if isinstance(value, FakeTensor):
            raise ExportError(
                f"constant '{name}' of the program has no value: an earlier trace left it in the model; build the "
                "model anew and trace it once"
            )
    outputs = program.exported.graph_signature.user_outputs
    names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    model = export_graph(program.with_weights(), output_names=names)
    # The exporter gives an input that is also an output another name.
    for value, name in zip(model.graph.inputs, user_input_names(program.exported), strict=True):
        value.name = name
    functions: dict[FunctionKey, ir.Function] = {}
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            continue
        key = read_key(node, form)
        if key not in functions:
            functions[key] = build_function(key)
            model.functions[functions[key].identifier()] = functions[key]
        _bind(node, key)
    if functions:
        model.opset_imports[DOMAIN] = 1
    for domain in {domain for f in functions.values() for domain in f.opset_imports}:
        model.opset_imports.setdefault(domain, 1)
    model.metadata_props[FROZEN_PROPERTY] = json.dumps(frozen_arguments(program))
    if program.plan is not None:
        model.metadata_props[PLAN_PROPERTY] = program.plan.dumps()
    return model


def _bind(node: ir.Node, key: FunctionKey) -> None:
    """Bind the node to its function; TensorRT's parser reads the two attributes when it looks for a plugin."""
    node.op_type = key.name
    node.attributes.clear()
    for attribute in (ir.AttrString("plugin_namespace", DOMAIN), ir.AttrInt64("aot", 1)):
        node.attributes[attribute.name] = attribute


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported model: {error}") from error
