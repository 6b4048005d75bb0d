"""Detection: sites that are found, calls that must be declined and why, and grids given by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from t3compile.errors import GridError
from t3compile.geometry import GridHint, TokenGrid
from t3compile.passes.find_attention import find_attention
from t3compile.program import Program, trace
from t3compile.sites import Declined, GridAxis, SiteSurvey
from t3compile.weights import TensorWeights
from tests.tiny_models import HandWrittenDiT, tiny_wan

GRID = TokenGrid(3, 4, 5)
DIM, HEADS = 8, 2


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """[B, S, dim] -> [B, N, S, D]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Net(nn.Module):
    """Conv3d patches and projections; what is done with them is the test's own function."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.patchify = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.text_in = nn.Linear(6, DIM)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))

    def volume(self, x: Tensor) -> Tensor:
        """[B, 4, T, 2H, 2W] -> [B, T, H, W, dim]"""
        return self.patchify(x).permute(0, 2, 3, 4, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """[B, 4, T, 2H, 2W] -> [B, S, dim]"""
        return self.volume(x).flatten(1, 3)

    def qkv(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        context = x if context is None else context
        return heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))

    def attend(self, x: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        return scaled_dot_product_attention(*self.qkv(x, context), **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(self, x, y)


VIDEO = torch.randn(1, 4, 3, 8, 10)
OTHER_VIDEO = torch.randn(1, 4, 3, 8, 10)
TEXT = torch.randn(1, 7, 6)


def survey_of(
    run: Callable[..., Tensor],
    y: Tensor = TEXT,
    x: Tensor = VIDEO,
    *,
    grid: TokenGrid | None = None,
    training: bool = False,
) -> SiteSurvey:
    return find_attention(trace(Net(run).train(training), (x, y)), grid)


def only_declined(survey: SiteSurvey) -> Declined:
    assert survey.found == ()
    (declined,) = survey.declined
    return declined


def test_plain_self_attention() -> None:
    survey = survey_of(lambda net, x, y: net.attend(net.tokens(x), scale=0.3), x=VIDEO.expand(2, -1, -1, -1, -1))
    (site,) = survey.found
    assert survey.declined == ()
    assert (site.grid, site.prefix, site.suffix) == (GRID, 0, 0)
    assert (site.batch, site.heads, site.head_dim, site.value_dim) == (2, HEADS, DIM // HEADS, DIM // HEADS)
    assert (site.dtype, site.scale) == ("float32", 0.3)
    assert survey.grid_axes == (GridAxis("x", 2, 1), GridAxis("x", 3, 2), GridAxis("x", 4, 2))
    assert survey.grids == (GRID,)
    assert survey.site(site.node) is site
    assert survey.site("nothing") is None


def prefixed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(torch.cat([net.text_in(y), net.tokens(x)], 1))


def suffixed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(torch.cat([net.tokens(x), net.text_in(y)], 1))


def on_both_sides(net: Net, x: Tensor, y: Tensor) -> Tensor:
    registers = net.to_q.weight[:2].unsqueeze(0)
    return net.attend(torch.cat([registers, net.tokens(x), net.text_in(y)], 1))


def joined_after_projection(net: Net, x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(net.qkv(net.text_in(y)), net.qkv(net.tokens(x)), strict=True)
    return scaled_dot_product_attention(*(torch.cat(pair, 2) for pair in pairs))


@pytest.mark.parametrize(
    ("run", "prefix", "suffix"),
    [(prefixed, 7, 0), (suffixed, 0, 7), (on_both_sides, 2, 7), (joined_after_projection, 7, 0)],
)
def test_joint_attention_has_tokens_outside_the_grid(run: Callable[..., Tensor], prefix: int, suffix: int) -> None:
    (site,) = survey_of(run).found
    assert (site.grid, site.prefix, site.suffix) == (GRID, prefix, suffix)
    assert site.tokens == 60 + prefix + suffix


def test_image_model_has_one_frame() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patchify = nn.Conv2d(4, DIM, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = heads(self.patchify(x).flatten(2).transpose(1, 2))
            return scaled_dot_product_attention(q, q, q)

    survey = find_attention(trace(Image(), (torch.randn(2, 4, 8, 10),)))
    assert [site.grid for site in survey.found] == [TokenGrid(1, 4, 5)]
    assert survey.grid_axes == (GridAxis("x", 2, 2), GridAxis("x", 3, 2))


def test_one_frame_of_video() -> None:
    (site,) = survey_of(lambda net, x, y: net.attend(net.tokens(x)), x=VIDEO[:, :, :1]).found
    assert site.grid == TokenGrid(1, 4, 5)


def causal(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), is_causal=True)


def masked(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), attn_mask=y)


def with_dropout(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), dropout_p=0.1 if net.training else 0.0)


def grouped_query(net: Net, x: Tensor, y: Tensor) -> Tensor:
    q, k, v = net.qkv(net.tokens(x))
    return scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def windows_as_batch(net: Net, x: Tensor, y: Tensor) -> Tensor:
    volume = net.volume(x).unflatten(2, (2, 2))  # [B, T, nh, wh, W, dim]
    return net.attend(volume.transpose(1, 2).flatten(2, 4).flatten(0, 1))


def frame_wise(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).flatten(2, 3).flatten(0, 1))


def temporal_only(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).permute(0, 2, 3, 1, 4).flatten(0, 2))


def frames_as_heads(net: Net, x: Tensor, y: Tensor) -> Tensor:
    q = net.volume(x).flatten(2, 3)  # [B, T, H*W, dim]: four axes, but the second is no head
    return scaled_dot_product_attention(q, q, q)


def part_of_the_frames(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x)[:, :2].flatten(1, 3))


def rolled(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).roll(1, 2).flatten(1, 3))


def width_before_height(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).transpose(2, 3).flatten(1, 3))


def time_innermost(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).permute(0, 2, 3, 1, 4).flatten(1, 3))


def in_blocks(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """All tokens, two rows at a time: [T, nh, W, wh]."""
    return net.attend(net.volume(x).unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(1, 4))


def text_asks(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """A query stream of its own for text, on the keys of both."""
    text, video = net.text_in(y), net.tokens(x)
    return net.attend(text, torch.cat([video, text], 1))


def flipped(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).flip(1).flatten(1, 3))


def cross(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), net.text_in(y))


def keys_of_another_video(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), net.tokens(y))


def test_one_tensor_given_for_two_inputs_stays_two_inputs() -> None:
    """torch.export would read both from one placeholder, and the program would ignore the other for good."""
    net = Net(keys_of_another_video)
    program = trace(net, (VIDEO, VIDEO))
    assert [call.reason for call in find_attention(program).declined] == ["cross-attention"]
    assert torch.equal(program.module()(VIDEO, OTHER_VIDEO), net(VIDEO, OTHER_VIDEO))


def keys_in_another_order(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), net.volume(x).transpose(2, 3).flatten(1, 3))


def keys_of_unknown_order(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), net.volume(x).flip(1).flatten(1, 3))


def keys_pooled(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(x), net.volume(x)[:, :, ::2].flatten(1, 3))


def two_videos_in_one_sequence(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(torch.cat([net.tokens(x), net.tokens(y)], 1))


def keys_of_one_batch_element(net: Net, x: Tensor, y: Tensor) -> Tensor:
    q, k, v = net.qkv(net.tokens(x).expand(2, -1, -1))
    return scaled_dot_product_attention(q, k[:1], v[:1])


def one_frame_selected(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x)[:, 1].flatten(1, 2))


def frames_unbound(net: Net, x: Tensor, y: Tensor) -> Tensor:
    frames = torch.cat([frame.flatten(1, 2) for frame in net.volume(x).unbind(1)])
    return net.attend(frames)


def rolled_by_writing(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """The empty tensor says nothing of order, but its rows are tokens of another place."""
    tokens = net.tokens(x)
    moved = torch.empty_like(tokens)
    moved[:, :30] = tokens[:, 30:]
    moved[:, 30:] = tokens[:, :30]
    return net.attend(moved + 0 * tokens)


def permuted_by_matmul(net: Net, x: Tensor, y: Tensor) -> Tensor:
    tokens = net.tokens(x)
    permutation = torch.eye(60).flip(0)
    return net.attend(permutation @ tokens + 0 * tokens)


def three_axes(net: Net, x: Tensor, y: Tensor) -> Tensor:
    q = net.to_q(net.tokens(x))
    return scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize(
    ("run", "y", "reason", "detail"),
    [
        (causal, TEXT, "causal", "is_causal"),
        (masked, torch.zeros(60, 60), "masked", "grid keys 0..59 may be hidden or weighted by input 'y'"),
        (with_dropout, TEXT, "dropout", "dropout 0.1: trace the model in eval mode"),
        (grouped_query, TEXT, "grouped-query", "2 query heads on 1 key heads"),
        (windows_as_batch, TEXT, "already-windowed", "2 of axis 3 of input 'x'"),
        (frame_wise, TEXT, "already-windowed", "4 of axis 3 of input 'x' x 5 of axis 4"),
        (temporal_only, TEXT, "already-windowed", "3 of axis 2 of input 'x'"),
        (frames_as_heads, TEXT, "already-windowed", "tokens attend within parts"),
        (part_of_the_frames, TEXT, "already-windowed", "2 of axis 2 of input 'x'"),
        (rolled, TEXT, "unknown-layout", "the order of the tokens is lost"),
        (in_blocks, TEXT, "unknown-layout", "order of blocks, not of rows: 3 of axis 2 .* 2 of axis 3 .* 2 of axis 3"),
        (flipped, TEXT, "unknown-layout", "aten.flip"),
        (cross, TEXT, "cross-attention", "60 queries on 7 keys: 7 of axis 1 of input 'y' as keys"),
        (keys_of_another_video, OTHER_VIDEO, "cross-attention", "axis 2 of input 'y'"),
        (keys_in_another_order, TEXT, "unknown-layout", "3 of axis 2 .* 5 of axis 4 .* 4 of axis 3"),
        (keys_of_unknown_order, TEXT, "unknown-layout", "aten.flip"),
        (keys_pooled, TEXT, "cross-attention", "60 queries on 30 keys"),
        (two_videos_in_one_sequence, OTHER_VIDEO, "two-grids", "choose with --grid 3x4x5@0 or 3x4x5@60"),
        (text_asks, TEXT, "text-queries", "queries are 7 of axis 1 of input 'y'"),
        (keys_of_one_batch_element, TEXT, "unknown-layout", "queries of batch 2 on keys of batch 1"),
        (one_frame_selected, TEXT, "already-windowed", "4 of axis 3 of input 'x' x 5 of axis 4"),
        (frames_unbound, TEXT, "already-windowed", "4 of axis 3 of input 'x' x 5 of axis 4"),
        (rolled_by_writing, TEXT, "unknown-layout", "the order of the tokens is lost"),
        (permuted_by_matmul, TEXT, "unknown-layout", "the order of the tokens is lost"),
        (three_axes, TEXT, "unknown-layout", "queries have 3 axes"),
    ],
)
def test_must_not_fire(run: Callable[..., Tensor], y: Tensor, reason: str, detail: str) -> None:
    declined = only_declined(survey_of(run, y, training=run is with_dropout))
    assert declined.reason == reason
    assert re.search(detail, declined.detail), declined.detail


def padded_to_patches(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(nn.functional.pad(x[..., :-1, :-1], (0, 1, 0, 1))))


def first_frame_repeated(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.tokens(nn.functional.avg_pool3d(torch.cat([x[:, :, :1], x], 2), (2, 1, 1))))


@pytest.mark.parametrize(
    ("run", "grid"), [(padded_to_patches, GRID), (first_frame_repeated, TokenGrid(2, 4, 5))], ids=["space", "time"]
)
def test_an_axis_made_longer_before_it_is_cut_into_patches(run: Callable[..., Tensor], grid: TokenGrid) -> None:
    (site,) = survey_of(run).found
    assert (site.grid, site.prefix, site.suffix) == (grid, 0, 0)


def test_dropout_of_an_eval_model_is_no_dropout() -> None:
    assert len(survey_of(with_dropout).found) == 1


def test_declined_calls_keep_the_numbers_that_cost_needs() -> None:
    declined = only_declined(survey_of(cross, x=VIDEO.expand(2, -1, -1, -1, -1), y=TEXT.expand(2, -1, -1)))
    assert (declined.batch, declined.heads, declined.query_tokens, declined.key_tokens) == (2, HEADS, 60, 7)
    assert (declined.head_dim, declined.value_dim) == (4, 4)
    assert not declined.is_candidate
    assert only_declined(survey_of(causal)).is_candidate


def test_text_that_attends_to_itself_beside_a_video_is_no_candidate() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(net.tokens(x)).sum() + net.attend(net.text_in(y)).sum()

    survey = survey_of(run)
    assert [site.grid for site in survey.found] == [GRID]
    assert [(call.reason, call.query_tokens) for call in survey.declined] == [("other-tokens", 7)]
    assert not survey.declined[0].is_candidate


def test_masked_text_is_no_candidate_but_masked_video_is() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        bias = net.to_q.weight[:1, :1]
        text = net.attend(net.text_in(y), attn_mask=bias.expand(7, 7))
        return net.attend(net.tokens(x)).sum() + text.sum() + net.attend(net.tokens(x), attn_mask=bias.expand(60, 60))

    assert [(c.reason, c.query_tokens) for c in survey_of(run).declined] == [("other-tokens", 7), ("masked", 60)]


def flat(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.text_in(y))


FLAT = torch.randn(1, 60, 6)


def test_flat_tokens_need_a_grid_from_the_user() -> None:
    declined = only_declined(survey_of(flat, FLAT))
    assert declined.reason == "no-grid"
    assert "axis 1 of input 'y', a flat sequence of 60 without positions: give --grid TxHxW" in declined.detail
    (site,) = survey_of(flat, FLAT, grid=TokenGrid(5, 3, 4)).found
    assert (site.grid, site.prefix, site.suffix) == (TokenGrid(5, 3, 4), 0, 0)


def test_grid_from_the_user_beside_registers() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(torch.cat([net.to_q.weight[:2].unsqueeze(0), net.text_in(y)], 1))

    (site,) = survey_of(run, FLAT, grid=TokenGrid(5, 3, 4)).found
    assert (site.grid, site.prefix, site.suffix) == (TokenGrid(5, 3, 4), 2, 0)


def test_grid_that_fits_no_sequence_is_an_error_with_the_numbers() -> None:
    with pytest.raises(GridError, match=r"grid 5x3x5 has 75 tokens.*have 60 query tokens"):
        survey_of(flat, FLAT, grid=TokenGrid(5, 3, 5))
    with pytest.raises(GridError, match=r"grid 3x4x6 has 72 tokens.*have 60 query tokens"):
        survey_of(lambda net, x, y: net.attend(net.tokens(x)), grid=TokenGrid(3, 4, 6))


def test_grid_that_contradicts_the_graph_is_an_error() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(net.tokens(x))

    with pytest.raises(GridError, match=r"--grid 3x5x4 contradicts the grid 3x4x5.*leave --grid out"):
        survey_of(run, grid=TokenGrid(3, 5, 4))
    assert survey_of(run, grid=GRID) == survey_of(run)


@pytest.mark.parametrize("run", [frame_wise])
def test_grid_from_the_user_does_not_overrule_a_known_other_order(run: Callable[..., Tensor]) -> None:
    with pytest.raises(GridError):
        survey_of(run, grid=GRID)


class Block(nn.Module):
    def __init__(self, with_attention: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)
        self.with_attention = with_attention

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.proj(x))
        if not self.with_attention:
            return x + self.proj(x)
        return x + scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Stacks(nn.Module):
    def __init__(self, **stacks: list[nn.Module]) -> None:
        super().__init__()
        self.patchify = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.names = list(stacks)
        for name, blocks in stacks.items():
            self.add_module(name, nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify(x).flatten(2).transpose(1, 2)
        for name in self.names:
            for block in self.get_submodule(name):  # type: ignore[attr-defined]
                x = block(x)
        return x


def places(program: Program) -> list[tuple[str, str, int]]:
    return [(site.module, site.stack, site.index) for site in find_attention(program).found]


def test_stacks_count_their_blocks_from_zero_each() -> None:
    model = Stacks(pairs=[Block(), Block()], alone=[Block(), Block(), Block()])
    assert places(trace(model, (VIDEO,))) == [
        ("pairs.0", "pairs.*", 0),
        ("pairs.1", "pairs.*", 1),
        ("alone.0", "alone.*", 0),
        ("alone.1", "alone.*", 1),
        ("alone.2", "alone.*", 2),
    ]


def test_index_is_the_number_of_the_block_not_the_rank_of_the_call() -> None:
    model = Stacks(blocks=[Block(), Block(with_attention=False), Block()])
    assert [index for _, _, index in places(trace(model, (VIDEO,)))] == [0, 2]


def test_graph_module_of_symbolic_trace() -> None:
    model = Stacks(blocks=[Block(), Block()])
    survey = find_attention(trace(torch.fx.symbolic_trace(model), (VIDEO,)))
    assert [(site.grid, site.index) for site in survey.found] == [(GRID, 0), (GRID, 1)]


@pytest.mark.parametrize("grid", [(3, 4, 4), (2, 3, 5), (1, 4, 6)])
def test_published_architecture(grid: tuple[int, int, int]) -> None:
    model, inputs = tiny_wan(layers=3, grid=grid)
    survey = find_attention(trace(model, (), inputs))
    assert [(site.grid, site.prefix, site.suffix, site.index) for site in survey.found] == [
        (TokenGrid(*grid), 0, 0, i) for i in range(3)
    ]
    assert {site.stack for site in survey.found} == {"blocks.*.attn1"}
    assert [(call.reason, call.module) for call in survey.declined] == [
        ("cross-attention", f"blocks.{i}.attn2") for i in range(3)
    ]


def test_hand_written_model_with_patched_time() -> None:
    model = HandWrittenDiT(layers=2, grid=(2, 3, 5), patch=(2, 2, 1), batch=2).eval()
    survey = find_attention(trace(model, model.example_inputs()))
    assert [(site.grid, site.batch) for site in survey.found] == [(TokenGrid(2, 3, 5), 2)] * 2
    assert [axis.patch for axis in survey.grid_axes] == [2, 2, 1]


def test_detection_does_not_edit() -> None:
    model = HandWrittenDiT(layers=1).eval()
    program = trace(model, model.example_inputs())
    before, text = program.fingerprint(), str(program.graph)
    metas = [dict(node.meta) for node in program.graph.nodes]
    assert find_attention(program).fingerprint == before == program.fingerprint()
    assert find_attention(program) == find_attention(program)
    assert str(program.graph) == text
    assert [dict(node.meta) for node in program.graph.nodes] == metas


def test_counts_leave_attention_out() -> None:
    net = Net(lambda net, x, y: net.attend(net.tokens(x)))
    counts = find_attention(trace(net, (VIDEO, TEXT))).counts
    assert counts.parameters == sum(p.numel() for p in net.parameters())
    assert counts.weight_bytes == 4 * counts.parameters
    # 60 patches of 16 values, and three projections of 60 tokens
    assert counts.other_macs == 60 * DIM * 16 + 3 * 60 * DIM * DIM


def test_dynamic_shapes_are_refused_with_the_node() -> None:
    net = Net(lambda net, x, y: net.attend(net.tokens(x)))
    batch = torch.export.Dim("batch", min=2, max=8)
    x = VIDEO.expand(2, -1, -1, -1, -1).contiguous()
    exported = torch.export.export(net, (x, TEXT), dynamic_shapes=({0: batch}, None)).run_decompositions({})
    program = Program(exported, TensorWeights(dict(exported.state_dict)), "test")
    with pytest.raises(GridError, match=r"dynamic shapes .first at node 'x'.*trace with static shapes"):
        find_attention(program)


def test_model_without_attention() -> None:
    survey = find_attention(trace(nn.Linear(3, 3), (torch.randn(2, 3),)), GRID)
    assert (survey.found, survey.declined, survey.grids) == ((), (), ())


def test_a_given_grid_may_refine_a_flattened_axis() -> None:
    class FlatSpace(nn.Module):
        """Latents [B, C, T, H*W]: the graph tells frames from space, not rows from columns."""

        def forward(self, x: Tensor) -> Tensor:
            q = x.flatten(2).transpose(1, 2).unsqueeze(1)
            return scaled_dot_product_attention(q, q, q)

    program = trace(FlatSpace(), (torch.randn(1, 8, 3, 20),))
    (site,) = find_attention(program).found
    assert site.grid == TokenGrid(1, 3, 20)
    (site,) = find_attention(program, TokenGrid(3, 4, 5)).found
    assert site.grid == TokenGrid(3, 4, 5)
    with pytest.raises(GridError, match="contradicts"):
        find_attention(program, TokenGrid(4, 3, 5))


@pytest.mark.parametrize(("run", "order"), [(width_before_height, "twh"), (time_innermost, "hwt")])
def test_any_order_of_rows_is_a_grid_with_its_order(run: Callable[..., Tensor], order: str) -> None:
    (site,) = survey_of(run).found
    assert (site.grid, site.order) == (GRID, order)
    assert survey_of(run, grid=GRID) == survey_of(run)


def reordered_by_index(net: Net, x: Tensor, y: Tensor) -> Tensor:
    index = torch.arange(60).view(3, 4, 5).permute(1, 2, 0).flatten()
    return net.attend(net.tokens(x)[:, index])


def reordered_by_gather(net: Net, x: Tensor, y: Tensor) -> Tensor:
    index = torch.arange(60).view(3, 4, 5).permute(1, 2, 0).flatten()
    tokens = net.tokens(x)
    return net.attend(tokens.gather(1, index[None, :, None].expand(*tokens.shape)))


@pytest.mark.parametrize("run", [reordered_by_index, reordered_by_gather])
def test_constant_indices_are_followed(run: Callable[..., Tensor]) -> None:
    (site,) = survey_of(run).found
    assert (site.grid, site.order) == (GRID, "hwt")


def with_reference_frame(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """A frame of another input put before the others along the time axis."""
    return net.attend(torch.cat([net.volume(y)[:, :1], net.volume(x)], 1).flatten(1, 3))


def with_padding(net: Net, x: Tensor, y: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(net.volume(x), (0, 0, 0, 1, 0, 2))  # W by one, H by two
    return net.attend(padded.flatten(1, 3))


@pytest.mark.parametrize(("run", "grid"), [(with_reference_frame, (4, 4, 5)), (with_padding, (3, 6, 6))])
def test_a_lengthened_axis_is_the_grids(run: Callable[..., Tensor], grid: tuple[int, int, int]) -> None:
    (site,) = survey_of(run, OTHER_VIDEO).found
    assert (site.grid, site.prefix, site.suffix, site.axes) == (TokenGrid(*grid), 0, 0, ())


def test_reference_tokens_stay_global_and_the_largest_grid_is_windowed() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(torch.cat([net.tokens(y), net.tokens(x)], 1))

    (site,) = survey_of(run, OTHER_VIDEO[:, :, :2]).found
    assert (site.grid, site.prefix, site.suffix) == (GRID, 40, 0)


def test_frames_moved_to_the_front_are_still_all_frames() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        volume = net.volume(x)
        return net.attend(torch.cat([volume[:, 2:], volume[:, :2]], 1).flatten(1, 3))

    (site,) = survey_of(run).found
    assert (site.grid, site.prefix, site.suffix) == (TokenGrid(2, 4, 5), 20, 0)


def test_video_queries_of_their_own_on_joint_keys() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        text, video = net.text_in(y), net.tokens(x)
        joint = torch.cat([text, video], 1)
        return net.attend(video, joint).sum() + net.attend(text, joint).sum()

    survey = survey_of(run)
    (site,) = survey.found
    assert (site.prefix, site.suffix, site.query_prefix, site.query_suffix) == (7, 0, 0, 0)
    assert [call.reason for call in survey.declined] == ["text-queries"]
    assert not survey.declined[0].is_candidate


def raster(*sizes: int) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)  # [S, axes]


class Packed(nn.Module):
    """Flat latents [B, S, 6] with rotary positions of any making, after text."""

    def __init__(self, positions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.positions = positions
        self.inner = nn.Linear(6, 8)

    def forward(self, latents: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        angles = self.positions(ids)  # [S_text + S, 4]
        x = self.inner(torch.cat([text, latents], 1)).unflatten(-1, (2, 4)).transpose(1, 2)
        q = x * angles.cos() + x.flip(-1) * angles.sin()
        return scaled_dot_product_attention(q, q, x)


def angles_of(ids: Tensor) -> Tensor:
    text = torch.zeros(7, ids.shape[-1])
    return torch.cat([text, ids.float()]) @ torch.tensor([[1.0, 0, 0], [0, 0.7, 0], [0, 0.31, 0], [0, 0, 0.9]]).T


def packed(positions: Callable[[Tensor], Tensor] = angles_of, ids: Tensor | None = None) -> SiteSurvey:
    ids = raster(3, 4, 5) if ids is None else ids
    return find_attention(trace(Packed(positions).eval(), (torch.randn(1, 60, 6), torch.randn(1, 7, 6), ids)))


def test_positions_among_the_inputs_tell_the_grid_of_packed_latents() -> None:
    survey = packed()
    (site,) = survey.found
    assert (site.grid, site.prefix, site.suffix, site.order) == (GRID, 7, 0, "thw")
    assert len(survey.assumptions) == 1
    assert "3x4x5 is read from the example values of input 'ids'" in survey.assumptions[0]


def test_constant_tables_tell_the_grid_without_an_assumption() -> None:
    survey = packed(lambda ids: angles_of(raster(3, 4, 5) * 0.37 - 1))
    assert [(site.grid, site.prefix) for site in survey.found] == [(GRID, 7)]
    assert survey.assumptions == ()


@pytest.mark.parametrize(
    "ids",
    [torch.arange(60)[:, None].expand(60, 3), torch.zeros(60, 3), raster(3, 4, 5)[torch.randperm(60)]],
    ids=["diagonal", "zero", "shuffled"],
)
def test_positions_that_are_no_raster_tell_nothing(ids: Tensor) -> None:
    survey = packed(ids=ids)
    assert survey.found == ()
    assert [call.reason for call in survey.declined] == ["no-grid"]


def test_text_and_latents_in_one_packed_input() -> None:
    """Text stands in the first rows of the latents' own sequence; only the positions tell them apart."""

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            q = heads(self.inner(x)) * ids.float().cos()
            return scaled_dot_product_attention(q, q, q)

    ids = torch.cat([torch.arange(9)[:, None].expand(9, 3), raster(3, 4, 5) + 100])
    (site,) = find_attention(trace(Joint(), (torch.randn(1, 69, 6), ids))).found
    assert (site.grid, site.prefix, site.suffix) == (GRID, 9, 0)


