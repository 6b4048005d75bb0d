"""Numeric proof that a rewritten program is the planned one.

Nothing here knows how the rewrite works: programs are run and compared with dense attention under the branches'
masks. A tolerance is derived, not chosen: against a float64 reference, the rewritten program may err at most twice
as much as plain PyTorch running the masked attention in the program's own dtype (written out, or as one fused call:
the worse of the two), plus one rounding step of the output.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from t3compile.cost import joint_pairs
from t3compile.errors import PlanError
from t3compile.execute import WIDE_WORK, CallHook, call_work, execute, run_work
from t3compile.geometry import FRAME_MAJOR, TokenGrid
from t3compile.mapped_files import Extent
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, WindowAttentionCall
from t3compile.ops.reference import (
    MaskedAttention,
    masked_attention,
    masked_sdpa,
    reference_window_attention,
)
from t3compile.plan import Plan, SitePlan
from t3compile.program import Program
from t3compile.progress import Advance, unmeasured
from t3compile.weights import TensorWeights, Weights

CheckKind = Literal["identity", "site", "model", "pattern", "graph", "weights", "onnx", "aoti", "layout"]
_FACTOR = 2.0
# Errors beyond this share of the reference are no rounding: even where plain PyTorch has them, something is wrong.
_MEANINGLESS = 0.1
# The queries at random, besides the grid's corners, and the head dim of a pattern's check.
PATTERN_ROWS, PATTERN_DEPTH = 16, 8
# Query-key pairs that a pattern's check computes; with more, axes that the pattern does not split are shortened.
PATTERN_PAIRS = 4 * 10**9
_SHORTEST = 8
_PLAIN: tuple[MaskedAttention, ...] = (masked_attention, masked_sdpa)


@dataclass(frozen=True)
class Check:
    """One comparison: largest absolute error, what was allowed, and the size of the reference."""

    kind: CheckKind
    name: str
    error: float
    allowed: float
    magnitude: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class VerifyReport:
    """All checks that ran, on which grid, and what did not run and why."""

    grid: str
    checks: tuple[Check, ...]
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "grid": self.grid,
            "checks": [check.to_json() for check in self.checks],
            "not_run": list(self.not_run),
        }


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _error(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; for whole numbers and bools the number of different elements."""
    if not value.numel():
        return 0.0
    if not value.is_floating_point():
        return float((value != reference).sum())
    return float((value.double() - reference.double()).abs().max())


def allowed_error(plain_error: float, rounding: float, magnitude: float) -> float:
    """Twice plain PyTorch's error and one rounding step, but never so much that agreement would mean nothing."""
    return min(_FACTOR * plain_error + rounding, _MEANINGLESS * magnitude)


def worst(*errors: float) -> float:
    """The largest error, NaN if one is; max() would lose it."""
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def derived_check(kind: CheckKind, name: str, ours: Tensor, plain: Sequence[Tensor], reference: Tensor) -> Check:
    """Our error beside the worst of the plain results."""
    is_floating = ours.is_floating_point()
    magnitude = _largest(reference) if is_floating else float(reference.numel())
    rounding = torch.finfo(ours.dtype).eps * magnitude if is_floating else 0.0
    plain_error = max(_error(value, reference) for value in plain)
    return Check(kind, name, _error(ours, reference), allowed_error(plain_error, rounding, magnitude), magnitude)


def check_identity(
    program: Program, identity: Program, inputs: Mapping[str, Tensor], advance: Advance = unmeasured
) -> Check:
    """``identity`` is the program rewritten with splits (1,1,1): its outputs must be the same bits."""
    before, after = (execute(one, inputs, advance=advance) for one in (program, identity))
    error = worst(*(_error(a, b) for a, b in zip(after, before, strict=True)))
    magnitude = max((_largest(x) for x in before), default=0.0)
    return Check("identity", "splits (1,1,1) against the original", error, 0.0, magnitude)


