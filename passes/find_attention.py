"""Detection: list every attention call of a graph, found or declined with a reason. Edits nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from t3compile.errors import GridError
from t3compile.geometry import TokenGrid
from t3compile.passes.count_model import count_model
from t3compile.passes.layout import Axis, Digit, Segment, segment_size
from t3compile.passes.track_layout import LayoutTracker
from t3compile.program import Program, user_input_names
from t3compile.sites import AttentionSite, Declined, GridAxis, Reason, SiteSurvey

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_BATCH_AXIS = 0


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one scaled_dot_product_attention node."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout: float
    is_causal: bool
    scale: float | None

    @classmethod
    def read(cls, node: fx.Node) -> AttentionCall:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = (given[name] for name in names[:3])
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
        return cls(
            node,
            q,
            k,
            v,
            given.get("attn_mask"),  # type: ignore[arg-type]
            given.get("dropout_p", 0.0),  # type: ignore[arg-type]
            bool(given.get("is_causal", False)),
            given.get("scale"),  # type: ignore[arg-type]
        )

    def shape(self, which: fx.Node) -> tuple[int, ...]:
        value = which.meta["val"]
        assert isinstance(value, Tensor)
        return tuple(int(size) for size in value.shape)


@dataclass(frozen=True)
class _Tokens:
    """A sequence axis read as prefix + grid + suffix."""

    grid: TokenGrid
    prefix: int
    suffix: int
    axes: tuple[GridAxis, ...]


@dataclass(frozen=True)
class _No:
    """Why a call is not a site."""

    reason: Reason
    detail: str


def find_attention(program: Program, grid: TokenGrid | None = None) -> SiteSurvey:
    """Survey of a program's attention calls.

    ``grid`` overrides or supplies the token grid; GridError where it contradicts the graph or fits no sequence.
    """
    graph = program.graph
    _refuse_dynamic_shapes(graph)
    names = user_input_names(program.exported)
    calls = [AttentionCall.read(node) for node in graph.nodes if node.target is ATTENTION]
    tracker = LayoutTracker(graph, names)
    verdicts = [_judge(call, tracker, grid) for call in calls]
    if grid is not None and calls and not any(isinstance(v, _Tokens) for v in verdicts):
        lengths = sorted({call.shape(call.q)[-2] for call in calls})
        raise GridError(
            f"grid {grid} has {grid.tokens} tokens, but no self-attention of the model has such a sequence: "
            f"the attention calls have {', '.join(map(str, lengths))} query tokens"
        )
    verdicts = _separate_other_inputs(calls, verdicts, tracker)
    places = _places_in_stacks(calls)
    found: list[AttentionSite] = []
    declined: list[Declined] = []
    axes: dict[GridAxis, None] = {}
    for call, verdict, (stack, index) in zip(calls, verdicts, places, strict=True):
        if isinstance(verdict, _Tokens):
            found.append(_site(call, verdict, stack, index))
            axes.update(dict.fromkeys(verdict.axes))
        else:
            declined.append(_declined(call, verdict))
    return SiteSurvey(
        fingerprint=program.fingerprint(),
        found=tuple(found),
        declined=tuple(declined),
        counts=count_model(program.exported),
        grid_axes=tuple(axes),
    )


def _refuse_dynamic_shapes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise GridError(
                f"the graph has dynamic shapes (first at node '{node.name}', {tuple(value.shape)}): "
                "window patterns need a fixed token grid, so trace with static shapes"
            )


def _judge(call: AttentionCall, tracker: LayoutTracker, grid: TokenGrid | None) -> _Tokens | _No:
    q, k, v = (call.shape(x) for x in (call.q, call.k, call.v))
    if len(q) != 4 or len(k) != 4:
        return _No("unknown-layout", f"queries have {len(q)} axes; expected [B, N, S, D]")
    layout_q, layout_k = tracker.layout(call.q), tracker.layout(call.k)
    tokens_q, tokens_k = layout_q[-2], layout_k[-2]
    if q[-2] != k[-2]:
        return _No("cross-attention", f"{q[-2]} queries on {k[-2]} keys: {_describe(tokens_k)} as keys")
    if tokens_q != tokens_k and tokens_q.is_known and tokens_k.is_known:
        same_input = tokens_q.inputs == tokens_k.inputs
        detail = f"queries are {_describe(tokens_q)}, keys {_describe(tokens_k)}"
        return _No("unknown-layout" if same_input else "cross-attention", detail)
    if q[0] != k[0] or v[0] != k[0]:
        return _No("unknown-layout", f"queries of batch {q[0]} on keys of batch {k[0]} and values of batch {v[0]}")
    if q[1] != k[1] or v[1] != k[1]:
        return _No("grouped-query", f"{q[1]} query heads on {k[1]} key heads")
    if call.is_causal:
        return _No("causal", "is_causal is set")
    if call.mask is not None:
        return _No("masked", f"the mask '{call.mask.name}' may hide grid keys")
    if call.dropout:
        return _No("dropout", f"dropout {call.dropout}: trace the model in eval mode")
    read = _read_grid(layout_q[:-2], tokens_q, grid, tracker.dropped(call.q))
    if isinstance(read, _Tokens) and tokens_q != tokens_k:
        return _No("unknown-layout", f"queries are {_describe(tokens_q)}, keys {_describe(tokens_k)}")
    return read


def _describe(axis: Axis) -> str:
    """The tokens of an axis in words."""
    parts = []
    for segment in axis.segments:
        inner = " x ".join(f"{digit.size} of {digit.origin}" for digit in segment)
        parts.append(inner or "1 token")
    return " then ".join(parts)


def _read_grid(
    outer: Sequence[Axis], tokens: Axis, grid: TokenGrid | None, dropped: frozenset[tuple[str, int]]
) -> _Tokens | _No:
    """The grid in a sequence axis: one stretch that runs over whole axes of one input, in their order."""
    stretches = [_grid_of(segment, outer, dropped) for segment in tokens.segments]
    whole = [i for i, stretch in enumerate(stretches) if isinstance(stretch, tuple)]
    if len(whole) == 1:
        (i,) = whole
        return _derived(tokens, i, stretches[i], outer, grid)
    if len(whole) > 1:
        return _No("unknown-layout", f"more than one token grid in a sequence: {_describe(tokens)}")
    if grid is not None:
        return _given(tokens, grid)
    refusals = [stretch for stretch in stretches if isinstance(stretch, _No)]
    return refusals[0] if refusals else _No("unknown-layout", "the sequence has no tokens")


def _derived(
    tokens: Axis,
    position: int,
    digits: tuple[Digit, ...] | _No,
    outer: Sequence[Axis],
    given: TokenGrid | None,
) -> _Tokens | _No:
    assert isinstance(digits, tuple)
    sizes = [segment_size(segment) for segment in tokens.segments]
    prefix, suffix = sum(sizes[:position]), sum(sizes[position + 1 :])
    counts = tuple(digit.size for digit in digits)
    derived = TokenGrid(*((1,) * (3 - len(counts)) + counts))
    if given is not None and given != derived:
        if given.tokens != derived.tokens:
            return _No("grid-mismatch", f"the graph's grid is {derived}, not {given}")
        if not _refines(given.sizes, counts):
            raise GridError(
                f"--grid {given} contradicts the grid {derived} derived from {_describe(tokens)}; leave --grid out"
            )
        return _Tokens(given, prefix, suffix, ())
    axes = tuple(GridAxis(str(d.origin.input_name), d.origin.axis, d.origin.length // d.size) for d in digits)
    return _Tokens(derived, prefix, suffix, axes)


def _refines(given: Sequence[int], derived: Sequence[int]) -> bool:
    """Whether each derived axis is a row-major product of neighbouring given ones, such as H*W flattened to one."""
    rest = list(given)
    for size in derived:
        product = 1
        while rest and product < size:
            product *= rest.pop(0)
        if product != size:
            return False
    return all(size == 1 for size in rest)


def _given(tokens: Axis, grid: TokenGrid) -> _Tokens | _No:
    """A grid from the user on a sequence whose order the graph does not tell."""
    sizes = [segment_size(segment) for segment in tokens.segments]
    fitting = [i for i, size in enumerate(sizes) if size == grid.tokens]
    if len(fitting) != 1:
        return _No(
            "grid-mismatch",
            f"no single stretch of {grid.tokens} tokens ({grid}) in a sequence of stretches {sizes}",
        )
    (i,) = fitting
    if tokens.segments[i] and len(tokens.segments[i]) > 1:
        return _No("grid-mismatch", f"the tokens are {_describe(Axis((tokens.segments[i],)))}")
    return _Tokens(grid, sum(sizes[:i]), sum(sizes[i + 1 :]), ())


def _grid_of(segment: Segment, outer: Sequence[Axis], dropped: frozenset[tuple[str, int]]) -> tuple[Digit, ...] | _No:
    """The digits of a segment if they are a whole grid in frame-major order."""
    if not all(digit.origin.is_known for digit in segment) or not segment:
        made_by = next((d.origin for d in segment if not d.origin.is_known), None)
        return _No("unknown-layout", f"the order of the tokens is lost: {made_by or 'no tokens'}")
    inputs = {digit.origin.input_name for digit in segment}
    axes = [digit.origin.axis for digit in segment]
    if len(inputs) > 1:
        return _No("unknown-layout", f"tokens of several inputs are mixed: {_describe(Axis((segment,)))}")
    (name,) = inputs
    outside = {
        digit.origin.axis
        for axis in outer
        for part in axis.segments
        for digit in part
        if digit.origin.input_name == name
    } - {_BATCH_AXIS}
    outside |= {axis for input_name, axis in dropped if input_name == name} - {_BATCH_AXIS, *axes}
    if outside or not all(digit.is_whole for digit in segment) or len(set(axes)) != len(axes):
        return _No("already-windowed", f"tokens attend within parts: {_describe(Axis((segment,)))}")
    if len(axes) == 1:
        return _No(
            "no-grid",
            f"the tokens are {segment[0].origin}, a flat sequence of {segment[0].size}: give --grid TxHxW",
        )
    if len(axes) > 3:
        return _No("unknown-layout", f"more than three axes: {_describe(Axis((segment,)))}")
    if axes != sorted(axes):
        return _No("unknown-layout", f"the tokens are not frame-major: {_describe(Axis((segment,)))}")
    return segment


def _separate_other_inputs(
    calls: Sequence[AttentionCall], verdicts: list[_Tokens | _No], tracker: LayoutTracker
) -> list[_Tokens | _No]:
    """Where some site has a grid, flat sequences of another input (text) are no candidates for one."""
    gridded = {axis.input_name for v in verdicts if isinstance(v, _Tokens) for axis in v.axes}
    if not gridded:
        return verdicts
    separated: list[_Tokens | _No] = []
    for call, verdict in zip(calls, verdicts, strict=True):
        if isinstance(verdict, _No) and verdict.reason in ("no-grid", "grid-mismatch", "masked"):
            origins = {digit.origin.input_name for segment in tracker.layout(call.q)[-2].segments for digit in segment}
            if None not in origins and not origins & gridded:
                verdict = replace(verdict, reason="other-tokens")
        separated.append(verdict)
    return separated


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(value[0]) for value in stack.values()]
    return paths[-1] if paths else ""


def _places_in_stacks(calls: Sequence[AttentionCall]) -> list[tuple[str, int]]:
    """(stack, index within it) of every call: the block number in the module path, else order of appearance."""
    seen: dict[str, int] = {}
    places = []
    for call in calls:
        path = _module_path(call.node)
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
        stack = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        rank = seen.get(stack, 0)
        seen[stack] = rank + 1
        places.append((stack, int(numbers[0]) if len(numbers) == 1 else rank))
    return places


def _site(call: AttentionCall, tokens: _Tokens, stack: str, index: int) -> AttentionSite:
    batch, heads, _, head_dim = call.shape(call.q)
    return AttentionSite(
        node=call.node.name,
        module=_module_path(call.node),
        stack=stack,
        index=index,
        grid=tokens.grid,
        prefix=tokens.prefix,
        suffix=tokens.suffix,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        value_dim=call.shape(call.v)[-1],
        dtype=str(call.q.meta["val"].dtype).removeprefix("torch."),
        scale=call.scale,
    )


def _declined(call: AttentionCall, refusal: _No) -> Declined:
    q, k, v = (call.shape(x) for x in (call.q, call.k, call.v))
    batch = 1
    for size in q[:-3]:
        batch *= size
    return Declined(
        node=call.node.name,
        module=_module_path(call.node),
        reason=refusal.reason,
        detail=refusal.detail,
        batch=batch,
        heads=q[-3] if len(q) > 2 else 1,
        query_tokens=q[-2],
        key_tokens=k[-2],
        head_dim=q[-1],
        value_dim=v[-1],
    )
