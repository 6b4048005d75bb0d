"""Detection: list every attention call of a graph, found or declined with a reason. Edits nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from t3compile.errors import GridError
from t3compile.geometry import GridHint, TokenGrid
from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.canonicalize_flex_attention import FLEX_ATTENTION
from t3compile.passes.canonicalize_softmax_attention import unrecognised_attention
from t3compile.passes.count_model import count_model
from t3compile.passes.judge_masks import GridMasks
from t3compile.passes.layout import Axis, Origin, segment_size
from t3compile.passes.place_in_stacks import module_path, place_in_stacks
from t3compile.passes.read_grid import (
    GridReader,
    Refusal,
    Stretch,
    describe_tokens,
    is_tensor_input,
    refine_grid,
)
from t3compile.passes.read_mask import GridPlace
from t3compile.passes.read_values import ValueReader
from t3compile.passes.track_layout import LayoutTracker
from t3compile.program import Program, user_input_names
from t3compile.sites import NOT_A_CANDIDATE, AttentionSite, Declined, GridAxis, Reason, SiteSurvey

# Reasons that lie in the call itself: whether a grid fits such a call is not what keeps it full.
_OF_THE_CALL: frozenset[Reason] = frozenset({"masked", "causal", "dropout", "grouped-query"})


@dataclass(frozen=True)
class _Tokens:
    """A call's tokens: one grid among the keys and the queries, and what stands around it."""

    grid: TokenGrid
    order: str
    prefix: int
    suffix: int
    query_prefix: int
    query_suffix: int
    axes: tuple[GridAxis, ...] = ()
    assumptions: tuple[str, ...] = ()
    masked: bool = False


def find_attention(program: Program, grid: TokenGrid | GridHint | None = None) -> SiteSurvey:
    """Survey of a program's attention calls.

    ``grid`` overrides or supplies the token grid; GridError where it contradicts the graph or fits no sequence.
    """
    graph = program.graph
    _refuse_dynamic_shapes(graph)
    hint = GridHint(grid) if isinstance(grid, TokenGrid) else grid
    calls = [AttentionCall.read(node) for node in graph.nodes if node.target is ATTENTION]
    values = ValueReader(program)
    tracker = LayoutTracker(graph, user_input_names(program.exported), values.read)
    reader = GridReader(tracker, values, [node for node in graph.nodes if is_tensor_input(node)])
    masks = GridMasks(program, values)
    verdicts = [_judge(call, reader, masks, hint) for call in calls]
    if hint is not None and calls and not any(isinstance(v, _Tokens) or v.reason in _OF_THE_CALL for v in verdicts):
        raise GridError(_no_such_sequence(hint, calls, verdicts))
    verdicts = _separate_other_inputs(calls, verdicts, reader)
    sites = [call.node for call, verdict in zip(calls, verdicts, strict=True) if isinstance(verdict, _Tokens)]
    places = dict(zip(sites, place_in_stacks(sites), strict=True))
    found: list[AttentionSite] = []
    declined: list[Declined] = []
    assumptions: dict[str, None] = {}
    for call, verdict in zip(calls, verdicts, strict=True):
        if isinstance(verdict, _Tokens):
            found.append(_site(call, verdict, *places[call.node]))
            assumptions.update(dict.fromkeys(verdict.assumptions))
        else:
            declined.append(_declined(call, verdict))
    declined += [_own_functions(node) for node in graph.nodes if node.target is FLEX_ATTENTION]
    declined += [_unrecognised(graph, name, why) for name, why in unrecognised_attention(program)]
    if found and tracker.index_inputs:
        named = " and ".join(f"'{name}'" for name in sorted(tracker.index_inputs))
        assumptions[f"where tokens stand is read from the example values of input {named}: keep them so"] = None
    return SiteSurvey(
        fingerprint=program.fingerprint(),
        found=tuple(found),
        declined=tuple(declined),
        counts=count_model(program.exported),
        assumptions=tuple(assumptions),
    )