def check_graph(expected: Program, rewritten: Program) -> Check:
    """``rewritten`` has the operations, wiring, inputs and outputs of ``expected``, the plan carried out anew."""
    same_graph = expected.fingerprint() == rewritten.fingerprint()
    same_interface = _interface(expected) == _interface(rewritten)
    differs = float(not (same_graph and same_interface))
    return Check("graph", "rewritten graph against the plan", differs, 0.0, 1.0)


def _interface(program: Program) -> list[tuple[object, ...]]:
    """Kind and target of every input and output in order: which weight feeds which placeholder."""
    signature = program.exported.graph_signature
    return [(spec.kind, spec.target) for spec in (*signature.input_specs, *signature.output_specs)]


def check_weights(program: Program, rewritten: Program, advance: Advance = unmeasured) -> Check:
    """Weights and constants are the same bits; read one by one. ``advance`` is told compared_bytes in all."""
    name = "weights and constants against the original's"
    sources = [(_tensor_constants(program), _tensor_constants(rewritten))]
    if rewritten.weights is not program.weights:
        sources.append((program.weights, rewritten.weights))
    error = magnitude = 0.0
    for old, new in sources:
        if set(old.names()) != set(new.names()):
            return Check("weights", f"{name}: other names", 1.0, 0.0, 0.0)
        for weight in old.names():
            is_one = _is_one_place(old.locate(weight), new.locate(weight))
            before, after = ((x.view(weight) if is_one else x.load(weight)).detach() for x in (old, new))
            if not is_one:
                advance(before.nbytes)
                magnitude = max(magnitude, _largest(before))
            if before.shape != after.shape or before.dtype != after.dtype:
                return Check("weights", f"{name}: '{weight}' has another shape or dtype", 1.0, 0.0, magnitude)
            if not is_one and not torch.equal(before, after):
                error = worst(error, _error(after, before))
    return Check("weights", name, error, 0.0, magnitude)


def compared_bytes(program: Program, rewritten: Program) -> int:
    """Bytes of one side that check_weights reads."""
    constants = _tensor_constants(program)
    read = sum(int(constants.load(name).nbytes) for name in constants.names())
    if rewritten.weights is program.weights or set(rewritten.weights.names()) != set(program.weights.names()):
        return read
    return read + sum(
        int(tensor.nbytes)
        for name, tensor in program.exported.state_dict.items()
        if not _is_one_place(program.weights.locate(name), rewritten.weights.locate(name))
    )


def _is_one_place(before: Extent | None, after: Extent | None) -> bool:
    """Whether two weights are the same bytes of one file, which then need not be read."""
    if before is None or after is None or (before.offset, before.nbytes) != (after.offset, after.nbytes):
        return False
    files = before.file, after.file
    return all(file.is_in_place() for file in files) and os.path.samefile(files[0].path, files[1].path)


def _tensor_constants(program: Program) -> Weights:
    constants = program.exported.constants
    return TensorWeights({name: value for name, value in constants.items() if isinstance(value, Tensor)})


def check_rewritten(
    program: Program, rewritten: Program, plan: Plan, inputs: Mapping[str, Tensor], advance: Advance = unmeasured
) -> list[Check]:
    """Every rewritten site against its masked reference, then the whole model against the masked original.

    ``program`` is the original, ``inputs`` are tensors by placeholder name. A rewritten program lowered to plain
    aten has no sites to hook; only its outputs are compared. ``advance`` is told rewritten_work in all.
    """
    checks: list[Check] = []
    nodes = _window_nodes(rewritten)
    if nodes and len(nodes) != len(plan.rewritten):
        raise PlanError(
            f"the rewritten program has {len(nodes)} window attention calls, the plan {len(plan.rewritten)} sites"
        )
    order = {node.name: i for i, node in enumerate(program.graph.nodes)}
    sites = sorted(plan.rewritten, key=lambda site: order.get(site.node, -1))
    work = reference_work(program, plan)
    watchers = {
        node.name: _site_watcher(site, checks, partial(advance, _watched_work(node, work[site.node])))
        for node, site in zip(nodes, sites, strict=False)
    }
    ours = execute(rewritten, inputs, hooks=watchers, advance=advance)

    def masked(attend: MaskedAttention, factor: int = 1) -> dict[str, CallHook]:
        return {
            site.node: _masked_hook(site, attend, partial(advance, factor * work[site.node])) for site in plan.rewritten
        }

    plain = [
        execute(program, inputs, hooks=masked(attend), advance=advance) for attend in (masked_attention, masked_sdpa)
    ]
    wide = masked(masked_attention, WIDE_WORK)
    reference = execute(program, inputs, hooks=wide, float64=True, advance=advance)
    for i, value in enumerate(ours):
        plain_values = [outputs[i] for outputs in plain]
        checks.append(derived_check("model", f"output {i}", value, plain_values, reference[i]))
    return checks


