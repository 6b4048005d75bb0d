"""ONNX functions of masked calls and of calls with a query stream: onnxruntime equals torch in every spelling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from t3compile.execute import execute
from t3compile.export.window_function import ATTENTION_FORMS, AttentionForm, FunctionKey, MaskKey
from t3compile.export.write_onnx import to_onnx_model, write_onnx
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.program import Program, trace
from tests.test_window_attention import MASKS, args_of, masked_of, stream_qkv

BATCH, HEADS = 2, 3


class Windows(nn.Module):
    """One call of the op on its inputs."""

    def __init__(self, args: WindowAttentionArgs) -> None:
        super().__init__()
        self.args = args

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = WINDOW_ATTENTION(q, k, v, *self.args.as_op_args(), mask=mask)
        return out


STREAMS = {
    "joint": args_of((2, 3, 5), (1, 2, 2), prefix=2, suffix=3, scale=0.6),
    "own-queries": args_of((2, 3, 5), (1, 2, 2), prefix=2, suffix=3, query_prefix=0, query_suffix=0),
    "some-queries": args_of((2, 3, 4), (2, 1, 2), prefix=4, query_prefix=1, query_suffix=2),
}
CASES = [
    ("joint", "bool-keys"),
    ("joint", "float-rows"),
    ("joint", "bool-rows"),
    ("joint", "float-heads"),
    ("joint", "bool-shared"),
    ("own-queries", None),
    ("own-queries", "bool-keys"),
    ("some-queries", None),
    ("some-queries", "float-rows"),
]


@dataclass(frozen=True)
class Case:
    args: WindowAttentionArgs
    program: Program
    inputs: dict[str, Tensor]


def _case(stream: str, mask: str | None, dtype: torch.dtype = torch.float32) -> Case:
    args = STREAMS[stream]
    q, k, v = (x.to(dtype) for x in stream_qkv(args, batch=BATCH, heads=HEADS, value_depth=6))
    tensors = [q, k, v]
    if mask is not None:
        made = masked_of(args, MASKS[mask], batch=BATCH, heads=HEADS)
        tensors.append(made.to(dtype) if made.is_floating_point() else made)
    program = trace(Windows(args), tuple(tensors))
    return Case(args, program, named_inputs(program))


def _write(case: Case, form: AttentionForm, path: Path) -> onnx.ModelProto:
    write_onnx(LegalizeWindowAttention()(case.program).program, path, form=form)
    return onnx.load(path)


def _run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(np.asarray(output))


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize(("stream", "mask"), CASES)
def test_onnxruntime_equals_torch(stream: str, mask: str | None, form: AttentionForm, tmp_path: Path) -> None:
    case = _case(stream, mask)
    model = _write(case, form, tmp_path / "model.onnx")
    (exact,) = execute(case.program, case.inputs, float64=True)
    (plain,) = execute(case.program, case.inputs)
    ours = _run(tmp_path / "model.onnx", case.inputs)
    magnitude = float(exact.abs().max())
    torch_error = float((plain.double() - exact).abs().max())
    assert torch_error < 1e-5 * magnitude
    error = float((ours.double() - exact).abs().max())
    # The mask as a component of the keys is rounded once more than as a bias.
    assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * magnitude
    _check_contract(case, model)


def _check_contract(case: Case, model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.domain == "t3")
    (function,) = model.functions
    assert len(node.input) == len(function.input) == len(case.inputs)
    assert node.op_type == function.name
    inlined = onnx.shape_inference.infer_shapes(
        onnx.inliner.inline_local_functions(model), check_type=True, strict_mode=True, data_prop=True
    )
    given = {value.name for value in inlined.graph.input}
    for value in inlined.graph.value_info:
        shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
        assert len(shape) <= 8
        # Nothing of the size of the full scores is made.
        is_dense = case.args.query_tokens in shape and case.args.tokens in shape and shape[-1] != HEADS
        assert not is_dense or value.name in given, (value.name, shape)


def test_float16_mask(tmp_path: Path) -> None:
    case = _case("joint", "float-rows", torch.float16)
    _write(case, "attention", tmp_path / "model.onnx")
    (exact,) = execute(case.program, case.inputs, float64=True)
    (plain,) = execute(case.program, case.inputs)
    error = (_run(tmp_path / "model.onnx", case.inputs).double() - exact).abs().max()
    rounding = torch.finfo(torch.float16).eps * exact.abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + rounding


def _name(case: Case, form: AttentionForm = "attention") -> str:
    (function,) = to_onnx_model(LegalizeWindowAttention()(case.program).program, form=form).functions
    return function[1]


def test_the_name_tells_masks_and_query_streams_apart() -> None:
    args = STREAMS["joint"]
    plain = FunctionKey(args, BATCH, HEADS, 8, 6, "float32", "attention")
    masks = [MaskKey((2, 1, 1, 35), "bool"), MaskKey((2, 1, 1, 35), "float32"), MaskKey((1, 1, 1, 35), "bool")]
    streams = [FunctionKey(x, BATCH, HEADS, 8, 6, "float32", "attention") for x in STREAMS.values()]
    names = {plain.name, *(key.name for key in streams)}
    names |= {FunctionKey(args, BATCH, HEADS, 8, 6, "float32", "attention", mask).name for mask in masks}
    assert len(names) == len(masks) + len(streams)
    assert (
        _name(_case("joint", "bool-keys"))
        == FunctionKey(args, BATCH, HEADS, 8, 6, "float32", "attention", masks[0]).name
    )