def _no_such_sequence(hint: GridHint, calls: Sequence[AttentionCall], verdicts: Sequence[_Tokens | Refusal]) -> str:
    undecided = next((v for v in verdicts if isinstance(v, Refusal) and v.reason == "two-grids"), None)
    if undecided is not None:
        return f"--grid {hint} does not say which grid is meant: {undecided.detail}"
    lengths = sorted({call.shape(call.q)[-2] for call in calls})
    return (
        f"grid {hint} has {hint.grid.tokens} tokens, but no self-attention of the model has such a sequence: "
        f"the attention calls have {', '.join(map(str, lengths))} query tokens; give TxHxW of that many tokens, and "
        "TxHxW@START where the grid is a part of the sequence that begins at key START"
    )


def _refuse_dynamic_shapes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise GridError(
                f"the graph has dynamic shapes (first at node '{node.name}', {tuple(value.shape)}): window patterns "
                f"need a fixed token grid, so trace with static shapes: {_way_to_static_shapes(value)}"
            )


def _way_to_static_shapes(value: Tensor) -> str:
    if any(free_unbacked_symbols(size) for size in value.shape):
        return (
            "this size depends on the values of an input, such as a mask; give the model what needs no counting, "
            "for example text without padding and no mask"
        )
    return "t3compile.trace does, and torch.export.export without dynamic_shapes"


def _judge(call: AttentionCall, reader: GridReader, masks: GridMasks, hint: GridHint | None) -> _Tokens | Refusal:
    q, k, v = (call.shape(x) for x in (call.q, call.k, call.v))
    if len(q) != 4 or len(k) != 4:
        return Refusal("unknown-layout", f"queries have {len(q)} axes; expected [B, N, S, D]")
    tokens = _read_tokens(call, reader, hint)
    if isinstance(tokens, Refusal) and tokens.reason in NOT_A_CANDIDATE:
        return tokens
    if q[0] != k[0] or v[0] != k[0]:
        return Refusal("unknown-layout", f"queries of batch {q[0]} on keys of batch {k[0]} and values of batch {v[0]}")
    if q[1] != k[1] or v[1] != k[1]:
        return Refusal("grouped-query", f"{q[1]} query heads on {k[1]} key heads")
    if call.is_causal:
        return Refusal("causal", "is_causal is set")
    if isinstance(tokens, Refusal):
        return tokens
    if call.dropout:
        return Refusal("dropout", f"dropout {call.dropout}: trace the model in eval mode")
    return tokens if call.mask is None else _under_mask(call, call.mask, tokens, masks)


def _under_mask(call: AttentionCall, mask: fx.Node, tokens: _Tokens, masks: GridMasks) -> _Tokens | Refusal:
    """The tokens, with what is assumed of a mask that leaves the grid visible."""
    place = GridPlace(
        tokens.query_prefix, tokens.query_suffix, tokens.prefix, tokens.suffix, grid_tokens=tokens.grid.tokens
    )
    reading = masks.read(mask, (*call.shape(call.q)[:3], call.shape(call.k)[2]), place)
    if isinstance(reading, Refusal):
        return reading
    return replace(tokens, masked=True, assumptions=(*tokens.assumptions, *reading))


def _read_tokens(call: AttentionCall, reader: GridReader, hint: GridHint | None) -> _Tokens | Refusal:
    """The grid that stands once among the keys and once among the queries."""
    keys, queries = reader.stretches(call.k), reader.stretches(call.q)
    grids = [stretch for stretch in keys if isinstance(stretch, Stretch)]
    if not grids:
        refusal = _no_grid(call, reader)
        if hint is None or refusal.reason in NOT_A_CANDIDATE:
            return refusal
        return _given(call, reader, hint)
    # Of several grids the largest is windowed; the others (reference frames) stay global.
    most = max(stretch.grid.tokens for stretch in grids)
    largest = [stretch for stretch in grids if stretch.grid.tokens == most]
    if hint is not None and hint.start is not None:
        largest = [stretch for stretch in grids if stretch.start == hint.start] or largest
    # The same grid twice (frames beside reference frames of one input): the first is windowed.
    if len({_input_of(stretch) for stretch in largest}) > 1:
        starts = " or ".join(f"{stretch.grid}@{stretch.start}" for stretch in largest)
        words = describe_tokens(reader.tokens(call.k))
        return Refusal("two-grids", f"two candidate grids in one sequence ({words}): choose with --grid {starts}")
    chosen = largest[0]
    among_queries = [s for s in queries if isinstance(s, Stretch) and s.segment == chosen.segment]
    if not among_queries:
        return _other_queries(reader.tokens(call.q), reader.tokens(call.k), chosen)
    start = next((s.start for s in among_queries if s.start == chosen.start), among_queries[0].start)
    refined = chosen if hint is None else refine_grid(chosen, hint)
    if isinstance(refined, Refusal):
        return refined
    return _around(call, refined.grid, refined.order, chosen.start, start, refined.axes, refined.assumptions)


