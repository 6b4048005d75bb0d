"""What is compared: programs that compute attention in different ways, and whether their outputs are one function's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import t3compile
from t3compile.benchmark.cases import Workload
from t3compile.benchmark.compare_outputs import allowed_difference, largest_difference
from t3compile.benchmark.load_target import module_on
from t3compile.benchmark.names import VARIANTS
from t3compile.benchmark.variants import AttentionLayer, TensorForm, attention_layers, variant_program
from t3compile.errors import PlanError
from t3compile.macs import graph_macs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.program import Program
from tests.two_layers import ARGS, Video, two_layer_programs


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    return two_layer_programs()


def _call(program: Program, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = program.module()(*inputs)
    return out


# --- variants ------------------------------------------------------------------------------------


def test_paper_and_regrouped_are_the_rewritten_function_and_full_is_the_original_one(
    programs: tuple[Program, Program],
) -> None:
    original, rewritten = programs
    (x,), _ = original.example_inputs
    reference = _call(rewritten, x)
    error = {name: float((_call(variant_program(rewritten, name), x) - reference).abs().max()) for name in VARIANTS}
    assert error["windows"] == 0
    assert error["regrouped"] == 0
    assert error["paper"] < 1e-5
    assert error["full"] > 1e-2
    put_back = _call(variant_program(rewritten, "full"), x)
    torch.testing.assert_close(put_back, _call(original, x), rtol=0, atol=1e-6)
    assert variant_program(rewritten, "full", original) is original


def test_only_windows_keep_the_op_and_the_paper_attends_twice() -> None:
    layer = AttentionLayer.by_tokens(ARGS, heads=2, head_dim=8, dtype="float32")
    macs = {}
    for name in VARIANTS:
        program = variant_program(layer.program(), name)
        has_op = any(node.target is WINDOW_ATTENTION for node in program.graph.nodes)
        assert has_op == (name == "windows")
        macs[name] = graph_macs(program.graph)
    assert macs["full"] == 2 * 48 * 48 * 16
    # Two branches of six windows of 8 tokens.
    assert macs["windows"] == macs["paper"] == macs["regrouped"] == 2 * 2 * 6 * 8 * 8 * 16


def test_layers_of_a_program_are_told_apart_by_pattern_and_counted(programs: tuple[Program, Program]) -> None:
    layers = attention_layers(programs[1])
    assert [(str(layer.args.pattern), number) for layer, number in layers.items()] == [("(2,1,1)", 1), ("(1,2,3)", 1)]
    # q is a view of [B, S, N, D], as models have it.
    assert all(layer.forms[0].order == (0, 2, 1, 3) for layer in layers)
    assert all(layer.forms[0].shape == (1, 2, 48, 8) for layer in layers)


def test_a_layer_computes_what_the_op_does_on_tokens_as_they_are_stored() -> None:
    q, k, v = (torch.randn(1, 48, 2, 8) for _ in range(3))
    program = AttentionLayer.by_tokens(ARGS, heads=2, head_dim=8, dtype="float32").program()
    expected = WINDOW_ATTENTION(*(x.transpose(1, 2) for x in (q, k, v)), *ARGS.as_op_args())
    torch.testing.assert_close(_call(program, q, k, v), expected.transpose(1, 2), rtol=0, atol=0)


def test_a_masked_layer_has_a_mask_of_its_own() -> None:
    args = WindowAttentionArgs(ARGS.grid, ARGS.pattern, suffix=3)
    form = TensorForm((1, 2, 51, 8), "float32", (0, 2, 1, 3))
    layer = AttentionLayer(args, (form, form, form, TensorForm((1, 1, 1, 51), "bool", (0, 1, 2, 3))))
    q, k, v = (torch.randn(1, 51, 2, 8) for _ in range(3))
    mask = torch.ones(1, 1, 1, 51, dtype=torch.bool)
    mask[..., -1] = False
    expected = WINDOW_ATTENTION(*(x.transpose(1, 2) for x in (q, k, v)), *args.as_op_args(), mask=mask)
    torch.testing.assert_close(_call(layer.program(), q, k, v, mask), expected.transpose(1, 2), rtol=0, atol=0)


def test_form_of_a_tensor_is_its_order_in_memory() -> None:
    x = torch.randn(2, 5, 3, 4).transpose(1, 2)
    form = TensorForm.of(x)
    assert (form.shape, form.stored_shape) == ((2, 3, 5, 4), (2, 5, 3, 4))
    assert form.view(torch.empty(form.stored_shape)).stride() == x.stride()


def test_a_program_without_the_op_cannot_be_compared(programs: tuple[Program, Program]) -> None:
    with pytest.raises(PlanError, match="no t3::window_attention"):
        Workload.of_model("x", programs[0])


# --- outputs -------------------------------------------------------------------------------------


def _saved(path: Path, *tensors: Tensor) -> Path:
    torch.save(list(tensors), path)
    return path


def test_differences_are_the_largest_over_all_outputs(tmp_path: Path) -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([[2.0]])
    reference = _saved(tmp_path / "r", a, b)
    assert largest_difference(_saved(tmp_path / "same", a, b), reference) == (0.0, 4.0)
    assert largest_difference(_saved(tmp_path / "off", a, b + 0.5), reference) == (0.5, 4.0)
    assert largest_difference(_saved(tmp_path / "nan", a * math.nan, b), reference)[0] == math.inf
    assert largest_difference(_saved(tmp_path / "short", a), reference)[0] == math.inf
    assert largest_difference(_saved(tmp_path / "row", a, b[0]), reference)[0] == math.inf


def test_what_is_allowed_tells_rounding_from_another_function() -> None:
    assert allowed_difference("float32", 2.0) == pytest.approx(2 * 2**-11.5)
    assert allowed_difference("bfloat16", 1.0) == pytest.approx(2**-3.5)


def test_a_module_moves_with_weights_and_constants() -> None:
    """To the meta device, where everything but the arithmetic happens as on a GPU."""

    class Shifted(Video):
        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[-1], dtype=x.dtype)
            out: Tensor = super().forward(x + positions + torch.tensor([1.0]))
            return out

    program = t3compile.trace(Shifted().eval(), (torch.randn(1, 2, 2, 8, 12),))
    plan = t3compile.make_plan(t3compile.detect(program), [(1, 2, 3)])
    _, module = module_on(t3compile.rewrite(program, plan), "meta")
    out = module(torch.randn(1, 2, 2, 8, 12, device="meta"))
    assert (out.device.type, out.shape) == ("meta", (1, 48, 16))
