"""The ONNX file: one function per pattern as the contract says, equal to torch in onnxruntime, no S x S tensor left."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from t3compile.errors import ExportError
from t3compile.execute import execute
from t3compile.export.attention_forms import ATTENTION_FORMS
from t3compile.export.attention_rule import AttentionForm
from t3compile.inputs import named_inputs
from t3compile.passes.mix_precision import MixPrecision
from t3compile.pipeline import detect, export_onnx, export_onnx_report, rewrite
from t3compile.plan import Plan, make_plan
from t3compile.program import Program, trace
from tests.tiny_models import HandWrittenDiT, tiny_wan

# Views, products and sums that every runtime has; the three spellings of attention come on top.
BODY_OPS = {
    "Add",
    "Concat",
    "Constant",
    "Expand",
    "Mul",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
FORM_OPS: dict[AttentionForm, set[str]] = {
    "attention": {"Attention"},
    "matmul": {"MatMul", "Softmax"},
    "onnxruntime": {"MultiHeadAttention"},
}
# What every attention call of a body has once.
ONE_PER_CALL: dict[AttentionForm, str] = {
    "attention": "Attention",
    "matmul": "Softmax",
    "onnxruntime": "MultiHeadAttention",
}


class JointDiT(nn.Module):
    """Self-attention over [registers, video, text], as joint-attention DiTs have it."""

    def __init__(self, grid: tuple[int, int, int], heads: int = 2, head_dim: int = 8, registers: int = 3) -> None:
        super().__init__()
        dim = heads * head_dim
        self.grid, self.heads, self.extra = grid, heads, registers
        self.patchify = nn.Conv3d(4, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.registers_in, self.text_in = nn.Linear(16, dim), nn.Linear(16, dim)
        self.qkv, self.out, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 16)

    def forward(self, x: Tensor, registers: Tensor, text: Tensor) -> Tensor:
        video = self.patchify(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.registers_in(registers), video, self.text_in(text)], dim=1)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1).transpose(1, 2) for y in self.qkv(tokens).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, scale=0.3)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = self.head(tokens)
        return out

    def example_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        frames, height, width = self.grid
        return torch.randn(2, 4, frames, 2 * height, 2 * width), torch.randn(2, 3, 16), torch.randn(2, 5, 16)


@dataclass(frozen=True)
class Case:
    """A model, the program rewritten with its plan, and fresh inputs."""

    program: Program
    plan: Plan
    rewritten: Program
    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.plan.sites[0].prefix + self.plan.sites[0].grid.tokens + self.plan.sites[0].suffix


def _case(module: nn.Module, args: Any, kwargs: Any, splits: list[tuple[int, int, int]]) -> Case:
    program = trace(module, args, kwargs)
    survey = detect(program)
    plan = make_plan(survey, splits)
    assert len(plan.rewritten) == len(survey.found) > 0
    generator = torch.Generator().manual_seed(7)
    # Not the inputs of the trace: nothing of them may have been folded into the file. A small timestep: the
    # sinusoids of a large one magnify the last bit of a frequency, which every runtime rounds in its own way.
    inputs = {
        name: torch.randn(x.shape, generator=generator) if x.dim() > 1 else x * 0.01
        for name, x in named_inputs(program).items()
    }
    return Case(program, plan, rewrite(program, plan), inputs)


def _dit(grid: tuple[int, int, int], splits: list[tuple[int, int, int]], **options: Any) -> Case:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=len(splits), grid=grid, **options).eval()
    return _case(model, model.example_inputs(), {}, splits)


def _wan(grid: tuple[int, int, int], splits: list[tuple[int, int, int]]) -> Case:
    model, inputs = tiny_wan(len(splits), grid)
    return _case(model, (), inputs, splits)


def _joint() -> Case:
    torch.manual_seed(0)
    model = JointDiT((4, 4, 6)).eval()
    return _case(model, model.example_inputs(), {}, [(2, 2, 2)])


CASES = {
    "dit-even": lambda: _dit((4, 4, 6), [(4, 1, 1), (1, 2, 3), (1, 2, 3)]),
    "wan-prime": lambda: _wan((3, 5, 7), [(1, 2, 1)]),
    "dit-prime-batch-2": lambda: _dit((3, 5, 7), [(2, 1, 1)], batch=2),
    "wan-even": lambda: _wan((2, 4, 6), [(1, 2, 3)]),
    "joint-batch-2": _joint,
}
EXPORTS = [
    *((case, form) for case in ("wan-even", "wan-prime") for form in ATTENTION_FORMS),
    ("dit-prime-batch-2", "attention"),
    ("dit-even", "attention"),
    ("joint-batch-2", "attention"),
]


@pytest.fixture(scope="module")
def cases() -> Mapping[str, Case]:
    made: dict[str, Case] = {}

    class OnDemand(dict[str, Case]):
        def __missing__(self, name: str) -> Case:
            self[name] = made[name] = CASES[name]()
            return made[name]

    return OnDemand()


@dataclass(frozen=True)
class Exported:
    case: Case
    form: AttentionForm
    path: Path
    model: onnx.ModelProto
    inlined: onnx.ModelProto

    @property
    def call_counts(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph.node if node.domain == "t3")


Export = Callable[[str, AttentionForm], Exported]


@pytest.fixture(scope="module")
def export(cases: Mapping[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Every combination is exported once."""

    @functools.cache
    def make(name: str, form: AttentionForm) -> Exported:
        path = tmp_path_factory.mktemp("exported") / "model.onnx"
        report = export_onnx_report(cases[name].rewritten, path, form=form, check=False)
        assert report.comparison is None
        assert report.not_compared == "switched off"
        model = onnx.load(path)
        return Exported(cases[name], form, path, model, _inferred(onnx.inliner.inline_local_functions(model)))

    return make


