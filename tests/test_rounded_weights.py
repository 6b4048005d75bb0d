"""Weights in 16 or 8 bits: what is stored, what onnxruntime computes with it, and what the report says of the error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from t3compile.cli import main
from t3compile.errors import ExportError
from t3compile.export.quantize_weights import quantize_blocks
from t3compile.export.rounded_weights import RoundedWeights
from t3compile.inputs import named_inputs
from t3compile.pipeline import export_onnx_report
from t3compile.program import Program, trace
from t3compile.weights import TensorWeights

WIDTH, HIDDEN, ROWS = 48, 80, 40


class Linears(nn.Module):
    """Linear layers over tokens (MatMul), one over a vector (Gemm), a plain product, and weights that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH))
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(x + self.table), approximate="tanh")
        out: Tensor = (self.second(hidden) + self.shift(t)[:, None]) @ self.matrix
        return out


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Linears().eval(), (torch.randn(2, ROWS, WIDTH), torch.randn(2, WIDTH)))


def _run(path: Path, inputs: Mapping[str, Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return np.asarray(output)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_stored_so_and_widened_when_used(program: Program, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx_report(program, path, weights=dtype, check=True)  # type: ignore[arg-type]
    assert report.passed and report.comparison
    assert report.rounding is not None
    assert (report.rounding.kind, report.rounding.tensors) == (dtype, 4)
    assert report.rounding.bytes_after * 2 == report.rounding.bytes_before
    model = ir.load(path)
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    half = [name for name, found in stored.items() if found in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)]
    assert len(half) == 4
    # Defaults of inputs are no constants: nothing widens them at load.
    assert {value.name for value in model.graph.inputs} >= set(half)
    for node in model.graph:
        if node.op_type == "MatMul":
            assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT
    (distance,) = report.distances
    # Rounding of one weight is half a step; four layers of them in a row stay below four whole ones.
    step = torch.finfo(getattr(torch, dtype)).eps
    assert step / 32 < distance.relative < 4 * step
    assert distance.to_json()["relative"] == distance.relative


def test_onnxruntime_does_not_widen_16_bit_weights_at_load(program: Program, tmp_path: Path) -> None:
    path, written = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    export_onnx_report(program, path, weights="float16", check=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(written)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = ir.load(written)
    assert sum(node.op_type == "Cast" for node in optimized.graph) == 4
    large = [v.dtype for v in optimized.graph.initializers.values() if math.prod(v.shape.numpy()) >= WIDTH * WIDTH]
    assert large == [ir.DataType.FLOAT16] * 4


def test_8_bit_weights_are_checked_against_torch_with_the_same(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx_report(program, path, weights="int8", check=True)
    assert report.passed and report.comparison
    model = ir.load(path)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4
    assert not [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert all("accuracy_level" not in node.attributes for node in products)
    assert report.rounding is not None
    assert report.rounding.bytes_after < 0.4 * report.rounding.bytes_before
    (distance,) = report.distances
    assert 1e-3 < distance.relative < 2e-2
    # So that the check above can fail: with weights as they were, the error is far beyond what is allowed.
    assert distance.error > 20 * report.comparison[0].allowed
    assert report.to_json()["rounding"]["kind"] == "int8"


def test_8_bit_products_are_reported_and_not_judged(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx_report(program, path, weights="int8-dynamic", check=True)
    assert report.comparison is None
    assert "rounded as the model runs" in report.not_compared
    assert 1e-3 < report.distances[0].relative < 5e-2
    products = [node for node in ir.load(path).graph if node.op_type == "MatMulNBits"]
    assert [node.attributes["accuracy_level"].as_int() for node in products] == [4] * 4
    assert _run(path, named_inputs(program)).shape == (2, ROWS, WIDTH)


@pytest.mark.parametrize("rows", [32, 80])
def test_blocks_stand_for_the_matrix_within_half_a_step(rows: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((rows, 24)).astype(np.float32)
    blocks = quantize_blocks(matrix, 32)
    count = -(-rows // 32)
    assert blocks.values.shape == (24, count, 32)
    assert blocks.values.dtype == np.uint8
    steps = np.repeat(blocks.scales, 32, axis=1)[:, :rows].T
    error = np.abs(blocks.matrix(rows) - matrix)
    # The zero point is rounded to a whole step too, and the ends are clipped there.
    assert (error <= 1.01 * steps).all()
    assert float((error <= 0.51 * steps).mean()) > 0.95
    spans = [np.ptp(np.append(matrix[at : at + 32, 0], 0)) for at in range(0, rows, 32)]
    np.testing.assert_allclose(blocks.scales[0], np.array(spans) / 255, rtol=1e-5)


def test_a_weight_beyond_float16_is_refused(program: Program, tmp_path: Path) -> None:
    tensors = {name: program.weights.load(name).clone() for name in program.weights.names()}
    tensors["first.weight"][0, 0] = 1e5
    large = replace(program, weights=TensorWeights(tensors))
    with pytest.raises(ExportError, match=r"'first\.weight' has values up to 1e\+05.*bfloat16"):
        export_onnx_report(large, tmp_path / "model.onnx", weights="float16", check=False)
    assert not list(tmp_path.iterdir())
    export_onnx_report(large, tmp_path / "model.onnx", weights="bfloat16", check=False)


def test_a_model_without_float32_products_is_refused(tmp_path: Path) -> None:
    program = trace(nn.Softmax(-1), (torch.randn(2, 8),))
    with pytest.raises(ExportError, match="no weight can be stored in int8"):
        export_onnx_report(program, tmp_path / "model.onnx", weights="int8", check=False)


def test_sharing_and_rounding_exclude_one_another(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="take one of the two"):
        export_onnx_report(program, tmp_path / "model.onnx", weights="int8", share_weights=True)


@pytest.mark.parametrize(
    "options",
    [
        ("--quantize", "int8", "--weights-dtype", "fp16"),
        ("--quantize", "int8", "--share-weights"),
        ("--precision", "fp16", "--weights-dtype", "fp16"),
        ("--target", "aoti", "--quantize", "int8"),
    ],
)
def test_options_that_contradict_are_refused_before_loading(options: tuple[str, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", "missing.pt2", "-o", str(tmp_path / "model.onnx"), *options])
    assert done.exit_code == 2
    assert options[0] in done.output or "--quantize" in done.output
    assert "missing.pt2" not in done.output


def test_rounded_weights_change_what_they_name_alone() -> None:
    source = TensorWeights({"a": torch.tensor([1.5]), "b": torch.tensor([2.5])})
    rounded = RoundedWeights(source, {"a": torch.floor})
    assert [float(rounded.load(name)) for name in rounded.names()] == [1.0, 2.5]
    assert [float(rounded.view(name)) for name in rounded.names()] == [1.0, 2.5]
    assert rounded.locate("a") is None
