"""The stages in order, behind the public functions: load or trace, detect, plan, rewrite, verify, export, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from t3compile.errors import ExportError, MissingKernelError, T3CompileError
from t3compile.files import check_space, check_writable
from t3compile.geometry import GridHint, Splits, TokenGrid
from t3compile.inputs import named_inputs, substitute_inputs
from t3compile.loading import load_program as load_as_spelled
from t3compile.macs import graph_macs
from t3compile.ops import WINDOW_ATTENTION
from t3compile.passes.broadcast_masks import BroadcastMasks
from t3compile.passes.canonicalization import canonicalize
from t3compile.passes.expand_attention import ExpandAttention
from t3compile.passes.find_attention import find_attention
from t3compile.passes.fold_constants import FoldConstants
from t3compile.passes.fold_factorizations import FoldFactorizations
from t3compile.passes.forward_copies import ForwardCopies
from t3compile.passes.graph_pass import GraphPass, apply_passes
from t3compile.passes.interleave_slices import InterleaveSlices
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.passes.lower_window_attention import LowerWindowAttention
from t3compile.passes.mix_precision import MixPrecision
from t3compile.passes.promote_operands import PromoteOperands
from t3compile.passes.rewrite_attention import RewriteAttention
from t3compile.passes.search_by_counting import SearchByCounting
from t3compile.passes.select_booleans import SelectBooleans
from t3compile.passes.settle_strides import SettleStrides
from t3compile.passes.sort_plainly import SortPlainly
from t3compile.passes.spell_flex_attention import SpellFlexAttention
from t3compile.passes.split_complex import SplitComplex
from t3compile.passes.squeeze_unit_axes import SqueezeUnitAxes
from t3compile.pattern import WindowPattern
from t3compile.plan import Plan, SitePlan
from t3compile.probing import SiteProbe
from t3compile.probing import probe as probe_layouts
from t3compile.program import Program
from t3compile.progress import SILENT, Progress
from t3compile.sites import GridAxis, SiteSurvey
from t3compile.tracing import trace as trace_as_spelled
from t3compile.verification import (
    PATTERN_PAIRS,
    Check,
    VerifyReport,
    affordable,
    check_graph,
    check_identity,
    check_pattern,
    check_rewritten,
    check_weights,
    compared_bytes,
    identity_work,
    pattern_work,
    rewritten_work,
)
from t3compile.weights import Weights

if TYPE_CHECKING:
    from t3compile.export.compare_engine import Distance
    from t3compile.export.engine_inputs import Engine
    from t3compile.export.rounded_weights import Rounding
    from t3compile.export.store_weights import WeightStorage
    from t3compile.export.write_onnx import WrittenOnnx

# Above this many MACs the whole-model check, some ten dense passes, runs on a small grid ...
DIRECT_MACS = 5 * 10**10
# ... unless there is none: a saved graph has one size, and is worth a longer check.
SAVED_DIRECT_MACS = 5 * 10**11
SMALL_GRID = TokenGrid(3, 6, 7)
# Above this many a pass, the check on the small grid is only run where it is asked for.
SMALL_GRID_MACS = 5 * 10**11

ONNX_LEGALIZATION: tuple[GraphPass, ...] = (
    SpellFlexAttention(),  # first: its masks may be constants to fold
    FoldConstants(),  # early: most of what ONNX cannot say makes tables, which are values once folded
    FoldFactorizations(),  # ONNX has none; those of weights are values too
    SqueezeUnitAxes(),  # torch forgives squeezing a longer axis, ONNX does not
    PromoteOperands(),  # before the passes that take stacks apart: ONNX promotes nothing
    SelectBooleans(),  # onnxruntime chooses between numbers only
    SortPlainly(),  # the exporter refuses the stable overload; every ONNX sort is stable
    SearchByCounting(),  # ONNX has no search
    SplitComplex(),  # before the layout passes: it leaves plain slices and stacks
    ExpandAttention(),  # before the masks: it settles the axes that they are broadcast to
    BroadcastMasks(),  # onnxruntime's Attention does not broadcast them over queries
    ForwardCopies(),  # before the next: it uncovers the sources that interleaving stacks
    InterleaveSlices(),  # before the exporter would make ScatterND of it
    SettleStrides(),  # after all that makes views; the exporter's own trace may give other strides
    LegalizeWindowAttention(),  # last: nothing below knows the symbolic node
)


def trace(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    source: str = "",
) -> Program:
    """Trace an nn.Module or fx.GraphModule to a Program with static shapes and one spelling of attention.

    See tracing.trace for the strategies, the notes and the errors.
    """
    return canonicalize(trace_as_spelled(module, args, kwargs, weights=weights, source=source))


def load_program(model: str | Path, **options: Any) -> Program:
    """Load MODEL, with one spelling of attention; options and errors are those of loading.load_program."""
    return canonicalize(load_as_spelled(model, **options))


def detect(program: Program, grid: TokenGrid | GridHint | str | None = None) -> SiteSurvey:
    """List every attention call, found or declined with a reason.

    ``grid`` ("TxHxW", in tokens) is for models whose graph does not tell it, "TxHxW@START" also says at which key it
    starts; GridError where it does not fit.
    """
    return find_attention(program, GridHint.parse(grid) if isinstance(grid, str) else grid)


def detect_for(program: Program, plan: Plan) -> SiteSurvey:
    """The survey that the plan was made from: derived, or with the plan's grid where that was given by hand."""
    survey = find_attention(program)
    grids = {site.grid for site in plan.sites}
    same_sites = {site.node for site in survey.found} == {site.node for site in plan.sites}
    if not same_sites and survey.fingerprint == plan.fingerprint and len(grids) == 1:
        survey = find_attention(program, grids.pop())
    plan.check_against(survey)
    return survey