@pytest.fixture(scope="module", params=EXPORTS, ids="-".join)
def exported(request: pytest.FixtureRequest, export: Export) -> Exported:
    return export(*request.param)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def _run(path: Path, inputs: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    result: np.ndarray[Any, Any] = output
    return result


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    values = [*model.graph.value_info, *model.graph.output, *model.graph.input]
    shapes = {
        value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _score_shapes(model: onnx.ModelProto, tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Node kind and [batch and heads ..., queries, keys] of every attention of the graph."""
    shapes = _shapes(model)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            yield node.op_type, shapes[node.output[0]]
        elif node.op_type == "Attention":
            q, k = (shapes[name] for name in node.input[:2])
            yield node.op_type, (*q[:-1], k[-2])
        elif node.op_type == "MultiHeadAttention":
            q, k = (shapes[name] for name in node.input[:2])
            (heads,) = (attribute.i for attribute in node.attribute if attribute.name == "num_heads")
            yield node.op_type, (q[0], heads, q[1], k[1])


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _assert_as_good_as_torch(ours: np.ndarray[Any, Any], plain: Tensor, exact: Tensor) -> None:
    """At most twice torch's own error against float64, plus one rounding step (STYLE.md, 13)."""
    torch_error = float((plain.double() - exact).abs().max())
    rounding = torch.finfo(plain.dtype).eps * float(exact.abs().max())
    error = float((torch.from_numpy(ours).double() - exact).abs().max())
    assert torch_error < 1e-4 * float(exact.abs().max())
    assert error <= 2 * torch_error + rounding


def test_onnxruntime_equals_torch(exported: Exported) -> None:
    case = exported.case
    (exact,) = execute(case.rewritten, case.inputs, float64=True)
    (plain,) = execute(case.rewritten, case.inputs)
    ours = _run(exported.path, case.inputs)
    _assert_as_good_as_torch(ours, plain, exact)
    (dense,) = execute(case.program, case.inputs)
    assert float((torch.from_numpy(ours) - dense).abs().max()) > 1e-3 * float(dense.abs().max())


def test_checker_passes_and_the_file_is_opset_23_with_external_weights(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.path), full_check=True)
    imports = {entry.domain: entry.version for entry in exported.model.opset_import}
    needed = {"": 23, "t3": 1} | ({"com.microsoft": 1} if exported.form == "onnxruntime" else {})
    assert imports == needed
    on_disk = onnx.load(exported.path, load_external_data=False)
    large = [tensor for tensor in on_disk.graph.initializer if _elements(tuple(tensor.dims)) > 256]
    assert large
    for tensor in large:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "model.onnx.data"
    assert sorted(file.name for file in exported.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    parameters = sum(x.numel() for x in exported.case.program.exported.parameters())
    assert exported.path.with_name("model.onnx.data").stat().st_size <= 4 * parameters + 64 * 1024


def test_input_and_output_signature_is_the_models(exported: Exported) -> None:
    graph = exported.model.graph
    given = {
        value.name: (
            tuple(size.dim_value for size in value.type.tensor_type.shape.dim),
            value.type.tensor_type.elem_type,
        )
        for value in graph.input
    }
    float32 = onnx.TensorProto.FLOAT
    assert given == {name: (tuple(x.shape), float32) for name, x in exported.case.inputs.items()}
    assert [value.name for value in graph.output] == ["output"]


def test_nodes_and_functions_keep_the_contract(exported: Exported) -> None:
    functions = {function.name: function for function in exported.model.functions}
    assert {function.domain for function in functions.values()} == {"t3"}
    assert all(re.fullmatch(r"WindowAttention_[0-9a-f]{10}", name) for name in functions)
    assert not any(function.attribute or function.attribute_proto for function in functions.values())
    assert set(exported.call_counts) == set(functions)
    for node in exported.model.graph.node:
        if node.domain == "t3":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {"plugin_namespace": b"t3", "aot": 1}
            assert len(node.input) == 3


def test_one_function_per_distinct_pattern(exported: Exported) -> None:
    expected = Counter(site.pattern for site in exported.case.plan.sites)
    assert sorted(exported.call_counts.values()) == sorted(expected.values())


def test_bodies_use_allowed_operators_and_at_most_eight_axes(exported: Exported) -> None:
    for function in exported.model.functions:
        used = {node.op_type for node in function.node}
        assert used <= BODY_OPS | FORM_OPS[exported.form]
        assert used >= FORM_OPS[exported.form]
        domains = {node.domain for node in function.node if node.op_type != "MultiHeadAttention"}
        assert domains == {""}
    assert not {node.op_type for node in exported.inlined.graph.node} & {"ScatterND", "ScatterElements", "Loop", "If"}
    shapes = _shapes(exported.inlined)
    assert max(len(shape) for shape in shapes.values()) <= 8


def test_no_dense_scores_are_left(exported: Exported) -> None:
    """The scores of the inlined graph are exactly those that the plan counts, and no tensor is S x S."""
    case, tokens = exported.case, exported.case.tokens
    shapes = _shapes(exported.inlined)
    unknown = [
        name
        for node in exported.inlined.graph.node
        if node.op_type != "MultiHeadAttention"
        for name in node.output
        if name and (name not in shapes or 0 in shapes[name])
    ]
    assert not unknown
    assert not [name for name, shape in shapes.items() if shape.count(tokens) > 1]
    scores = [shape for _, shape in _score_shapes(exported.inlined, tokens)]
    assert not [shape for shape in scores if shape[-1] >= tokens and shape[-2] >= tokens]
    site = detect(case.program).found[0]
    planned = 0
    for planned_site in case.plan.sites:
        assert planned_site.pattern is not None
        branches = len(planned_site.pattern.computed_branches(site.grid))
        # Grid queries see their window and the global tokens; global queries see everything.
        pairs = planned_site.pattern.pairs(site.grid) + branches * site.grid.tokens * site.extra_tokens
        planned += (pairs + site.extra_tokens * site.tokens) * site.heads * site.batch
    text = sum(call.batch * call.heads * call.query_tokens * call.key_tokens for call in detect(case.program).declined)
    assert sum(map(_elements, scores)) == planned + text


def test_the_unrewritten_export_has_dense_attention(cases: Mapping[str, Case], tmp_path: Path) -> None:
    """So that the test above can fail."""
    case = cases["wan-even"]
    report = export_onnx_report(case.program, tmp_path / "full.onnx")
    assert report.comparison is not None
    (check,) = report.comparison
    assert 0 < check.error <= check.allowed < 1e-4 * check.magnitude
    assert report.to_json()["comparison"]["passed"] is True
    model = _inferred(onnx.load(tmp_path / "full.onnx"))
    assert not model.functions
    dense = [shape for _, shape in _score_shapes(model, case.tokens) if shape[-2:] == (case.tokens, case.tokens)]
    assert len(dense) == len(case.plan.sites)
    _assert_as_good_as_torch(
        _run(tmp_path / "full.onnx", case.inputs),
        execute(case.program, case.inputs)[0],
        execute(case.program, case.inputs, float64=True)[0],
    )


def test_coinciding_branches_are_computed_once(exported: Exported) -> None:
    attention = ONE_PER_CALL[exported.form]
    by_calls = {function.name: Counter(node.op_type for node in function.node) for function in exported.model.functions}
    one_branch = [ops for ops in by_calls.values() if not ops["Add"]]
    merged = {
        site.pattern
        for site in exported.case.plan.rewritten
        if site.pattern is not None and len(site.pattern.computed_branches(site.grid)) == 1
    }
    assert len(one_branch) == len(merged)
    assert all(ops[attention] == 1 and ops["Mul"] == (exported.form == "matmul") for ops in one_branch)


def test_one_attention_serves_both_branches_where_windows_are_equal(exported: Exported) -> None:
    attention = ONE_PER_CALL[exported.form]
    for site in exported.case.plan.rewritten:
        assert site.pattern is not None
        if not site.pattern.splits.divide(site.grid) or site.prefix or site.suffix:
            continue
        ops = [Counter(node.op_type for node in function.node) for function in exported.model.functions]
        assert any(counts[attention] == 1 for counts in ops)


@pytest.mark.parametrize("name", ["joint-batch-2", "dit-prime-batch-2"])
def test_inline_writes_no_function_and_gives_identical_output(
    name: str, cases: Mapping[str, Case], export: Export, tmp_path: Path
) -> None:
    case, with_functions = cases[name], export(name, "attention")
    paths = [with_functions.path, tmp_path / "inline.onnx"]
    report = export_onnx_report(case.rewritten, paths[1], inline=True, check=False)
    assert set(report.functions) == set(with_functions.call_counts)
    model = onnx.load(paths[1])
    assert not model.functions
    assert not [node for node in model.graph.node if node.domain == "t3"]
    onnx.checker.check_model(str(paths[1]), full_check=True)
    assert np.array_equal(_run(paths[0], case.inputs), _run(paths[1], case.inputs))


def test_float16_keeps_the_signature_and_errs_as_torch_in_half(cases: Mapping[str, Case], tmp_path: Path) -> None:
    case, path = cases["wan-even"], tmp_path / "half.onnx"
    report = export_onnx_report(case.rewritten, path, precision="float16", check=True)
    assert report.comparison is not None
    assert report.passed
    model = onnx.load(path)
    float32, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert {v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]} == {float32}
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    in_half = [tensor for tensor in matrices if tensor.data_type == half]
    assert len(in_half) > len(matrices) / 2
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:
        if node.domain == "t3":
            assert {types[name] for name in node.input} == {half}
    # Against the float32 program in float64, rounding of the weights included.
    (exact,) = execute(case.rewritten, case.inputs, float64=True)
    (plain,) = execute(MixPrecision("float16")(case.rewritten).program, case.inputs)
    torch_error = float((plain.double() - exact).abs().max())
    error = float((torch.from_numpy(_run(path, case.inputs)).double() - exact).abs().max())
    single = float((execute(case.rewritten, case.inputs)[0].double() - exact).abs().max())
    assert 10 * single < error <= 2 * torch_error + torch.finfo(torch.float16).eps * float(exact.abs().max())
    assert torch_error < 2e-2 * float(exact.abs().max())


def test_the_plan_travels_in_the_file(exported: Exported) -> None:
    (text,) = (entry.value for entry in exported.model.metadata_props if entry.key == "t3compile_plan")
    assert Plan.loads(text) == exported.case.plan


def test_float32_of_a_bfloat16_trace_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    program = trace(model, (torch.randn(2, 4, dtype=torch.bfloat16),))
    for precision in ("float32", "float16"):
        with pytest.raises(ExportError, match=r"traced in bfloat16.*--dtype float32"):
            export_onnx(program, tmp_path / "x.onnx", precision=precision)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_file(
    cases: Mapping[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("made to fail")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    small = trace(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(ExportError, match="made to fail"):
        export_onnx(small, path, check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_a_key_padding_mask_runs_in_onnxruntime(tmp_path: Path) -> None:
    """Its query axis has one position, which onnxruntime's Attention does not broadcast."""

    class Cross(nn.Module):
        def forward(self, q: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, text, text, mask)

    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, float("-inf"))
    program = trace(Cross(), (torch.randn(2, 3, 12, 8), torch.randn(2, 3, 7, 8), mask))
    report = export_onnx_report(program, tmp_path / "cross.onnx")
    assert report.comparison is not None
    assert report.passed


def test_bfloat16_is_written_and_said_not_to_be_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = trace(nn.Conv1d(2, 2, 3).to(torch.bfloat16), (torch.randn(1, 2, 8, dtype=torch.bfloat16),))
    report = export_onnx_report(program, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").is_file()
    assert report.comparison is None
    assert "NOT_IMPLEMENTED" in report.not_compared
