"""Graphs written for onnxruntime's CPU kernels: attention by the measured rule, no needless copies, equal to torch."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from t3compile.execute import execute
from t3compile.export import gather_transposes
from t3compile.export.attention_forms import count_attention, spell_attention
from t3compile.export.attention_rule import (
    LEEWAY,
    MOST_SCORE_BYTES,
    RULE,
    FormBound,
    choose_form,
    derive_rule,
)
from t3compile.export.fit_onnxruntime import DropWholeSlices, SpellGelu
from t3compile.export.fuse_rotary import FuseRotary
from t3compile.export.gather_transposes import GatherTransposes
from t3compile.export.graph_values import sizes_of
from t3compile.export.merge_transposes import MAX_AXES, MergeTransposes
from t3compile.export.split_branches import SplitBranches
from t3compile.inputs import named_inputs
from t3compile.pipeline import detect, export_onnx_report, rewrite
from t3compile.plan import make_plan
from t3compile.program import Program, trace
from tests import bench_onnxruntime
from tests.bench_onnxruntime import attention_model, measure_memory, memory_table, rule_of, table, time_forms
from tests.test_runtimes import MIDDLE_BYTES, save_large_middle
from tests.tiny_models import tiny_wan

FLOAT = ir.DataType.FLOAT
GRID = (2, 4, 6)


class Build:
    """A float32 graph, node by node; shapes of values are given by whoever adds them."""

    def __init__(self, **inputs: Sequence[int]) -> None:
        self.inputs = [
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT)) for name, shape in inputs.items()
        ]
        self.graph = ir.Graph(self.inputs, [], nodes=[], name="graph", opset_imports={"": 23, "com.microsoft": 1})

    def add(self, op_type: str, values: Sequence[ir.Value], shape: Sequence[int], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, values, attributes)
        node.name = f"n{len(self.graph)}"
        out = node.outputs[0]
        out.name, out.shape, out.type = f"value{len(self.graph)}", ir.Shape(shape), ir.TensorType(FLOAT)
        self.graph.append(node)
        return out

    def constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array))
        name = f"c{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self.add("Reshape", [value, self.constant(np.array(shape, dtype=np.int64))], shape)

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        assert value.shape is not None
        return self.add("Transpose", [value], [int(str(value.shape[axis])) for axis in perm], perm=list(perm))

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def _run(model: ir.Model, **inputs: Any) -> list[Any]:
    text = ir.serde.serialize_model(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def _random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_transposes_around_a_window_function_become_one() -> None:
    """[B, S, N, D] -> heads first -> windows of a (1, 3, 2) split: one Transpose of the source."""
    build = Build(x=(1, 60, 3, 4))
    heads = build.transpose(build.inputs[0], (0, 2, 1, 3))
    cut = build.reshape(heads, (3, 1, 2, 3, 5, 1, 2, 4))
    windows = build.reshape(build.transpose(cut, (0, 1, 3, 5, 2, 4, 6, 7)), (3 * 3, 2 * 5 * 2, 4))
    model = build.model(windows)
    x = _random(1, 60, 3, 4)
    before = _run(model, x=x)
    assert MergeTransposes()(model).modified
    assert _ops(model)["Transpose"] == 1
    assert np.array_equal(_run(model, x=x)[0], before[0])
    assert not MergeTransposes()(model).modified


def test_a_transpose_of_unit_axes_becomes_a_reshape() -> None:
    """As the windows of (T, 1, 1) splits: nothing moves, and onnxruntime would copy."""
    build = Build(x=(12, 20, 4))
    cut = build.reshape(build.inputs[0], (12, 5, 1, 1, 2, 1, 2, 4))
    model = build.model(build.reshape(build.transpose(cut, (0, 1, 3, 5, 2, 4, 6, 7)), (60, 4, 4)))
    x = _random(12, 20, 4)
    before = _run(model, x=x)
    MergeTransposes()(model)
    assert _ops(model) == {"Reshape": 1}
    assert np.array_equal(_run(model, x=x)[0], before[0])


def test_transposes_that_cancel_leave_the_source() -> None:
    build = Build(x=(2, 3, 4))
    back = build.transpose(build.transpose(build.inputs[0], (2, 0, 1)), (1, 2, 0))
    model = build.model(build.add("Neg", [back], (2, 3, 4)))
    MergeTransposes()(model)
    assert _ops(model) == {"Neg": 1}


@pytest.mark.parametrize("seed", range(8))
def test_random_chains_of_views_keep_their_values(seed: int) -> None:
    generator = np.random.default_rng(seed)
    build = Build(x=(4, 6, 10))
    value, used = build.inputs[0], []
    factors = [2, 2, 2, 3, 2, 5]
    for _ in range(6):
        shape = [int(str(size)) for size in value.shape or ()]
        if generator.random() < 0.5:
            value = build.transpose(value, [int(axis) for axis in generator.permutation(len(shape))])
        else:
            ends = np.sort(generator.choice(np.arange(1, 6), size=int(generator.integers(0, 5)), replace=False))
            parts = np.split(generator.permutation(factors), ends)
            value = build.reshape(value, [int(np.prod(part)) for part in parts])
        if generator.random() < 0.3:
            used.append(build.add("Neg", [value], [int(str(size)) for size in value.shape or ()]))
    model = build.model(*used, build.add("Neg", [value], [int(str(size)) for size in value.shape or ()]))
    x = _random(4, 6, 10, seed=seed)
    before, transposes = _run(model, x=x), _ops(model)["Transpose"]
    MergeTransposes()(model)
    assert _ops(model)["Transpose"] <= transposes
    for ours, theirs in zip(_run(model, x=x), before, strict=True):
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)


def _negated(build: Build, value: ir.Value) -> ir.Value:
    assert value.shape is not None
    return build.add("Neg", [value], [int(str(size)) for size in value.shape])


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_transposes, "FEWEST_BYTES", 1)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("seed", range(8))
def test_a_gather_moves_what_the_transpose_did(seed: int) -> None:
    """Leading and trailing axes stay or move, in any order of those between."""
    generator = np.random.default_rng(seed)
    shape = [int(size) for size in generator.integers(1, 5, size=5)] + [16]
    perm = [int(axis) for axis in generator.permutation(4)]
    perm = [0, *(axis + 1 for axis in perm), 5] if seed % 2 else [*perm, 4, 5]
    build = Build(x=shape)
    model = build.model(_negated(build, build.transpose(build.inputs[0], perm)))
    x = _random(*shape, seed=seed)
    moves = [axis for axis in range(6) if perm[axis] != axis]
    assert GatherTransposes()(model).modified == bool(moves)
    assert _ops(model)["Transpose"] == (0 if moves else 1)
    assert np.array_equal(_run(model, x=x)[0], -x.transpose(perm))
    if moves:
        (places,) = model.graph.initializers.values()
        assert sizes_of(places) == (np.prod(shape[moves[0] : moves[-1] + 1]),)


@pytest.mark.usefixtures("everything_is_large")
def test_equal_transposes_share_their_places() -> None:
    build = Build(x=(4, 6, 16), y=(4, 6, 2, 8))
    orders = ((1, 0, 2), (1, 0, 2, 3))
    model = build.model(
        *(_negated(build, build.transpose(x, perm)) for x, perm in zip(build.inputs, orders, strict=True))
    )
    x, y = _random(4, 6, 16), _random(4, 6, 2, 8, seed=1)
    GatherTransposes()(model)
    assert _ops(model)["Gather"] == 2
    assert len(model.graph.initializers) == 1
    ours = _run(model, x=x, y=y)
    assert np.array_equal(ours[0], -x.transpose(1, 0, 2))
    assert np.array_equal(ours[1], -y.transpose(1, 0, 2, 3))


@pytest.mark.usefixtures("everything_is_large")
def test_tensors_of_one_size_are_gathered_in_one_shape() -> None:
    """Whole rows of 2 x 16 move in one, single heads of 16 in the other: onnxruntime reuses memory of equal shapes."""
    build = Build(x=(4, 6, 32), y=(4, 6, 2, 16))
    rows, heads = build.transpose(build.inputs[0], (1, 0, 2)), build.transpose(build.inputs[1], (2, 0, 1, 3))
    model = build.model(_negated(build, rows), _negated(build, heads))
    x, y = _random(4, 6, 32), _random(4, 6, 2, 16, seed=1)
    GatherTransposes()(model)
    assert [sizes_of(node.outputs[0]) for node in model.graph if node.op_type == "Gather"] == [(1, 48, 16)] * 2
    ours = _run(model, x=x, y=y)
    assert np.array_equal(ours[0], -x.transpose(1, 0, 2))
    assert np.array_equal(ours[1], -y.transpose(2, 0, 1, 3))


@pytest.mark.usefixtures("everything_is_large")
def test_a_gather_behind_merged_views_has_names_of_its_own() -> None:
    """Heads first, then back behind the rows: what is left of both Transposes is one without a view behind it."""
    build = Build(x=(30, 3, 16))
    rows = build.reshape(build.transpose(build.inputs[0], (1, 0, 2)), (3, 5, 6, 16))
    model = build.model(_negated(build, build.transpose(rows, (1, 0, 2, 3))))
    x = _random(30, 3, 16)
    before = _run(model, x=x)
    MergeTransposes()(model)
    assert GatherTransposes()(model).modified
    onnx.checker.check_model(ir.serde.serialize_model(model))
    assert np.array_equal(_run(model, x=x)[0], before[0])


@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((512, 31, 16), (1, 0, 2)),  # below a MiB
        ((512, 64, 16), (0, 2, 1)),  # single elements move
        ((512, 64, 8, 2), (1, 0, 3, 2)),
        ((2048, 32, 8), (1, 0, 2)),  # pieces of 32 bytes
        ((512, 64, 16), (0, 1, 2)),
    ],
)
def test_transposes_that_a_gather_would_not_speed_up_stay(shape: tuple[int, ...], perm: tuple[int, ...]) -> None:
    build = Build(x=shape)
    model = build.model(_negated(build, build.transpose(build.inputs[0], perm)))
    assert not GatherTransposes()(model).modified
    assert _ops(model)["Transpose"] == 1


def test_a_transpose_that_is_a_graph_output_stays() -> None:
    build = Build(x=(512, 64, 16))
    assert not GatherTransposes()(build.model(build.transpose(build.inputs[0], (1, 0, 2)))).modified


def test_a_table_of_places_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_gathered(most_bytes: int) -> bool:
        monkeypatch.setattr(gather_transposes, "MOST_TABLE_BYTES", most_bytes)
        build = Build(x=(512, 64, 16))
        return GatherTransposes()(build.model(_negated(build, build.transpose(build.inputs[0], (1, 0, 2))))).modified

    assert is_gathered(4 * 512 * 64)
    assert not is_gathered(4 * 512 * 64 - 1)


def test_a_view_that_cuts_across_factors_is_left_alone() -> None:
    build = Build(x=(4, 6))
    turned = build.reshape(build.transpose(build.inputs[0], (1, 0)), (8, 3))
    model = build.model(build.transpose(turned, (1, 0)))
    x = _random(4, 6)
    before = _run(model, x=x)
    MergeTransposes()(model)
    assert _ops(model)["Transpose"] == 2
    assert np.array_equal(_run(model, x=x)[0], before[0])


def _branches(parts: int, taken: Sequence[tuple[int, int]]) -> ir.Model:
    """Attention over stacked parts [6, 5, 4] each, of which slices take some."""
    names = [f"{name}{i}" for name in "qkv" for i in range(2)]
    build = Build(**dict.fromkeys(names, (6, 5, 4)))
    stacked = [build.add("Concat", build.inputs[i : i + 2], (12, 5, 4), axis=0) for i in (0, 2, 4)]
    folded = [build.reshape(value, (parts, 12 // parts, 5, 4)) for value in stacked]
    out = build.add("Attention", folded, (parts, 12 // parts, 5, 4))
    sliced = []
    for start, end in taken:
        bounds = [build.constant(np.array([number], dtype=np.int64)) for number in (start, end, 0)]
        sliced.append(build.add("Slice", [out, *bounds], (end - start, 12 // parts, 5, 4)))
    return build.model(*sliced)


def test_stacked_branches_become_calls_of_their_own() -> None:
    model = _branches(2, [(0, 1), (1, 2)])
    inputs = {value.name: _random(6, 5, 4, seed=i) for i, value in enumerate(model.graph.inputs)}
    before = _run(model, **inputs)
    assert SplitBranches()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert _ops(model) == {"Reshape": 6, "Attention": 2}
    for ours, theirs in zip(_run(model, **inputs), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not SplitBranches()(model).modified


@pytest.mark.parametrize(("parts", "taken"), [(3, [(0, 1)]), (2, [(0, 2)])])
def test_branches_stay_stacked_where_parts_and_elements_differ(parts: int, taken: list[tuple[int, int]]) -> None:
    model = _branches(parts, taken)
    assert not SplitBranches()(model).modified


def _rotation(tokens_axis: int, swapped: bool = False, crossed: bool = False) -> ir.Model:
    """x [2, 5, 3, 8, 2] rotated by tables over axis 1, or 2 where heads come first."""
    build = Build(x=(2, 5, 3, 8, 2))
    table_shape = [1, 1, 1, 8]
    table_shape[tokens_axis] = (2, 5, 3)[tokens_axis]
    angles = _random(*table_shape)
    cos, sin = build.constant(np.cos(angles)), build.constant(np.sin(angles))
    pair = []
    for i in range(2):
        bounds = [build.constant(np.array([number], dtype=np.int64)) for number in (i, i + 1, 4)]
        pair.append(
            build.add(
                "Squeeze",
                [build.add("Slice", [build.inputs[0], *bounds], (2, 5, 3, 8, 1)), bounds[2]],
                (2, 5, 3, 8),
            )
        )
    a, b = pair

    def times(x: ir.Value, y: ir.Value) -> ir.Value:
        return build.add("Mul", [y, x] if swapped else [x, y], (2, 5, 3, 8))

    real = build.add("Sub", [times(a, cos), times(b, sin)], (2, 5, 3, 8))
    plus = [times(a, sin), times(b, cos)] if not crossed else [times(b, sin), times(a, cos)]
    imaginary = build.add("Add", plus, (2, 5, 3, 8))
    axis = build.constant(np.array([-1], dtype=np.int64))
    columns = [build.add("Unsqueeze", [part, axis], (2, 5, 3, 8, 1)) for part in (real, imaginary)]
    return build.model(build.add("Concat", columns, (2, 5, 3, 8, 2), axis=-1))


@pytest.mark.parametrize(("tokens_axis", "swapped"), [(1, False), (1, True), (2, False)])
def test_rotary_embedding_is_one_operator(tokens_axis: int, swapped: bool) -> None:
    model = _rotation(tokens_axis, swapped)
    x = _random(2, 5, 3, 8, 2)
    before = _run(model, x=x)
    assert FuseRotary()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert set(_ops(model)) == {"Reshape", "RotaryEmbedding"}
    (ours,) = _run(model, x=x)
    # One rounding step of sums of two products of numbers up to magnitude 4.
    assert float(np.abs(ours - before[0]).max()) <= 4 * 2 * np.finfo(np.float32).eps


def test_no_rotary_embedding_where_the_rotation_is_none() -> None:
    assert not FuseRotary()(_rotation(1, crossed=True)).modified
    assert not FuseRotary()(_rotation(0)).modified


def test_whole_slices_go_and_gelu_takes_the_faster_kernel() -> None:
    build = Build(x=(3, 40))
    bounds = [build.constant(np.array([number], dtype=np.int64)) for number in (0, 3, 0)]
    whole = build.add("Slice", [build.inputs[0], *bounds], (3, 40))
    part = build.add("Slice", [whole, bounds[0], build.constant(np.array([2])), bounds[2]], (2, 40))
    gelus = [build.add("Gelu", [part], (2, 40), approximate=kind) for kind in ("tanh", "none")]
    model = build.model(*gelus)
    x = _random(3, 40)
    before = _run(model, x=x)
    assert DropWholeSlices()(model).modified
    assert SpellGelu()(model).modified
    assert _ops(model) == {"Slice": 1, "FastGelu": 1, "Gelu": 1}
    for ours, theirs in zip(_run(model, x=x), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("bound", RULE)
def test_the_rule_decides_by_tokens_and_never_holds_large_scores(bound: FormBound) -> None:
    dim, tokens = bound.head_dim, bound.tokens
    assert choose_form(4, tokens, tokens, dim) == "onnxruntime"
    assert choose_form(4, tokens - 1, tokens, dim) == choose_form(4, tokens, tokens - 1, dim) == "attention"
    most = MOST_SCORE_BYTES // 4 // 64**2
    assert choose_form(most, 64, 64, dim) == "attention"
    assert choose_form(most + 1, 64, 64, dim) == "onnxruntime"


def test_heads_larger_than_measured_are_taken_like_the_largest() -> None:
    assert choose_form(4, RULE[-1].tokens, RULE[-1].tokens, 256) == "onnxruntime"


def test_the_rule_follows_from_times() -> None:
    slow, equal = {"attention": 1.0, "matmul": 2.0, "onnxruntime": 1.2}, {"attention": 1.0, "onnxruntime": LEEWAY}
    times: dict[tuple[int, int], Any] = {(64, 128): equal, (64, 256): slow, (64, 512): equal, (64, 1024): equal}
    times |= {(128, 256): slow, (128, 512): slow}
    assert derive_rule(times) == (FormBound(64, 512), FormBound(128, 513))


def test_the_measurement_runs_and_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_onnxruntime, "_FLOP", 1e6)
    ticks = itertools.count()
    timing = time_forms(16, 8, 8, 1, clock=lambda: float(next(ticks)))
    assert timing.seconds == {"attention": 1.0, "matmul": 1.0, "onnxruntime": 1.0}
    assert rule_of([timing]) == (FormBound(16, 8),)
    assert f"| 16 | {timing.windows} x 8 x 8 |" in table([timing])


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_measurement_of_memory_tells_what_is_kept(tmp_path: Path) -> None:
    path = save_large_middle(tmp_path / "large.onnx")
    kept = {setting: measure_memory(path, setting, 3) for setting in ("none kept", "kept")}
    assert [len(one.seconds) for one in kept.values()] == [3, 3]
    assert kept["none kept"].held_bytes < 0.5 * MIDDLE_BYTES < 0.9 * MIDDLE_BYTES < kept["kept"].held_bytes
    assert all(one.added_bytes > 0.9 * MIDDLE_BYTES for one in kept.values())
    assert "| large | kept |" in memory_table({("large", setting): one for setting, one in kept.items()})


@pytest.mark.parametrize("form", ["attention", "matmul", "onnxruntime"])
def test_measured_forms_compute_attention(form: Any) -> None:
    model = attention_model(form, 3, 5, 7, 8)
    q, k, v = _random(1, 3, 5, 8), _random(1, 3, 7, 8, seed=1), _random(1, 3, 7, 8, seed=2)
    (ours,) = _run(model, q=q, k=k, v=v)
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(ours, weights / weights.sum(-1, keepdims=True) @ v, rtol=1e-5, atol=1e-5)


def test_only_plain_attention_is_respelled() -> None:
    build = Build(q=(1, 4, 5, 8), k=(1, 2, 5, 8), v=(1, 2, 5, 8))
    model = build.model(build.add("Attention", build.inputs, (1, 4, 5, 8)))
    assert spell_attention(model.graph, "onnxruntime") == {"attention": 1}
    assert count_attention(model) == {"Attention": 1}


@pytest.fixture(scope="module")
def wan() -> Program:
    model, inputs = tiny_wan(2, GRID, head_dim=16)
    program = trace(model, (), inputs)
    return rewrite(program, make_plan(detect(program), [(1, 2, 3), (2, 1, 1)]))


def _inputs(program: Program) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(x.shape, generator=generator) if x.dim() > 1 else x * 0.01
        for name, x in named_inputs(program).items()
    }


def _assert_equals_torch(path: Path, program: Program) -> None:
    """At most twice torch's own error against float64, plus one rounding step."""
    inputs = _inputs(program)
    (exact,), (plain,) = execute(program, inputs, float64=True), execute(program, inputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + rounding
    assert float((torch.from_numpy(ours).double() - exact).abs().max()) <= allowed


def test_auto_writes_one_flat_graph_without_needless_copies(
    wan: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 8 tokens stay Attention, windows of 24 become MultiHeadAttention under a rule for this size."""
    rule = (FormBound(16, 24),)
    monkeypatch.setattr(choose_form, "__defaults__", (rule,))
    path = tmp_path / "auto.onnx"
    report = export_onnx_report(wan, path, form="auto", check=False)
    model = ir.load(path)
    assert not model.functions
    ops = _ops(model)
    # Two branches, one for (2, 1, 1), and two calls over text.
    assert report.attention == {"Attention": 4, "MultiHeadAttention": 1}
    assert ops["RotaryEmbedding"] == 4
    assert ops["FastGelu"] == 3
    assert not ops["Gelu"]
    # q, k, v and the output per attention call, a patch's way in and out; nothing is stacked but the sinusoids.
    assert ops["Transpose"] == 4 * 5 + 2
    assert ops["Concat"] == 2
    tokens = GRID[0] * GRID[1] * GRID[2]
    shapes = [node.outputs[0].shape for node in model.graph if node.outputs[0].shape is not None]
    assert not [shape for shape in shapes if [int(str(size)) for size in shape].count(tokens) > 1]
    assert max(len(shape) for shape in shapes) <= MAX_AXES
    # The tables of positions are constants, or views of them.
    for node in model.graph:
        if node.op_type == "RotaryEmbedding":
            tables = [value.producer() for value in node.inputs[2:]]
            assert all(view is not None and view.inputs[0].name in model.graph.initializers for view in tables)
    _assert_equals_torch(path, wan)


def test_onnxruntime_form_takes_full_attention_too(wan: Program, tmp_path: Path) -> None:
    path = tmp_path / "ort.onnx"
    report = export_onnx_report(wan, path, form="onnxruntime", check=False)
    assert report.attention == {"MultiHeadAttention": 4}
    assert len(ir.load(path).functions) == 2
    _assert_equals_torch(path, wan)


def test_the_default_form_stays_portable(wan: Program, tmp_path: Path) -> None:
    report = export_onnx_report(wan, tmp_path / "plain.onnx", check=False)
    model = ir.load(tmp_path / "plain.onnx")
    assert report.attention == {"Attention": 4}
    assert {node.domain for function in model.functions.values() for node in function} == {""}
    assert {node.domain for node in model.graph} == {"", "t3"}