def _input_of(stretch: Stretch) -> str | None:
    return stretch.segment[0].origin.input_name


def _around(
    call: AttentionCall,
    grid: TokenGrid,
    order: str,
    key_start: int,
    query_start: int,
    axes: tuple[GridAxis, ...] = (),
    assumptions: tuple[str, ...] = (),
) -> _Tokens:
    keys, queries = call.shape(call.k)[-2], call.shape(call.q)[-2]
    return _Tokens(
        grid,
        order,
        key_start,
        keys - key_start - grid.tokens,
        query_start,
        queries - query_start - grid.tokens,
        axes,
        assumptions,
    )


def _other_queries(queries: Axis, keys: Axis, grid: Stretch) -> Refusal:
    """Why queries without the keys' grid are no site."""
    words = f"queries are {describe_tokens(queries)}, keys {describe_tokens(keys)}"
    grid_input = grid.segment[0].origin.input_name
    if grid_input not in queries.inputs and queries.is_known:
        beside = {name for segment in keys.segments for name in Axis((segment,)).inputs} - {grid_input}
        return Refusal("text-queries" if queries.inputs <= beside else "cross-attention", words)
    return Refusal("unknown-layout", words)


def _no_grid(call: AttentionCall, reader: GridReader) -> Refusal:
    """Why keys without a grid are no site."""
    queries, keys = reader.tokens(call.q), reader.tokens(call.k)
    shared = [segment for segment in keys.segments if segment in queries.segments and segment_size(segment) > 1]
    if not shared:
        # A stretch of the keys' own tokens asks all of them.
        if _lost_origins(queries) & _lost_origins(keys):
            words = f"queries are {describe_tokens(queries)}, keys {describe_tokens(keys)}"
            return Refusal("unknown-layout", words)
        if queries.size != keys.size:
            return Refusal(
                "cross-attention", f"{queries.size} queries on {keys.size} keys: {describe_tokens(keys)} as keys"
            )
        words = f"queries are {describe_tokens(queries)}, keys {describe_tokens(keys)}"
        is_other = queries.is_known and keys.is_known and not queries.inputs & keys.inputs
        return Refusal("cross-attention" if is_other else "unknown-layout", words)
    longest = max(shared, key=segment_size)
    refusal = reader.stretches(call.k)[keys.segments.index(longest)]
    assert isinstance(refusal, Refusal)
    if queries != keys and queries.size == keys.size and refusal.reason != "no-grid":
        words = f"queries are {describe_tokens(queries)}, keys {describe_tokens(keys)}"
        return Refusal("unknown-layout", words)
    return refusal


def _lost_origins(axis: Axis) -> set[Origin]:
    return {segment[0].origin for segment in axis.segments if segment and not segment[0].origin.is_known}


def _given(call: AttentionCall, reader: GridReader, hint: GridHint) -> _Tokens | Refusal:
    """A grid from the user on a sequence whose order the graph does not tell."""
    queries, keys = reader.tokens(call.q), reader.tokens(call.k)
    count = hint.grid.tokens
    start = hint.start
    if start is None:
        fitting = [place for place, segment in keys.placed() if segment_size(segment) == count]
        fitting = fitting or _shared_stretches(queries, keys, count)
        if len(fitting) != 1:
            sizes = [segment_size(segment) for segment in keys.segments]
            return Refusal(
                "grid-mismatch",
                f"no single stretch of {count} tokens ({hint.grid}) in a sequence of stretches {sizes}: "
                f"say where it starts with --grid {hint.grid}@START",
            )
        start = fitting[0]
    piece = keys.slice(start, start + count) if start + count <= keys.size else None
    if piece is None:
        return Refusal("grid-mismatch", f"no {count} tokens of one kind at {start} in {describe_tokens(keys)}")
    if hint.start is None and any(len(s) > 1 and Axis((s,)).is_known for s in piece.segments):
        return Refusal("grid-mismatch", f"the tokens are {describe_tokens(piece)}")
    for place in (start, *(place for place, _ in queries.placed())):
        if place + count <= queries.size and queries.slice(place, place + count) == piece:
            return _around(call, hint.grid, "thw", start, place)
    words = f"queries are {describe_tokens(queries)}, keys {describe_tokens(keys)}"
    return Refusal("grid-mismatch", f"the {count} tokens at {start} of the keys are not among the queries: {words}")


