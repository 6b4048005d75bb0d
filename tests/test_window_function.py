"""ONNX functions of masked calls and of calls with a query stream: onnxruntime equals torch in every spelling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from t3compile.errors import EngineError
from t3compile.execute import execute
from t3compile.export.attention_forms import ATTENTION_FORMS
from t3compile.export.attention_rule import AttentionForm
from t3compile.export.window_function import (
    CONFIGURATION_PROPERTY,
    FunctionKey,
    MaskKey,
    window_functions,
)
from t3compile.export.write_onnx import write_onnx
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.program import Program, trace
from tests.test_window_attention import MASKS, args_of, masked_of, stream_qkv

BATCH, HEADS = 2, 3


JOINT = args_of((2, 3, 5), (1, 2, 2), prefix=2, suffix=3, scale=0.6)
# Two sizes of windows instead of four: a function half as long, exported in half the time.
HALVES = args_of((2, 3, 5), (1, 1, 2), prefix=2, suffix=3, scale=0.6)
OWN_QUERIES = replace(HALVES, query_prefix=0, query_suffix=0)
# Each makes a function of its own.
CALLS: dict[str, tuple[WindowAttentionArgs, str | None]] = {
    "keys": (JOINT, "bool-keys"),
    "rows": (replace(HALVES, query_suffix=1), "float-rows"),
    "own queries": (OWN_QUERIES, None),
    "own queries, shared mask": (OWN_QUERIES, "bool-shared"),
}
HEAD_CALLS: dict[str, tuple[WindowAttentionArgs, str | None]] = {
    "heads": (replace(HALVES, scale=None), "float-heads"),
    "rows": (HALVES, "bool-rows"),
}


class Windows(nn.Module):
    """Calls of the op, each on its part of the inputs: q, k, v and perhaps a mask."""

    def __init__(self, calls: Sequence[WindowAttentionArgs]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [
            WINDOW_ATTENTION(*given[:3], *args.as_op_args(), **dict(zip(["mask"], given[3:], strict=False)))
            for args, given in zip(self.calls, tensors, strict=True)
        ]


@dataclass(frozen=True)
class Case:
    calls: tuple[WindowAttentionArgs, ...]
    program: Program
    inputs: dict[str, Tensor]


def _case(calls: Iterable[tuple[WindowAttentionArgs, str | None]], dtype: torch.dtype = torch.float32) -> Case:
    calls = list(calls)
    given = []
    for args, form in calls:
        tensors = list(stream_qkv(args, batch=BATCH, heads=HEADS, value_depth=6))
        if form is not None:
            tensors.append(masked_of(args, MASKS[form], batch=BATCH, heads=HEADS))
        given.append(tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors))
    all_args = tuple(args for args, _ in calls)
    program = trace(Windows(all_args), tuple(given))
    return Case(all_args, program, named_inputs(program))


GROUPED_CALLS: dict[str, tuple[WindowAttentionArgs, str | None]] = {
    "grouped": (JOINT, None),
    "grouped, own queries": (OWN_QUERIES, "bool-shared"),
    "grouped, heads": (replace(HALVES, scale=None), "float-heads"),
}


def _grouped(case: Case, key_heads: int) -> Case:
    """The same calls with the first heads of k and v alone."""
    given = []
    for args, (_, form) in zip(case.calls, GROUPED_CALLS.values(), strict=True):
        q, k, v = stream_qkv(args, batch=BATCH, heads=HEADS, value_depth=6)
        mask = [] if form is None else [masked_of(args, MASKS[form], batch=BATCH, heads=HEADS)]
        given.append(
            tuple(x.float() if x.is_floating_point() else x for x in (q, k[:, :key_heads], v[:, :key_heads], *mask))
        )
    program = trace(Windows(case.calls), tuple(given))
    return Case(case.calls, program, named_inputs(program))


def _write(case: Case, form: AttentionForm, path: Path) -> onnx.ModelProto:
    write_onnx(LegalizeWindowAttention()(case.program).program, path, form=form)
    return onnx.load(path)


def _run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return [torch.from_numpy(np.asarray(x)) for x in outputs]


@pytest.mark.parametrize(
    ("calls", "form"),
    [*((CALLS, form) for form in ATTENTION_FORMS), (HEAD_CALLS, "onnxruntime")],
    ids=[*ATTENTION_FORMS, "onnxruntime-heads"],
)
def test_onnxruntime_equals_torch(
    calls: dict[str, tuple[WindowAttentionArgs, str | None]], form: AttentionForm, tmp_path: Path
) -> None:
    case = _case(calls.values())
    model = _write(case, form, tmp_path / "model.onnx")
    exact = execute(case.program, case.inputs, float64=True)
    plain = execute(case.program, case.inputs)
    ours = _run(tmp_path / "model.onnx", case.inputs)
    for name, x, y, reference in zip(calls, ours, plain, exact, strict=True):
        magnitude = float(reference.abs().max())
        torch_error = float((y.double() - reference).abs().max())
        assert torch_error < 1e-5 * magnitude, name
        error = float((x.double() - reference).abs().max())
        # The mask as a component of the keys is rounded once more than as a bias.
        assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * magnitude, name
    _check_contract(case, model)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_grouped_heads_in_onnxruntime_equal_torch(form: AttentionForm, tmp_path: Path) -> None:
    case = _grouped(_case(GROUPED_CALLS.values()), key_heads=1)
    model = _write(case, form, tmp_path / "model.onnx")
    exact = execute(case.program, case.inputs, float64=True)
    plain = execute(case.program, case.inputs)
    for x, y, reference in zip(_run(tmp_path / "model.onnx", case.inputs), plain, exact, strict=True):
        magnitude = float(reference.abs().max())
        torch_error = float((y.double() - reference).abs().max())
        error = float((x.double() - reference).abs().max())
        assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * magnitude
    _check_contract(case, model)
    read = [key for _, key in window_functions(ir.load(tmp_path / "model.onnx"))]
    assert [(key.heads, key.key_heads) for key in read] == [(HEADS, 1)] * len(read)


def _check_contract(case: Case, model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.domain == "t3"]
    functions = {function.name: function for function in model.functions}
    assert [len(node.input) for node in nodes] == [len(functions[node.op_type].input) for node in nodes]
    assert sum(len(node.input) for node in nodes) == len(case.inputs)
    assert len(functions) == len(nodes) == len(case.calls)
    inlined = onnx.shape_inference.infer_shapes(
        onnx.inliner.inline_local_functions(model), check_type=True, strict_mode=True, data_prop=True
    )
    dense = {(args.query_tokens, args.tokens) for args in case.calls}
    shapes = [[size.dim_value for size in x.type.tensor_type.shape.dim] for x in inlined.graph.value_info]
    assert shapes
    assert max(map(len, shapes)) <= 8
    assert not [shape for shape in shapes if tuple(shape[-2:]) in dense]


def test_float16_masks(tmp_path: Path) -> None:
    case = _case([(HALVES, "float-rows")], torch.float16)
    _write(case, "attention", tmp_path / "model.onnx")
    (exact,) = execute(case.program, case.inputs, float64=True)
    (plain,) = execute(case.program, case.inputs)
    (ours,) = _run(tmp_path / "model.onnx", case.inputs)
    rounding = torch.finfo(torch.float16).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + rounding


def test_the_name_tells_masks_and_query_streams_apart() -> None:
    streams = [HALVES, OWN_QUERIES, replace(HALVES, query_prefix=0)]
    masks = [None, MaskKey((2, 1, 1, 35), "bool"), MaskKey((2, 1, 1, 35), "float32"), MaskKey((1, 1, 1, 35), "bool")]
    keys = [FunctionKey(args, 2, 3, 8, 6, "float32", "attention", mask) for args in streams for mask in masks]
    assert len({key.name for key in keys}) == len(keys)
    same = replace(HALVES, query_prefix=2, query_suffix=3)
    assert FunctionKey(same, 2, 3, 8, 6, "float32", "attention").name == keys[0].name
    assert [FunctionKey.loads(key.dumps()) for key in keys] == keys
    grouped = replace(keys[0], key_heads=1)
    assert grouped.name not in {key.name for key in keys}
    assert FunctionKey.loads(grouped.dumps()) == grouped
    # Equal heads are not spelled out: names and files stay what they were.
    assert replace(keys[0], key_heads=3).name == keys[0].name
    assert "key_heads" not in keys[0].dumps()


def test_a_function_carries_its_configuration(tmp_path: Path) -> None:
    case = _case([(HALVES, None), (OWN_QUERIES, None), (replace(HALVES, scale=0.3), "float-rows")])
    _write(case, "attention", tmp_path / "model.onnx")
    read = list(window_functions(ir.load(tmp_path / "model.onnx")))
    assert [key.name for _, key in read] == [function.name for function, _ in read]
    assert [key.args for _, key in read] == list(case.calls)
    assert [key.mask is not None for _, key in read] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "carries no configuration"),
        ("{}", "damaged configuration"),
        ("[1]", "damaged configuration"),
        ('{"kind": "bands"}', "of kind 'bands'; known: 't3-window'"),
        (FunctionKey(JOINT, 1, 3, 8, 8, "float32", "attention").dumps(), "carries the configuration of"),
    ],
)
def test_a_foreign_configuration_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    _write(_case([(OWN_QUERIES, None)]), "attention", tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    (function,) = model.functions.values()
    function.metadata_props.clear()
    if text is not None:
        function.metadata_props[CONFIGURATION_PROPERTY] = text
    with pytest.raises(EngineError, match=message):
        list(window_functions(model))
