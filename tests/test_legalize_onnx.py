"""Legalization for ONNX: each pass keeps the numbers, removes what it says, and knows when not to fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from t3compile.errors import ExportError
from t3compile.execute import execute
from t3compile.inputs import named_inputs
from t3compile.passes.expand_attention import ExpandAttention
from t3compile.passes.fold_constants import FoldConstants
from t3compile.passes.fold_factorizations import FoldFactorizations
from t3compile.passes.graph_pass import GraphPass
from t3compile.passes.promote_operands import PromoteOperands
from t3compile.passes.search_by_counting import SearchByCounting
from t3compile.passes.select_booleans import SelectBooleans
from t3compile.passes.settle_strides import SettleStrides
from t3compile.passes.sort_plainly import SortPlainly
from t3compile.passes.spell_flex_attention import SpellFlexAttention
from t3compile.passes.split_complex import SplitComplex
from t3compile.passes.squeeze_unit_axes import SqueezeUnitAxes
from t3compile.pipeline import ExportReport, export_onnx_report
from t3compile.program import Program, copy_exported, trace
from tests.test_passes import assert_does_not_fire, assert_idempotent, count

aten = torch.ops.aten


class Call(nn.Module):
    """A function as a module, with tensors that are its weights."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.parameters())


def traced(function: Callable[..., Any], *inputs: Tensor, **weights: Tensor) -> Program:
    return trace(Call(function, **weights), inputs)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fired(made: GraphPass, program: Program, *, exact: bool = True) -> Program:
    """The pass fires once and the graph computes the same numbers, bit for bit unless told otherwise."""
    result = assert_idempotent(made, program)
    inputs = named_inputs(program)
    before, after = execute(program, inputs), execute(result, inputs)
    assert len(before) == len(after) > 0
    for old, new in zip(before, after, strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        torch.testing.assert_close(new, old, **({"rtol": 0, "atol": 0} if exact else {}), equal_nan=True)
    return result


def assert_same_in_onnx(program: Program, path: Path) -> ExportReport:
    report = export_onnx_report(program, path / "model.onnx", check=True)
    assert report.comparison
    assert report.passed, report.comparison
    return report


def complex_calls(program: Program) -> list[str]:
    """Calls that make or take complex values, the views at the border left out."""
    border = (aten.view_as_real.default, aten.view_as_complex.default)
    return [
        node.name
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target not in border
        and any(
            isinstance(x.meta.get("val"), Tensor) and x.meta["val"].is_complex() for x in (node, *node.all_input_nodes)
        )
    ]


# --- constants


def table(positions: Tensor) -> Tensor:
    """cos and sin in float64, written into a preallocated tensor as position tables often are."""
    angles = torch.outer(positions.double(), 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    out = torch.zeros(positions.shape[0], 8, dtype=torch.float64)
    out[:, 0::2] = angles.cos()
    out[:, 1::2] = angles.sin()
    return out.float()


def test_a_table_of_positions_becomes_one_constant(tmp_path: Path) -> None:
    program = traced(lambda x: x * table(torch.arange(5)), randn(2, 5, 8))
    folded = fired(FoldConstants(), program)
    calls = [node for node in folded.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [aten.mul.Tensor]
    (constant,) = (node for node in calls[0].all_input_nodes if node.name.startswith("c_"))
    spec = folded.exported.graph_signature.inputs_to_lifted_tensor_constants
    torch.testing.assert_close(folded.exported.constants[spec[constant.name]], table(torch.arange(5)), rtol=0, atol=0)
    assert_same_in_onnx(program, tmp_path)


def test_what_depends_on_an_input_or_a_weight_is_not_folded() -> None:
    assert_does_not_fire(FoldConstants(), traced(lambda x: torch.outer(x[:, 0], x[0]).cos(), randn(5, 8)))
    assert_does_not_fire(FoldConstants(), traced(lambda x, w: x * w.cos().exp(), randn(5, 8), w=randn(8, seed=1)))


def test_random_numbers_are_not_folded() -> None:
    program = traced(lambda x: x + torch.randn(8).abs() + torch.rand_like(torch.ones(8)).neg(), randn(8))
    assert_does_not_fire(FoldConstants(), program)


def test_a_value_over_the_limit_stays_a_call_and_what_it_needs_is_folded() -> None:
    program = traced(lambda x: x * torch.outer(torch.arange(6.0).sin(), torch.arange(5.0).cos()), randn(6, 5))
    folded = fired(FoldConstants(limit_bytes=100), program)
    assert count(folded, aten.sin, aten.cos, aten.arange) == 0
    assert count(program, aten.outer) == count(folded, aten.outer) == 1


def test_equal_tables_are_one_constant_under_many_shapes() -> None:
    def layers(x: Tensor) -> Tensor:
        rows = torch.arange(5.0).cos()
        spread = rows.sin()[:, None].expand(5, 5)[:, 1:].flatten(1)
        return x * rows[:, None] + x.T @ torch.arange(5.0).cos().view(5, 1) + rows.sin()[None] + spread.sum(1)

    folded = fired(FoldConstants(), traced(layers, randn(5, 5)))
    used = [node for node in folded.graph.nodes if node.op == "placeholder" and node.users]
    assert [node.name.split("_")[0] for node in used] == ["c", "c", "c", "inputs"]
    assert count(folded, aten.cos, aten.sin) == 0


def test_calls_that_only_fill_or_repeat_stay() -> None:
    program = traced(lambda x: x + torch.full((4, 5), 2.0) + torch.arange(5).expand(4, 5), randn(4, 5))
    assert_does_not_fire(FoldConstants(), program)


def test_factorizations_of_weights_become_constants(tmp_path: Path) -> None:
    program = traced(lambda x, w: x @ torch.linalg.qr(w + 1e-8)[0], randn(3, 6), w=randn(6, 4, seed=1))
    folded = fired(FoldFactorizations(), program)
    assert count(folded, aten.linalg_qr) == 0
    assert_same_in_onnx(program, tmp_path)


def test_factorizations_of_inputs_and_norms_of_weights_are_left() -> None:
    assert_does_not_fire(FoldFactorizations(), traced(lambda x: torch.linalg.qr(x)[0], randn(4, 4)))
    program = traced(lambda x, w: x / torch.linalg.vector_norm(w), randn(4), w=randn(4, seed=1))
    assert_does_not_fire(FoldFactorizations(), program)


# --- squeezes and choices


def test_only_unit_axes_are_squeezed(tmp_path: Path) -> None:
    program = traced(lambda x: (x.squeeze(1), x.squeeze((0, -1)), x[0, 0, 0].squeeze(-1)), randn(1, 3, 4))
    fired(SqueezeUnitAxes(), program)
    assert_same_in_onnx(program, tmp_path)


def test_squeezes_of_unit_axes_are_left() -> None:
    assert_does_not_fire(SqueezeUnitAxes(), traced(lambda x: x.squeeze(0).squeeze(), randn(1, 3, 1)))


def test_booleans_are_chosen_by_logic(tmp_path: Path) -> None:
    def choose(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        condition, a, b = x > 0, y > 0, y[:1] > x[:1]
        return (
            torch.where(condition, a, b),
            torch.where(condition[:1], a, b),
            torch.where(condition[0], a, torch.tensor(True)),
            a.masked_fill(condition, True),
            a.masked_fill(condition, False),
            a[0].masked_fill(condition, torch.tensor(False)),
        )

    program = traced(choose, randn(3, 4), randn(3, 4, seed=1))
    legal = fired(SelectBooleans(), program)
    assert count(legal, aten.where, aten.masked_fill) == 0
    assert_same_in_onnx(program, tmp_path)


def test_numbers_are_not_chosen_by_logic() -> None:
    program = traced(lambda x: torch.where(x > 0, x, 0.0).masked_fill(x > 1, 2.0), randn(3, 4))
    assert_does_not_fire(SelectBooleans(), program)


# --- views and attention


def test_views_of_attention_become_reshapes(tmp_path: Path) -> None:
    def attend(q: Tensor, mask: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, q, q, mask).transpose(1, 2)
        return out.reshape(2, 5, 24)

    program = traced(attend, randn(2, 3, 5, 8), randn(2, 1, 1, 5) > 0)
    legal = fired(SettleStrides(), program)
    assert count(legal, aten.view, aten._unsafe_view) == 0
    assert_same_in_onnx(program, tmp_path)


def test_graphs_without_views_are_left() -> None:
    assert_does_not_fire(SettleStrides(), traced(lambda x: x.transpose(0, 1) + 1, randn(3, 4)))


# --- operands of two dtypes


def test_operands_of_two_dtypes_get_the_one_of_the_result(tmp_path: Path) -> None:
    def widen(positions: Tensor, counts: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
        angles = torch.einsum("...n,d->...nd", positions, rates)
        return angles.float(), torch.stack([positions, counts], -1), torch.stack([rates, rates.float()])

    program = traced(widen, randn(2, 3), torch.arange(6).reshape(2, 3), randn(4, dtype=torch.float64))
    legal = fired(PromoteOperands(), program)
    casts = {str(node.meta["val"].dtype) for node in legal.graph.nodes if node.name.startswith("_to_copy")}
    assert casts == {"torch.float32", "torch.float64"}
    assert_same_in_onnx(program, tmp_path)


def test_norms_with_wider_weights_run_in_their_dtype(tmp_path: Path) -> None:
    def norms(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        half = x.bfloat16()
        normed = torch.nn.functional.layer_norm(half, (6,), weight, bias)
        grouped = torch.nn.functional.group_norm(half.mT, 2, weight, bias)
        return normed.float(), grouped.float()

    program = traced(norms, randn(2, 4, 6), weight=randn(6, seed=1), bias=randn(6, seed=2))
    legal = fired(PromoteOperands(), program)
    kinds = [node for node in legal.graph.nodes if node.target in (aten.layer_norm.default, aten.group_norm.default)]
    assert [node.meta["val"].dtype for node in kinds] == [torch.float32, torch.float32]
    assert_same_in_onnx(program, tmp_path)


def test_operands_of_one_dtype_are_left() -> None:
    program = traced(
        lambda x, y: (torch.einsum("ij,kj->ik", x, y), torch.stack([x, x]), x * y.double()[:3]),
        randn(3, 4),
        randn(5, 4),
    )
    assert_does_not_fire(PromoteOperands(), program)


# --- attention


def test_attention_gets_four_axes_and_equal_heads(tmp_path: Path) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            scaled_dot_product_attention(q[0], k[0], v[0]),
            scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0], mask[0, 0], scale=0.3),
            scaled_dot_product_attention(q[None], k[None], v[None], mask[None, :, :1]),
            scaled_dot_product_attention(q[0], k[0], v[0], mask[0] > 0),
            scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
            scaled_dot_product_attention(q, k[:1], v[:1, :1], is_causal=True),
            scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        )

    inputs = randn(2, 3, 5, 8), randn(2, 3, 7, 8, seed=1), randn(2, 3, 7, 6, seed=2), randn(2, 3, 5, 7, seed=3)
    program = traced(attend, *inputs)
    fired(ExpandAttention(), program, exact=False)
    assert_same_in_onnx(program, tmp_path)


def test_attention_that_onnx_knows_is_left() -> None:
    def attend(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            scaled_dot_product_attention(q, k, k, mask > 0),
            scaled_dot_product_attention(q, k[:, :1], k[:, :1], enable_gqa=True),
        )

    assert_does_not_fire(ExpandAttention(), traced(attend, randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(7)[None]))


def test_flex_attention_becomes_attention_under_its_mask(tmp_path: Path) -> None:
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (documents[q] == documents[k]) & (q >= k)

    def distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - (q - k).abs() * (h + 1)

    blocks = create_block_mask(same_document, None, None, 7, 7, device="cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (
            flex_attention(q, k, v, scale=0.5),
            flex_attention(q, k, v, block_mask=blocks),
            flex_attention(q, k[:, :2], v[:, :2], score_mod=distance, block_mask=blocks, enable_gqa=True),
        )

    torch._dynamo.reset()
    program = traced(attend, *(randn(2, 4, 7, 8, seed=seed) for seed in range(3)))
    legal = fired(SpellFlexAttention(), program, exact=False)
    assert not any("flex_attention" in str(node.target) for node in legal.graph.nodes)
    assert count(legal, aten.scaled_dot_product_attention) == 2
    assert list(legal.exported.graph_module.children()) == []
    (note,) = assert_same_in_onnx(program, tmp_path).notes
    assert "3 flex_attention calls" in note


def test_flex_attention_whose_other_results_are_used_is_left() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = flex_attention(q, k, v, return_lse=True)
        return out

    torch._dynamo.reset()
    program = traced(attend, *(randn(2, 4, 7, 8, seed=seed) for seed in range(3)))
    assert_does_not_fire(SpellFlexAttention(), program)


# --- sorts


def test_stable_sorts_and_sorts_of_booleans(tmp_path: Path) -> None:
    def sort(x: Tensor) -> tuple[Tensor, ...]:
        ties = x.round()
        return (
            *torch.sort(ties, dim=0, stable=True),
            torch.sort(ties, stable=True, descending=True)[1],
            torch.argsort(x > 0, dim=0, stable=True),
            *torch.sort(x > 0, stable=True),
        )

    program = traced(sort, randn(6, 7))
    legal = fired(SortPlainly(), program)
    assert {node.target for node in legal.graph.nodes if "sort" in str(node.target)} == {aten.sort.default}
    assert_same_in_onnx(program, tmp_path)


def test_plain_sorts_are_left() -> None:
    assert_does_not_fire(SortPlainly(), traced(lambda x: torch.sort(x, dim=0)[0].argsort(-1), randn(3, 4)))


# --- searches


def test_a_search_counts_the_boundaries_below(tmp_path: Path) -> None:
    rows, values = torch.sort(randn(2, 5))[0], randn(2, 3, seed=1)

    def search(rows: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.searchsorted(rows, values),
            torch.searchsorted(rows[0], values, right=True),
            torch.searchsorted(rows, rows, side="right", out_int32=True),
            torch.searchsorted(rows.flip(-1), values, sorter=torch.arange(4, -1, -1).expand(2, 5)),
        )

    program = traced(search, rows, values)
    legal = fired(SearchByCounting(), program)
    assert count(legal, aten.searchsorted) == 0
    assert_same_in_onnx(program, tmp_path)


def test_sorting_is_no_search() -> None:
    assert_does_not_fire(SearchByCounting(), traced(lambda x: torch.sort(x)[1] + (x > 0).sum(-1), randn(4)))


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx_report(traced(lambda x: (x, x + 1), randn(3)), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["inputs_0"]
    assert [value.name for value in session.get_outputs()] == ["output_0", "output_1"]


def test_a_constant_without_a_value_is_refused(tmp_path: Path) -> None:
    program = traced(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), randn(3))
    with FakeTensorMode() as mode:
        constants = {name: mode.from_tensor(value) for name, value in program.exported.constants.items()}
    assert constants
    fake = replace(program, exported=copy_exported(program.exported, constants=constants))
    with pytest.raises(ExportError, match="has no value"):
        export_onnx_report(fake, tmp_path / "model.onnx")


# --- complex numbers

Z, Y = torch.complex(randn(3, 4), randn(3, 4, seed=1)), torch.complex(randn(3, 4, seed=2), randn(3, 4, seed=3))
ROWS = torch.tensor([2, 0])
COMPLEX = {
    "mul": lambda z, y: (z * y, z * y.real, y.imag * z, z * 2, z * (1 - 2j), z * torch.tensor(2.0).double()),
    "div": lambda z, y: (z / y, z / 2, z / y.real, 1 / z),
    "sum": lambda z, y: (z + y, z - y.real, z + 1, 2 - z, torch.add(z, y, alpha=3), z.sum(), z.mean(-1, keepdim=True)),
    "parts": lambda z, y: (z.real, y.imag, -z, z.conj() * y, z.abs(), z.angle(), z.exp()),
    "views": lambda z, y: (z.view(2, 6), z.T, z[None, :, None], z[None].squeeze(0), z.permute(-1, 0), z.flatten()),
    "slices": lambda z, y: (z[:, 1:3], z[-1], z.select(-1, 2), z.narrow(-1, 1, 2), z[ROWS], z[:, ROWS]),
    "lists": lambda z, y: (*z.split([1, 3], -1), *z.chunk(2, 1), *z.unbind(-2), torch.cat([z, y], -1)),
    "joins": lambda z, y: (torch.stack([z, y.real], -1), z.expand(2, 3, 4), z.repeat(2, 1), z.flip(-1), z.roll(1, -1)),
    "matmul": lambda z, y: (z @ y.T, torch.where(z.real > 0, z, y), torch.zeros_like(z)),
    "fills": lambda z, y: (z.new_full((2, 4), 1 - 1j) + z[:2], torch.ones_like(y) * z, z.new_zeros(3, 1) + z),
    "pads": lambda z, y: (
        torch.nn.functional.pad(z, (1, 2)),
        torch.constant_pad_nd(y, [0, 1, 1, 0]),
        torch.nn.utils.rnn.pad_sequence([z, y[:2]], batch_first=True),
    ),
    "casts": lambda z, y: (z.to(torch.complex128) * y, z.real.to(torch.complex64) + y, torch.polar(z.abs(), y.real)),
    "rope": lambda z, y: torch.view_as_real(torch.view_as_complex(torch.stack([z.real, y.real], -1)) * y).flatten(1),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_arithmetic_is_written_with_pairs(name: str) -> None:
    program = traced(COMPLEX[name], Z, Y)
    # torch's own complex kernels may use fused multiply-adds.
    legal = fired(SplitComplex(), program, exact=name in ("views", "slices", "lists", "joins", "pads"))
    assert complex_calls(legal) == []
    assert complex_calls(program) != []


def test_real_graphs_are_not_split() -> None:
    assert_does_not_fire(SplitComplex(), traced(lambda x: torch.stack([x, -x], -1).flatten(1), randn(3, 4)))


def test_a_complex_call_without_a_spelling_keeps_complex_operands() -> None:
    program = traced(lambda z, y: (z * y).cumsum(0) * y, Z, Y)
    legal = fired(SplitComplex(), program, exact=False)
    assert complex_calls(legal) == ["cumsum"]


def test_complex_inputs_constants_and_outputs_in_onnx(tmp_path: Path) -> None:
    def rotate(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = torch.polar(torch.ones(3, 4), torch.arange(12.0).view(3, 4))
        rotated = torch.view_as_complex(x) * frequencies * z
        return torch.view_as_real(rotated).flatten(1), rotated

    assert_same_in_onnx(traced(rotate, randn(3, 4, 2), Z), tmp_path)


def test_a_constant_of_which_another_is_made_is_folded_too() -> None:
    def scale(x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(4) * 2.5
        return x + steps, x * steps.cos()

    folded = fired(FoldConstants(), traced(scale, randn(3, 4)))
    assert count(folded, aten.cos.default) == count(folded, aten.arange.default) == 0


MIXED_DTYPES = {
    "einsum of positions and frequencies": lambda x, y, _: torch.einsum("ab,cb->acb", x, y),
    "stacked floats": lambda x, y, _: torch.stack([x, y, x], 1),
    "stacked numbers and floats": lambda x, _, i: torch.stack([i, x], -1),
}


@pytest.mark.parametrize("name", MIXED_DTYPES)
def test_operands_of_different_dtypes_are_promoted(name: str, tmp_path: Path) -> None:
    inputs = randn(3, 4), randn(3, 4, seed=1, dtype=torch.float64), torch.arange(12).reshape(3, 4)
    program = traced(MIXED_DTYPES[name], *inputs)
    fired(PromoteOperands(), program)
    assert_same_in_onnx(program, tmp_path)