def _window_nodes(rewritten: Program) -> list[fx.Node]:
    return [node for node in rewritten.graph.nodes if node.target is WINDOW_ATTENTION]


def _watched_work(node: fx.Node, reference: int) -> int:
    """The call itself, its plain references and the exact one."""
    return call_work(node) + (len(_PLAIN) + WIDE_WORK) * reference


def reference_work(program: Program, plan: Plan) -> dict[str, int]:
    """MACs of the dense reference of every planned site by its node's name: each branch computes all pairs."""
    nodes = {node.name: node for node in program.graph.nodes}
    return {
        site.node: len(site.pattern.branches) * call_work(nodes[site.node])
        for site in plan.rewritten
        if site.pattern is not None and site.node in nodes
    }


def rewritten_work(program: Program, rewritten: Program, plan: Plan) -> int:
    """What check_rewritten reports in all, in MACs; those in float64 count twice."""
    work, nodes = reference_work(program, plan), _window_nodes(rewritten)
    ours = run_work(rewritten, replaced=[node.name for node in nodes])
    if nodes:
        ours += sum(map(call_work, nodes)) + (len(_PLAIN) + WIDE_WORK) * sum(work.values())
    dense = run_work(program, replaced=work) + sum(work.values())
    return ours + (len(_PLAIN) + WIDE_WORK) * dense


def identity_work(program: Program, identity: Program) -> int:
    """What check_identity reports in all, in MACs."""
    return run_work(program) + run_work(identity)


def pattern_work(site: SitePlan) -> int:
    """What check_pattern does on the site's grid, in MACs."""
    dense = (PATTERN_ROWS + 8) * site.tokens
    assert site.pattern is not None
    return 2 * PATTERN_DEPTH * (_pairs(site) + (len(_PLAIN) + WIDE_WORK) * len(site.pattern.branches) * dense)


def _pairs(site: SitePlan) -> int:
    extra = site.tokens - site.grid.tokens
    return joint_pairs(site.grid, extra, site.pattern, extra_queries=site.query_tokens - site.grid.tokens)


def affordable(site: SitePlan, most_pairs: int = PATTERN_PAIRS) -> SitePlan:
    """The site, with the axes that its pattern does not split shortened alike until so many pairs are enough.

    Along those axes every window holds all tokens, whatever their number; no split changes, nor any uneven rest.
    """
    assert site.pattern is not None
    unsplit = [axis for axis, n in enumerate(site.pattern.splits.counts) if n == 1]
    pairs = _pairs(site)
    if pairs <= most_pairs or not unsplit:
        return site
    share = (most_pairs / pairs) ** (1 / (2 * len(unsplit)))
    sizes = [
        max(min(_SHORTEST, length), int(length * share)) if axis in unsplit else length
        for axis, length in enumerate(site.grid.sizes)
    ]
    return replace(site, grid=TokenGrid(*sizes))


