"""Program -> ONNX file: one model-local function per window pattern, weights as external data."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch._subclasses.fake_tensor import FakeTensor

from t3compile.archive import without_values
from t3compile.errors import ExportError, T3CompileError
from t3compile.export.attention_forms import AttentionChoice, count_attention, spell_attention
from t3compile.export.engine_inputs import FROZEN_PROPERTY
from t3compile.export.fit_onnxruntime import fit_onnxruntime
from t3compile.export.narrow_weights import narrow_weights
from t3compile.export.quantize_weights import quantize_weights
from t3compile.export.rounded_weights import Round, Rounding, WeightStorageKind
from t3compile.export.store_weights import (
    LazyWeight,
    WeightStorage,
    check_sources_stay,
    fold_transposes,
    needed_bytes,
    store_weights,
)
from t3compile.export.torch_onnx import export_graph, first_cause
from t3compile.export.window_function import DOMAIN, OP_TYPE, FunctionKey, build_function, read_key
from t3compile.files import staged_outputs
from t3compile.inputs import frozen_arguments
from t3compile.program import Program, copy_exported, user_input_names
from t3compile.progress import SILENT, Progress

PLAN_PROPERTY = "t3compile_plan"


@dataclass(frozen=True)
class WrittenOnnx:
    """The functions' names, how attention is spelled, where the weights went and what of them was rounded.

    ``attention`` counts the calls of one run by operator. ``rounded`` are weights by name as the file stores them.
    """

    functions: tuple[str, ...]
    attention: Mapping[str, int]
    storage: WeightStorage
    rounding: Rounding | None = None
    rounded: Mapping[str, Round] = field(default_factory=dict)


def write_onnx(
    program: Program,
    path: Path,
    *,
    form: AttentionChoice = "attention",
    inline: bool = False,
    share: bool = False,
    weights: WeightStorageKind | None = None,
    progress: Progress = SILENT,
) -> WrittenOnnx:
    """Write ``path`` and ``path``.data, beside first, then renamed; checked by onnx.checker before.

    ``form`` "auto" writes for onnxruntime on CPUs, without functions. ``inline`` writes the functions' bodies in place,
    for tools that do not know functions. ``share`` points into the safetensors files that the weights come from
    wherever they hold the very bytes. ``weights`` stores those of linear layers in fewer bits. No more
    than six weights are held at a time.
    """
    check_sources_stay(program, path, share=share)
    progress("exporting the graph")
    model = to_onnx_model(program, form=form)
    extents = program.external_weights() if share else None
    fold_transposes(model, extents or ())
    functions = tuple(identifier[1] for identifier in model.functions)
    if form == "auto":
        model = fit_onnxruntime(model)
    elif inline:
        model = InlinePass()(model).model
    rounding, rounded = (None, {}) if weights is None else _round_weights(model, weights)
    attention = count_attention(model)
    needed = needed_bytes(program, path, share=share)
    if rounding is not None:
        needed -= rounding.bytes_before - rounding.bytes_after
    with staged_outputs(path, needed_bytes=needed) as stage:
        progress(f"writing {path.name}")
        storage = store_weights(model, path, stage, extents, progress)
        _save(model, stage / path.name)
        progress("checking the file")
        _check(stage, path.name)
    return WrittenOnnx(functions, attention, storage, rounding, rounded)


def _round_weights(model: ir.Model, kind: WeightStorageKind) -> tuple[Rounding, dict[str, Round]]:
    match kind:
        case "float16" | "bfloat16":
            return narrow_weights(model, kind)
        case _:
            return quantize_weights(model, kind)


def to_onnx_model(program: Program, *, form: AttentionChoice = "attention") -> ir.Model:
    """The model in memory, from a legalized program: nodes t3::WindowAttention_<hash> and their functions.

    Weights are lazy: each is read when its values are asked for.
    """
    for name, value in program.exported.constants.items():
        if isinstance(value, FakeTensor):
            raise ExportError(
                f"constant '{name}' of the program has no value: an earlier trace left it in the model; build the "
                "model anew and trace it once"
            )
    program.require_weights()
    outputs = program.exported.graph_signature.user_outputs
    names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    forms = copy_exported(program.exported, state_dict=without_values(program.exported.state_dict))
    model = export_graph(forms, lambda name, fake: LazyWeight(program, name, fake))
    # The exporter gives an input that is also an output another name.
    for value, name in zip(model.graph.inputs, user_input_names(program.exported), strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, names, strict=True):
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
    if form == "onnxruntime" and spell_attention(model.graph, form):
        model.opset_imports["com.microsoft"] = 1
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


def _save(model: ir.Model, path: Path) -> None:
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as error:
        cause = first_cause(error)
        # Of a weight that cannot be read.
        raise (cause if isinstance(cause, T3CompileError) else error) from None


def _check(stage: Path, name: str) -> None:
    """onnx.checker on the staged file, its external data stood in for by empty files of their sizes.

    It wants them as plain files in the model's folder, which shared ones are not before the end, and reads none.
    """
    with tempfile.TemporaryDirectory(dir=stage) as folder:
        copied = Path(folder) / name
        shutil.copyfile(stage / name, copied)
        ends: dict[str, int] = {}
        for value in ir.load(copied).graph.initializers.values():
            if isinstance(tensor := value.const_value, ir.ExternalTensor):
                end = (tensor.offset or 0) + (tensor.length or 0)
                ends[str(tensor.location)] = max(end, ends.get(str(tensor.location), 0))
        for location, end in ends.items():
            (copied.parent / location).parent.mkdir(parents=True, exist_ok=True)
            with (copied.parent / location).open("wb") as file:
                file.truncate(end)
        try:
            onnx.checker.check_model(str(copied), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"onnx.checker refuses the exported model: {error}") from error