def _shared_stretches(queries: Axis, keys: Axis, count: int) -> list[int]:
    """Where stretches of ``count`` queries stand among the keys."""
    found = []
    for start, segment in keys.placed():
        for asked in queries.segments:
            if segment_size(asked) == count and asked and segment and asked[0].origin == segment[0].origin:
                place = start + (asked[0].start - segment[0].start) * segment_size(segment[1:])
                if 0 <= place <= keys.size - count and keys.slice(place, place + count) == Axis((asked,)):
                    found.append(place)
    return found


def _separate_other_inputs(
    calls: Sequence[AttentionCall], verdicts: list[_Tokens | Refusal], reader: GridReader
) -> list[_Tokens | Refusal]:
    """Where some site has a grid, flat sequences of other inputs (text) are no candidates for one."""
    gridded = {
        name
        for call, verdict in zip(calls, verdicts, strict=True)
        if isinstance(verdict, _Tokens)
        for name in _grid_inputs(call, verdict, reader)
    }
    if not gridded:
        return verdicts
    separated: list[_Tokens | Refusal] = []
    for call, verdict in zip(calls, verdicts, strict=True):
        if isinstance(verdict, Refusal) and verdict.reason in ("no-grid", "grid-mismatch"):
            origins = {digit.origin.input_name for segment in reader.tokens(call.q).segments for digit in segment}
            if None not in origins and not origins & gridded:
                verdict = replace(verdict, reason="other-tokens")
        separated.append(verdict)
    return separated


def _grid_inputs(call: AttentionCall, tokens: _Tokens, reader: GridReader) -> set[str]:
    """Inputs whose tokens make the grid of a site."""
    piece = reader.tokens(call.k).slice(tokens.prefix, tokens.prefix + tokens.grid.tokens)
    return set() if piece is None else piece.inputs


def _site(call: AttentionCall, tokens: _Tokens, stack: str, index: int) -> AttentionSite:
    batch, heads, _, head_dim = call.shape(call.q)
    return AttentionSite(
        node=call.node.name,
        module=module_path(call.node),
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
        query_prefix=tokens.query_prefix,
        query_suffix=tokens.query_suffix,
        order=tokens.order,
        masked=tokens.masked,
        axes=tokens.axes,
    )


def _unrecognised(graph: fx.Graph, name: str, why: str) -> Declined:
    """A softmax over scores that no pass could read as attention; its MACs count among the model's others."""
    node = next(node for node in graph.nodes if node.name == name)
    *batch, queries, keys = (int(size) for size in node.meta["val"].shape)
    return Declined(
        node=name,
        module=module_path(node),
        reason="unrecognised",
        detail=f"softmax over scores that is not read as attention: {why}",
        batch=math.prod(batch),
        heads=1,
        query_tokens=queries,
        key_tokens=keys,
        head_dim=0,
        value_dim=0,
    )


def _own_functions(node: fx.Node) -> Declined:
    """A flex_attention call that is not plain attention; its MACs count among the model's others."""
    q, k, v = (tuple(map(int, used.meta["val"].shape)) for used in node.args[:3])  # type: ignore[union-attr]
    return Declined(
        node=node.name,
        module=module_path(node),
        reason="unrecognised",
        detail="flex_attention with a score or mask function of its own, or whose log-sum-exp is read",
        batch=q[0],
        heads=q[1],
        query_tokens=q[2],
        key_tokens=k[2],
        head_dim=q[3],
        value_dim=v[3],
    )


def _declined(call: AttentionCall, refusal: Refusal) -> Declined:
    q, k, v = (call.shape(x) for x in (call.q, call.k, call.v))
    batch = 1
    for size in q[:-3]:
        batch *= size
    return Declined(
        node=call.node.name,
        module=module_path(call.node),
        reason=refusal.reason,
        detail=refusal.detail,
        batch=batch,
        heads=q[-3] if len(q) > 2 else 1,
        query_tokens=q[-2],
        key_tokens=k[-2],
        head_dim=q[-1],
        value_dim=v[-1],
    )