def _reference(
    site: SitePlan,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    scale: float | None,
    *,
    attend: MaskedAttention = masked_attention,
    rows: Tensor | None = None,
) -> Tensor:
    assert site.pattern is not None
    q, k, v = qkv
    return reference_window_attention(
        q,
        k,
        v,
        grid=site.grid,
        pattern=site.pattern,
        prefix=site.prefix,
        suffix=site.suffix,
        query_prefix=site.query_prefix,
        query_suffix=site.query_suffix,
        order=site.order,
        mask=mask,
        scale=scale,
        rows=rows,
        attend=attend,
    )


def _exact(
    site: SitePlan, qkv: Sequence[Tensor], mask: Tensor | None, scale: float | None, rows: Tensor | None = None
) -> Tensor:
    """The reference in float64."""
    wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    return _reference(site, [x.double() for x in qkv], wide, scale, rows=rows)


def _site_watcher(site: SitePlan, checks: list[Check], done: Callable[[], None]) -> CallHook:
    """Runs the call as it is and checks it on the very queries, keys and values that reach it."""

    def watch(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = WINDOW_ATTENTION(*args, **kwargs)
        call = WindowAttentionCall.read(args, kwargs)
        qkv, mask, scale = call.tensors[:3], call.mask, call.args.scale
        plain = [_reference(site, qkv, mask, scale, attend=attend) for attend in _PLAIN]
        checks.append(derived_check("site", site.node, out, plain, _exact(site, qkv, mask, scale)))
        done()
        return out

    return watch


def _masked_hook(site: SitePlan, attend: MaskedAttention, done: Callable[[], None]) -> CallHook:
    """Puts dense attention under the branches' masks in the place of the original call."""

    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        out = _reference(site, args[:3], mask, kwargs.get("scale"), attend=attend)
        done()
        return out

    return run


def check_pattern(site: SitePlan, *, real_grid: TokenGrid | None = None, masked: bool = False) -> Check:
    """One pattern on the site's grid: random q, k, v of one head, sampled queries against the reference.

    They are the corners of the grid and PATTERN_ROWS at random. ``real_grid`` is named beside a shortened one.
    ``masked``: every second key outside the grid is hidden, as a key-padding mask does.
    """
    assert site.pattern is not None
    args = WindowAttentionArgs(
        site.grid.in_order(site.order),
        site.pattern.in_order(site.order),
        site.prefix,
        site.suffix,
        None,
        site.query_prefix,
        site.query_suffix,
    )
    generator = torch.Generator().manual_seed(0)
    counts = (site.query_tokens, site.tokens, site.tokens)
    qkv = [torch.randn(1, 1, tokens, PATTERN_DEPTH, generator=generator) for tokens in counts]
    at_random = torch.randperm(site.query_tokens, generator=generator)[:PATTERN_ROWS]
    picked = torch.cat([_corners(site), at_random]).unique()
    mask = _every_second_extra_key(site) if masked else None
    given = {} if mask is None else {"mask": mask}
    ours = WINDOW_ATTENTION(*qkv, *args.as_op_args(), **given)[..., picked, :]
    plain = [_reference(site, qkv, mask, None, attend=attend, rows=picked) for attend in _PLAIN]
    order = "" if site.order == FRAME_MAJOR else f" in order {site.order}"
    shortened = "" if real_grid in (None, site.grid) else f" (shortened from {real_grid} where it does not split)"
    name = f"{site.pattern} on {site.grid}{shortened}{order}{', masked' if masked else ''}"
    return derived_check("pattern", name, ours, plain, _exact(site, qkv, mask, None, picked))


def _corners(site: SitePlan) -> Tensor:
    """Positions of the first and last tokens of every axis among the queries; int64 [8]."""
    grid = site.grid.in_order(site.order)
    ends = itertools.product(*((0, length - 1) for length in grid.sizes))
    return site.query_prefix + torch.tensor([grid.index(*corner) for corner in ends])


def _every_second_extra_key(site: SitePlan) -> Tensor:
    """A key-padding mask, bool [1, 1, 1, S]."""
    position = torch.arange(site.tokens)
    in_grid = (position >= site.prefix) & (position < site.prefix + site.grid.tokens)
    return (in_grid | (position % 2 == 0)).reshape(1, 1, 1, -1)