def rewrite(program: Program, plan: Plan, *, portable: bool = False) -> Program:
    """A new program with every planned site as t3::window_attention, or as plain aten if ``portable``."""
    rewritten = RewriteAttention(plan)(program).program
    return LowerWindowAttention()(rewritten).program if portable else rewritten


def verify(
    program: Program,
    rewritten: Program,
    plan: Plan,
    *,
    probe: bool = False,
    thorough: bool = False,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Prove that ``rewritten`` is ``program`` under ``plan``.

    Splits (1,1,1) give the original bit for bit; every site equals dense attention under its masks; the whole
    model equals the masked original. A model too large for that is retraced on a small grid, where that can be,
    and its patterns are checked one by one on the real grid; if it is too large for that too, only ``thorough`` does
    it. Without that, axes which a pattern does not split are shortened, and named, where its check would compute more
    than PATTERN_PAIRS. ``probe`` also checks by experiment where the tokens of the planned sites stand.
    """
    survey = detect_for(program, plan)
    grid_text = _grids_text(survey)
    not_run: list[str] = []
    case: _Case | None = None
    if graph_macs(program.graph) <= (SAVED_DIRECT_MACS if program.retrace is None else DIRECT_MACS):
        case = _Case(program, survey, plan, rewritten)
    else:
        progress("retracing on a small grid")
        small = _small_case(program, survey, plan, None if thorough else SMALL_GRID_MACS)
        if isinstance(small, str):
            not_run.append(f"whole-model checks: {small}")
        else:
            case = small
            grid_text = f"{_grids_text(small.survey)} (small grid for the model), {grid_text} (patterns)"
    # On a small grid nothing has looked at the rewritten program yet, and example inputs may be all zero.
    progress("graph and weights")
    is_portable = not any(node.target is WINDOW_ATTENTION for node in rewritten.graph.nodes)
    checks = [check_graph(rewrite(program, plan, portable=is_portable), rewritten)]
    with progress.measure(compared_bytes(program, rewritten), "bytes") as advance:
        checks.append(check_weights(program, rewritten, advance))
    checks = _check_by_running(case, checks, survey, plan, None if thorough else PATTERN_PAIRS, progress)
    if probe:
        layouts = probe_layouts(program, survey, progress=progress)
        checks += [_layout_check(site) for site in layouts.sites if site.verdict != "inconclusive"]
        not_run += [f"layout of '{site.node}': {site.detail}" for site in layouts.having("inconclusive")]
    return VerifyReport(grid_text, tuple(checks), tuple(not_run))


@dataclass(frozen=True)
class _Case:
    program: Program
    survey: SiteSurvey
    plan: Plan
    rewritten: Program


def _check_by_running(
    case: _Case | None,
    static: Sequence[Check],
    survey: SiteSurvey,
    plan: Plan,
    most_pairs: int | None,
    progress: Progress,
) -> list[Check]:
    """The checks that compute, as one piece of work, around those that only compare: model, ``static``, patterns."""
    masked = {site.node for site in survey.found if site.masked}
    real = _distinct_patterns(plan, masked)
    patterns = real if most_pairs is None else [affordable(site, most_pairs) for site in real]
    work = sum(map(pattern_work, patterns))
    identity = None
    if case is not None:
        identity = rewrite(case.program, case.plan.with_pattern(WindowPattern(Splits(1, 1, 1))))
        work += identity_work(case.program, identity) + rewritten_work(case.program, case.rewritten, case.plan)
    checks: list[Check] = []
    with progress.measure(work, "MACs") as advance:
        if case is not None and identity is not None:
            inputs = named_inputs(case.program)
            progress("identity: splits (1,1,1)")
            checks.append(check_identity(case.program, identity, inputs, advance))
            progress("sites and whole model")
            checks += check_rewritten(case.program, case.rewritten, case.plan, inputs, advance)
        checks += static
        for site, planned in zip(patterns, real, strict=True):
            progress(f"pattern {site.pattern} on {site.grid}")
            checks.append(check_pattern(site, real_grid=planned.grid, masked=site.node in masked))
            advance(pattern_work(site))
    return checks


def _layout_check(site: SiteProbe) -> Check:
    """A probed layout as a check: whether it is contradicted, at the number of changed cells."""
    name = f"{site.node}: {site.detail}"
    return Check("layout", name, float(site.verdict == "contradicted"), 0.0, float(site.cells))


def _grids_text(survey: SiteSurvey) -> str:
    return ", ".join(map(str, survey.grids)) or "no grid"


def _small_case(program: Program, survey: SiteSurvey, plan: Plan, most_macs: int | None) -> _Case | str:
    """The same model retraced on a small grid with its patterns scaled down, or why that cannot or shall not be."""
    if program.retrace is None:
        macs = graph_macs(program.graph) / 1e12
        return f"a saved graph has one size, and this one's {macs:,.1f} T MACs are too many for dense references"
    if len(survey.grids) > 1:
        return (
            f"the sites have {len(survey.grids)} grids ({_grids_text(survey)}), and no one small grid stands for them"
        )
    if len(survey.grid_axes) not in (2, 3) or not survey.grids:
        return "the graph does not tell which input axes make the grid"
    named = _shrunk(named_inputs(program), survey.grid_axes, survey.grids[0])
    # Retracing is long for what is this large: a lower bound of its work, every weight against every token.
    weight_macs = _linear_macs(program) * SMALL_GRID.tokens
    if most_macs is not None and weight_macs > most_macs:
        return (
            f"on a small grid too, {weight_macs / 1e12:,.1f} T MACs a pass are too many; 't3compile verify --thorough' "
            "does it all the same"
        )
    try:
        small = program.retrace(*substitute_inputs(program, named))
        small_survey = find_attention(small)
    except T3CompileError as error:
        return f"the model cannot be retraced on a small grid: {error}"
    if len(small_survey.found) != len(survey.found):
        return f"on a small grid {len(small_survey.found)} sites are found instead of {len(survey.found)}"
    sites = tuple(
        SitePlan.of_site(small_site, _shrunk_pattern(plan, site.node, site.grid, small_site.grid))
        for site, small_site in zip(survey.found, small_survey.found, strict=True)
    )
    small_plan = Plan(small.fingerprint(), plan.schedule, sites)
    return _Case(small, small_survey, small_plan, rewrite(small, small_plan))


def _linear_macs(program: Program) -> int:
    """MACs per token when every matrix among the parameters meets every token once."""
    state = program.exported.state_dict
    return sum(state[name].numel() for name in program.exported.graph_signature.parameters if state[name].dim() > 1)


def _shrunk(inputs: Mapping[str, Tensor], axes: Sequence[GridAxis], grid: TokenGrid) -> dict[str, Tensor]:
    named = dict(inputs)
    for axis, small, real in zip(axes, SMALL_GRID.sizes[-len(axes) :], grid.sizes[-len(axes) :], strict=True):
        length = min(small, real) * axis.patch
        named[axis.input_name] = named[axis.input_name].narrow(axis.axis, 0, length).contiguous()
    return named


def _shrunk_pattern(plan: Plan, node: str, grid: TokenGrid, small: TokenGrid) -> WindowPattern | None:
    """The same kind of split per axis: none, every token, or in between."""
    planned = plan.site(node)
    if planned is None or planned.pattern is None:
        return None
    counts = []
    for n, length, short in zip(planned.pattern.splits.counts, grid.sizes, small.sizes, strict=True):
        counts.append(1 if n == 1 else short if n == length else min(n, max(2, short // 2), short))
    return replace(planned.pattern, splits=Splits(*counts))


def _distinct_patterns(plan: Plan, masked: Set[str]) -> list[SitePlan]:
    """One planned site per pattern, place of the grid in the sequence, and whether it is masked."""
    distinct = {
        (replace(site, node="", reason=""), site.node in masked): site
        for site in plan.rewritten
        if site.pattern is not None and not site.pattern.is_full()
    }
    return list(distinct.values())


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how its runtime compares with torch, a check per output (None: not compared).

    Where weights are stored rounded, torch has the same rounded weights in the comparison; ``distances`` say how far
    the outputs are from those of the weights as they were. ``attention`` counts the ONNX file's calls by operator.
    """

    path: str
    functions: tuple[str, ...]
    comparison: tuple[Check, ...] | None
    not_compared: str = ""
    notes: tuple[str, ...] = ()
    storage: WeightStorage | None = None
    attention: Mapping[str, int] = field(default_factory=dict)
    rounding: Rounding | None = None
    distances: tuple[Distance, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no comparison failed."""
        return all(check.passed for check in self.comparison or ())

    def to_json(self) -> dict[str, Any]:
        compared = None
        if self.comparison is not None:
            outputs = [check.to_json() for check in self.comparison]
            compared = {"passed": self.passed, "outputs": outputs}
        return {
            "path": self.path,
            "functions": list(self.functions),
            "comparison": compared,
            "not_compared": self.not_compared,
            "notes": list(self.notes),
            "weights": None if self.storage is None else self.storage.to_json(),
            "attention": dict(self.attention),
            "rounding": None if self.rounding is None else self.rounding.to_json(),
            "distances": [distance.to_json() for distance in self.distances],
        }


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    precision: Literal["float32", "float16", "bfloat16"] | None = None,
    form: Literal["attention", "matmul", "onnxruntime", "auto"] = "attention",
    inline: bool = False,
    share_weights: bool = False,
    weights: Literal["float16", "bfloat16", "int8", "int8-dynamic"] | None = None,
    check: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write an ONNX file (opset 23) and its external data; see export_onnx_report."""
    report = export_onnx_report(
        program,
        path,
        precision=precision,
        form=form,
        inline=inline,
        share_weights=share_weights,
        weights=weights,
        check=check,
        progress=progress,
    )
    return Path(report.path)


# The comparison runs the model four times, twice in float64: above this many MACs it is left out unless asked for.
COMPARE_MACS = 10**12


def export_onnx_report(
    program: Program,
    path: str | Path,
    *,
    precision: Literal["float32", "float16", "bfloat16"] | None = None,
    form: Literal["attention", "matmul", "onnxruntime", "auto"] = "attention",
    inline: bool = False,
    share_weights: bool = False,
    weights: Literal["float16", "bfloat16", "int8", "int8-dynamic"] | None = None,
    check: bool | None = None,
    progress: Progress = SILENT,
) -> ExportReport:
    """Legalize, write and check an ONNX file; the program may be rewritten or not.

    ``precision`` "float16" or "bfloat16" stores matrix weights and runs matrix products in that; norms, RoPE, inputs
    and outputs keep their dtypes. ``form`` spells attention: opset-23 Attention, MatMul-Softmax inside the functions,
    onnxruntime's own MultiHeadAttention, or "auto", for onnxruntime on CPUs: by size, in a graph without functions that
    is cleaned up for it. ``inline`` writes function bodies in place. ``share_weights`` points into the safetensors
    files that the weights come from, where they hold the very bytes, instead of writing them again. ``weights`` stores
    those of linear layers in 16 bits, computed in float32, or by onnxruntime's quantizer in 8 ("int8-dynamic":
    multiplied in 8 too); ExportError together with ``share_weights``, or where there is no such float32 weight.
    ``check`` compares with torch in onnxruntime; None does so unless the model is too large to run here in a minute.
    """
    from t3compile.export.store_weights import check_sources_stay, needed_bytes
    from t3compile.export.write_onnx import write_onnx

    path = Path(path)
    check_writable(path)
    if weights is not None and share_weights:
        raise ExportError(f"shared weights stay as they are and cannot be stored in {weights}: take one of the two")
    program = in_precision(program, precision)
    program.require_weights()
    check_sources_stay(program, path, share=share_weights)
    # Rounded weights take at least this share; what they take is checked again once it is known.
    share = {None: 1, "float16": 2, "bfloat16": 2}.get(weights, 4)
    check_space(path, needed_bytes(program, path, share=share_weights) // share)
    progress("legalizing for ONNX")
    legal = apply_passes(program, ONNX_LEGALIZATION)
    written = write_onnx(legal, path, form=form, inline=inline, share=share_weights, weights=weights, progress=progress)
    report = ExportReport(
        str(path),
        written.functions,
        None,
        "switched off",
        _block_list_notes(program) + _large_tensor_notes(legal) + written.storage.notes(),
        written.storage,
        written.attention,
        written.rounding,
    )
    if check is False:
        return report
    if check is None and (reason := too_large_to_compare(program)):
        return replace(report, not_compared=reason)
    progress("comparing onnxruntime with torch")
    try:
        return _compared(report, program, written, progress)
    except MissingKernelError as error:
        if check:
            raise
        # bfloat16, for one, has no kernels on onnxruntime's CPU; the file is valid all the same.
        return replace(report, not_compared=str(error))


def _compared(report: ExportReport, program: Program, written: WrittenOnnx, progress: Progress) -> ExportReport:
    from t3compile.export.compare_onnx import compare_onnx, compare_rounded

    path, inputs = Path(report.path), named_inputs(program)
    if written.rounding is None:
        return replace(report, comparison=compare_onnx(path, program, inputs, progress), not_compared="")
    is_exact = written.rounding.kind != "int8-dynamic"
    compared = compare_rounded(path, program, written.rounded, inputs, exact_products=is_exact, progress=progress)
    reason = "" if is_exact else "its products are rounded as the model runs, so no error is expected; see the distance"
    return replace(report, comparison=compared.checks, not_compared=reason, distances=compared.distances)


def too_large_to_compare(program: Program) -> str:
    """Why a comparison is left out unless asked for; empty where it is not."""
    macs = graph_macs(program.graph)
    if macs <= COMPARE_MACS:
        return ""
    return f"{macs / 1e12:,.1f} T MACs, run four times, are too many here; --check does it all the same"


def in_precision(program: Program, precision: Literal["float32", "float16", "bfloat16"] | None) -> Program:
    """The program with matrix weights and products in 16 bits, or as it is once it is known to be float32."""
    if precision in ("float16", "bfloat16"):
        return MixPrecision(precision)(program).program
    if precision == "float32":
        _require_float32(program)
    return program


def _block_list_notes(program: Program) -> tuple[str, ...]:
    calls = sum(node.target is torch.ops.higher_order.flex_attention for node in program.graph.nodes)
    if not calls:
        return ()
    return (
        f"{calls} flex_attention calls are exported as their mask functions say; lists of blocks, which only compiled "
        "kernels read, are left out, as when torch runs the graph",
    )


def _large_tensor_notes(program: Program) -> tuple[str, ...]:
    """Tensors whose elements a 32-bit index cannot count: some GPU kernels refuse them."""
    large = {
        node.name: value.numel()
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(value := node.meta.get("val"), Tensor) and _is_large(value)
    }
    if not large:
        return ()
    name = max(large, key=lambda node: large[node])
    return (
        f"{len(large)} tensors have 2^31 elements or more (largest '{name}', {large[name]:,}); "
        "runtimes whose kernels index with 32 bits refuse them",
    )


def _is_large(value: Tensor) -> bool:
    # A size that depends on data is not known here.
    return all(isinstance(size, int) for size in value.shape) and value.numel() >= 2**31


def _require_float32(program: Program) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            raise ExportError(
                f"the program was traced in {str(value.dtype).removeprefix('torch.')}: load the model with "
                "--dtype float32 and rewrite it again"
            )


def load_engine(
    path: str | Path,
    runtime: str = "auto",
    *,
    trust_code: bool = False,
    weights: Sequence[str | Path] | None = None,
    **options: Any,
) -> Engine:
    """A callable from an exported file: ONNX, ``.pt2``, AOTInductor package or TensorRT engine, told by content.

    ``runtime`` is "auto", "onnxruntime" (the best provider that starts), "onnxruntime-cpu", "-cuda", "-tensorrt",
    "torch", "aoti" or "tensorrt"; the engine's ``runtime`` says what was chosen and its ``notes`` why. An AOTInductor
    package is compiled code and needs ``trust_code``; ``weights`` are the folders or files that a ``.pt2`` refers to;
    ``options`` are those of the runtime's engine class. Calls take
    tensors or arrays by position or by input name; InputsError names the input, what came and what is expected.
    """
    from t3compile.export.runtimes import load

    return load(Path(path), runtime, trust_code=trust_code, weights=[Path(file) for file in weights or ()], **options)