def test_a_given_start_says_where_the_grid_is() -> None:
    def run(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(net.text_in(y))

    def found(hint: str) -> tuple[int, int]:
        (site,) = find_attention(trace(Net(run), (VIDEO, torch.randn(1, 72, 6))), GridHint.parse(hint)).found
        assert site.grid == GRID
        return site.prefix, site.suffix

    assert found("3x4x5@9") == (9, 3)
    assert found("3x4x5@0") == (0, 12)
    with pytest.raises(GridError, match=r"grid 3x4x5@13 has 60 tokens"):
        found("3x4x5@13")
    with pytest.raises(GridError, match=r"grid 3x4x5 has 60 tokens.*72 query tokens"):
        found("3x4x5")


def test_a_given_start_chooses_between_two_grids() -> None:
    program = trace(Net(two_videos_in_one_sequence), (VIDEO, OTHER_VIDEO))
    for start in (0, 60):
        (site,) = find_attention(program, GridHint(GRID, start)).found
        assert (site.prefix, site.suffix) == (start, 60 - start)


def test_layers_in_stages_are_stacks_of_their_own() -> None:
    model = Stacks(stages=[nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block(), Block())])
    assert places(trace(model, (VIDEO,))) == [
        ("stages.0.0", "stages.0.*", 0),
        ("stages.0.1", "stages.0.*", 1),
        ("stages.1.0", "stages.1.*", 0),
        ("stages.1.1", "stages.1.*", 1),
        ("stages.1.2", "stages.1.*", 2),
    ]


def test_a_block_that_is_called_again_counts_on() -> None:
    model = Stacks(blocks=[Block(), Block()])
    model.blocks.append(model.blocks[0])  # type: ignore[union-attr, operator]
    assert sorted(index for _, _, index in places(trace(model, (VIDEO,)))) == [0, 1, 2]
