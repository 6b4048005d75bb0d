"""Layouts: the algebra of axes against numpy, and traced modules whose token order is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from t3compile.passes.layout import (
    ONE,
    Axis,
    Digit,
    Layout,
    Origin,
    concatenate,
    input_axis,
    join,
    product,
    unknown_axis,
)
from t3compile.passes.track_layout import LayoutTracker
from t3compile.program import trace, user_input_names
from tests.tiny_models import tiny_wan


def values(axis: Axis) -> list[dict[tuple[str, int], set[int]]]:
    """For each position, the indices of every input axis that it may stand for: the meaning, spelled out."""
    listed = []
    for segment in axis.segments:
        for digits in itertools.product(*(range(digit.size) for digit in segment)):
            meaning: dict[tuple[str, int], set[int]] = {}
            for digit, value in zip(segment, digits, strict=True):
                key = (str(digit.origin.input_name), digit.origin.axis)
                length, step = digit.origin.length, digit.stride
                # An outer digit says which block of the axis, an inner one which place in each block.
                period = step * digit.size if digit.start == 0 else length
                place = digit.start + value
                allowed = {i for i in range(length) if (i % period if digit.start == 0 else i) // step == place}
                meaning[key] = meaning.get(key, set(range(length))) & allowed
            listed.append(meaning)
    return listed


T, H, W = (input_axis("x", i, size) for i, size in ((2, 3), (3, 8), (4, 10)))


def test_values_of_a_whole_axis_are_its_indices() -> None:
    assert values(T) == [{("x", 2): {i}} for i in range(3)]


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (2, 2, 2), (1, 8), (8, 1), (2, 1, 4)])
def test_split_is_row_major_and_product_undoes_it(sizes: tuple[int, ...]) -> None:
    parts = H.split(sizes)
    assert parts is not None
    assert [part.size for part in parts] == list(sizes)
    for position, indices in enumerate(itertools.product(*map(range, sizes))):
        allowed = set(range(8))
        for part, i in zip(parts, indices, strict=True):
            allowed &= values(part)[i].get(("x", 3), allowed)
        assert allowed == {position}
    assert product(parts) == H


def test_split_across_a_product() -> None:
    """[T*H] as [6, 4]: the outer part holds T and half of H."""
    merged = product([T, H])
    assert merged.split([3, 8]) == [T, H]
    halves = H.split([2, 4])
    assert halves is not None
    assert merged.split([6, 4]) == [product([T, halves[0]]), halves[1]]


def test_split_that_cuts_no_whole_digit_is_unknown() -> None:
    merged = product([T, H])
    assert merged.split([8, 3]) is None
    assert merged.split([4, 6]) is None
    assert concatenate([T, H]).split([11, 1]) == [concatenate([T, H]), ONE]


def test_parts_of_a_rolled_axis_make_it_again() -> None:
    start, end = H.slice(0, 1), H.slice(1, 8)
    assert start is not None and end is not None
    rolled = concatenate([end, start])
    parts = rolled.split([4, 2])
    assert parts is not None
    assert not any(part.is_known for part in parts)
    assert product(parts) == rolled
    assert product(parts[::-1]) not in (rolled, H)


def test_split_of_a_stretch_needs_it_to_start_on_a_part() -> None:
    aligned, shifted = H.slice(4, 8), H.slice(1, 5)
    assert aligned is not None
    assert shifted is not None
    origin = Origin("x", 3, 8)
    assert aligned.split([2, 2]) == [Axis(((Digit(origin, 2, 2, 4, 2),),)), Axis(((Digit(origin, 1, 2, 2),),))]
    assert shifted.split([2, 2]) is None


def test_slice_takes_stretches_of_concatenations() -> None:
    sequence = concatenate([input_axis("text", 1, 7), T, W])
    assert sequence.size == 20
    assert sequence.slice(0, 7) == input_axis("text", 1, 7)
    assert sequence.slice(7, 10) == T
    assert sequence.slice(7, 20) == concatenate([T, W])
    part = sequence.slice(8, 10)
    assert part is not None
    assert values(part) == [{("x", 2): {1}}, {("x", 2): {2}}]
    assert sequence.slice(5, 5) == Axis(())


def test_slice_of_a_product_keeps_whole_rows_or_one() -> None:
    merged = product([T, H])
    two = merged.slice(8, 24)
    assert two is not None
    assert values(two) == values(merged)[8:24]
    inside = merged.slice(9, 12)
    assert inside is not None
    assert values(inside) == values(merged)[9:12]
    assert merged.slice(4, 12) is None


def test_stretches_that_go_on_are_joined_again() -> None:
    pieces = [T.slice(0, 1), T.slice(1, 3)]
    assert all(piece is not None for piece in pieces)
    first, rest = (piece for piece in pieces if piece is not None)
    assert concatenate([first, rest]) == T
    assert concatenate([rest, first]) != T
    assert concatenate([rest, first]).size == 3


REFERENCE = input_axis("reference", 2, 1 + 1)


def test_product_of_an_outer_concatenation_is_a_concatenation() -> None:
    assert product([concatenate([T, H]), W]) == concatenate([product([T, W]), product([H, W])])
    assert product([ONE, concatenate([T, H]), ONE]) == concatenate([T, H])


def test_a_lengthened_axis_is_one_digit_until_it_is_cut_again() -> None:
    longer = concatenate([REFERENCE, T])
    merged = product([longer, H, W])
    assert [digit.size for digit in merged.segments[0]] == [5, 8, 10]
    assert all(digit.is_whole for digit in merged.segments[0])
    assert str(merged.segments[0][0].origin) == "lengthened axis 2 of input 'x'"
    assert merged.split([5, 8, 10]) == [longer, H, W]
    assert merged.slice(2 * 80, 5 * 80) == product([T, H, W])
    inner = product([H, concatenate([REFERENCE, T])])
    assert inner.split([8, 5]) == [H, longer]


def test_an_inner_concatenation_of_other_things_is_lost() -> None:
    text = input_axis("text", 1, 7)
    for beside in (concatenate([text, W]), concatenate([W.slice(5, 10) or W, W.slice(0, 5) or W])):
        merged = product([H, beside])
        assert not merged.segments[0][1].origin.is_known
        assert merged.reach == beside.reach | H.reach
        assert merged.split([8, beside.size]) == [H, beside]


def test_two_reversals_are_none() -> None:
    assert H.reversed() != H
    assert not H.reversed().is_known
    assert H.reversed().reversed() == H
    turned = product([T, H.reversed()])
    assert turned.split([3, 8])[1].reversed() == H  # type: ignore[index]
    assert join(H, H.reversed()) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_taking_positions_in_another_order_permutes_the_digits(order: tuple[int, int, int]) -> None:
    tokens = product([T, H, W])
    index = np.arange(240).reshape(3, 8, 10).transpose(order).flatten().tolist()
    assert tokens.take(index) == product([(T, H, W)[i] for i in order])
    text = input_axis("text", 1, 7)
    assert concatenate([text, tokens]).take([*(i + 7 for i in index), *range(7)]) == concatenate(
        [product([(T, H, W)[i] for i in order]), text]
    )


def test_taking_stretches_and_what_is_no_order() -> None:
    assert T.take([1, 2]) == T.slice(1, 3)
    assert T.take([0, 1, 2]) == T
    assert product([T, H]).take([8, 9, 10, 11, 12, 13, 14, 15]) == product([T, H]).slice(8, 16)
    shuffled = np.random.default_rng(0).permutation(240).tolist()
    assert product([T, H, W]).take(shuffled) is None


def test_product_of_nothing() -> None:
    assert product([]) == product([ONE, ONE]) == Axis(((),))


def test_join_believes_the_known_and_not_the_lost() -> None:
    table, other = (unknown_axis(name, 0, 8) for name in ("table", "another"))
    lost = unknown_axis("op", 0, 8, frozenset({"x"}))
    assert join(H, H) == H
    assert join(H, table) == join(table, H) == H
    assert join(table, other) == table
    assert join(lost, table) == join(table, lost) == lost
    assert join(H, lost) is None
    assert join(lost, H) is None
    of_another_input = unknown_axis("op", 0, 8, frozenset({"timestep"}))
    assert join(of_another_input, H) == join(H, of_another_input) == H
    text = input_axis("text", 1, 7)
    left = concatenate([text, unknown_axis("op", 0, 8)])
    right = concatenate([unknown_axis("op", 1, 7), H])
    assert join(left, right) == concatenate([text, H])
    assert join(concatenate([text, H]), concatenate([H, text])) is None


def test_join_of_two_inputs_needs_the_same_cut() -> None:
    grid, swapped = product([T, H]), product([input_axis("y", 3, 8), input_axis("y", 2, 3)])
    control = product([input_axis("y", 2, 3), input_axis("y", 3, 8)])
    assert join(H, input_axis("y", 3, 8)) == H
    assert join(grid, control) == grid
    assert join(grid, swapped) is None
    flat = input_axis("timestep", 1, 24)
    assert join(flat, grid) == join(grid, flat) == grid
    with_text = concatenate([input_axis("text", 1, 7), grid])
    assert join(input_axis("timestep", 1, 31), with_text) == with_text
    per_frame = product([input_axis("timestep", 1, 3), unknown_axis("repeat", 0, 8)])
    assert join(per_frame, grid) == join(grid, per_frame) == grid
    part = product([T.slice(0, 2) or T, input_axis("table", 0, 384).slice(0, 12) or T])
    assert join(part, grid) is None
    rows = product([input_axis("table", 0, 384).slice(0, 3) or T, input_axis("table", 1, 384).slice(0, 8) or T])
    assert join(rows, grid) == join(grid, rows) == grid
    same_input_flat = input_axis("x", 1, 24)
    assert join(same_input_flat, grid) is None


def test_the_inner_digit_of_a_split_is_not_a_stretch() -> None:
    halves = H.split([2, 4])
    assert halves is not None
    inner, stretch, rest = halves[1], H.slice(0, 4), H.slice(4, 8)
    assert stretch is not None
    assert rest is not None
    assert inner != stretch
    assert concatenate([stretch, rest]) == H
    assert concatenate([inner, rest]) != H
    assert product([halves[0], inner]) == H
    assert product([halves[0], stretch]) != H


def test_sizes_of_one_carry_no_meaning() -> None:
    assert input_axis("x", 0, 1) == unknown_axis("op", 0, 1) == ONE
    assert not ONE.is_known
    assert H.is_known
    assert not unknown_axis("op", 0, 2).is_known
    assert Digit(Origin("x", 3, 8), 1, 8, 8).is_whole
    assert Digit(Origin("x", 3, 8), 2, 4, 4).is_whole
    assert not Digit(Origin("x", 3, 8), 2, 3, 4).is_whole
    assert not Digit(Origin("x", 3, 8), 1, 4, 4).is_whole
    assert not Digit(Origin("x", 3, 8), 1, 4, 8, 4).is_whole


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, a permutation, and another shape with as many elements."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    rest, target = math.prod(shape), []
    while rest > 1:
        factor = draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        target.append(factor)
        rest //= factor
    return shape, order, tuple(target) or (1,)


class Reshaped(nn.Module):
    def __init__(self, order: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        self.order, self.target = order, target

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(self.target) + 0


@given(reshapes())
@settings(max_examples=25, deadline=None)
def test_permute_and_reshape_are_exact_where_they_are_known(case: tuple[tuple[int, ...], ...]) -> None:
    """What the layout says about each element is where numpy finds it."""
    shape, order, target = case
    layout = layout_of(Reshaped(order, target), torch.zeros(shape))
    moved = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(target)
    for position in itertools.product(*map(range, target)):
        true = np.unravel_index(int(moved[position]), shape)
        for axis, i in zip(layout, position, strict=True):
            for (name, source), allowed in values(axis)[i].items() if axis.is_known else ():
                assert name == "None" or true[source] in allowed


def layout_of(module: nn.Module, *inputs: Tensor) -> Layout:
    """Layout of the first output."""
    program = trace(module.eval(), inputs)
    tracker = LayoutTracker(program.graph, user_input_names(program.exported))
    (returned,) = program.graph.output_node().args
    return tracker.layout(returned[0])  # type: ignore[index, arg-type]


def patched(position: int, length: int, patch: int, name: str = "x") -> Axis:
    """Patches of `patch` of one input axis."""
    return Axis.of((Digit(Origin(name, position, length), patch, length // patch, length // patch),))


def row_major(*axes: Axis) -> Axis:
    return product(axes)


class Function(nn.Module):
    """A function with a few layers at hand."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv3d = nn.Conv3d(2, 6, (1, 2, 2), (1, 2, 2))
        self.conv2d = nn.Conv2d(2, 6, 2, 2)
        self.linear = nn.Linear(8, 6)
        self.text = nn.Linear(5, 6)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


VIDEO, TEXT = torch.randn(1, 2, 3, 8, 10), torch.randn(1, 7, 5)
GRID = row_major(patched(2, 3, 1), patched(3, 8, 2), patched(4, 10, 2))
# Inputs of a variadic forward are called inputs_0, inputs_1.
X, Y = "inputs_0", "inputs_1"


def of_x(axis: Axis) -> Axis:
    """The same axis with input x called as a variadic forward calls it."""
    names = {"x": X, "text": Y}
    return Axis(
        tuple(
            tuple(
                Digit(
                    Origin(names[str(d.origin.input_name)], d.origin.axis, d.origin.length),
                    d.stride,
                    d.size,
                    d.modulus,
                    d.start,
                )
                for d in segment
            )
            for segment in axis.segments
        )
    )


def conv3d(net: Function, x: Tensor) -> Tensor:
    return net.conv3d(x).flatten(2).transpose(1, 2)


def reshape_and_linear(net: Function, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    patches = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return net.linear(patches.reshape(b, t * (h // 2) * (w // 2), 8))


def conv2d_per_frame(net: Function, x: Tensor) -> Tensor:
    b, _, t, _, _ = x.shape
    frames = net.conv2d(x.transpose(1, 2).flatten(0, 1))
    return frames.flatten(2).transpose(1, 2).unflatten(0, (b, t)).flatten(1, 2)


def slices_of_text_and_back(net: Function, x: Tensor, text: Tensor) -> Tensor:
    joined = torch.cat([net.text(text), conv3d(net, x)], 1)
    return joined[:, 7:]


def split_back(net: Function, x: Tensor, text: Tensor) -> Tensor:
    return torch.cat([net.text(text), conv3d(net, x)], 1).split([7, 60], dim=1)[1]


def through_heads(net: Function, x: Tensor) -> Tensor:
    tokens = conv3d(net, x)
    q, k = tokens.unflatten(-1, (2, 3)).transpose(1, 2), tokens.unflatten(-1, (2, 3)).transpose(1, 2)
    out = nn.functional.scaled_dot_product_attention(q, k, k)
    return tokens + out.transpose(1, 2).flatten(2)


def rolled_there_and_back(net: Function, x: Tensor) -> Tensor:
    volume = net.conv3d(x).permute(0, 2, 3, 4, 1)
    return volume.roll(1, 2).roll(-1, 2).flatten(1, 3)


def rotated(net: Function, x: Tensor) -> Tensor:
    """Wan's RoPE: every second channel of an empty tensor is written."""
    tokens = conv3d(net, x)
    out = torch.empty_like(tokens)
    out[..., 0::2] = tokens[..., 0::2] * 2
    out[..., 1::2] = tokens[..., 1::2] * 3
    return out


def windows_there_and_back(net: Function, x: Tensor) -> Tensor:
    volume = net.conv3d(x).permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
    windows = volume.unflatten(3, (5, 1)).unflatten(2, (2, 2)).permute(0, 2, 4, 1, 3, 5, 6).flatten(0, 2)
    whole = windows.unflatten(0, (1, 2, 5)).permute(0, 3, 1, 4, 2, 5, 6)
    return whole.flatten(4, 5).flatten(2, 3).flatten(1, 3)


def shifted_windows_there_and_back(net: Function, x: Tensor) -> Tensor:
    volume = net.conv3d(x).permute(0, 2, 3, 4, 1).roll((1, 2), (2, 3))
    windows = volume.unflatten(2, (2, 2)).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)
    whole = windows.unflatten(0, (1, 2)).permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
    return whole.roll((-1, -2), (2, 3)).flatten(1, 3)


def unit_vectors(net: Function, x: Tensor) -> Tensor:
    return nn.functional.normalize(conv3d(net, x), dim=-1)


def coarse_beside_fine(net: Function, x: Tensor) -> Tensor:
    """A decoder that spreads channels over patches, beside the finer stage that they came from."""
    fine = net.conv3d(x).permute(0, 2, 3, 4, 1)  # [B, T, 4, 4, C]
    coarse = fine.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
    spread = nn.functional.linear(coarse, x.new_ones(24, 24)).unflatten(4, (2, 2, 6))
    return (fine + spread.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)).flatten(1, 3)


def upsampled_beside_fine(net: Function, x: Tensor) -> Tensor:
    frame = net.conv2d(x[:, :, 0])  # [B, C, 4, 4]
    coarse = nn.functional.avg_pool2d(frame, 2)
    larger = nn.functional.conv_transpose2d(coarse, x.new_ones(6, 6, 2, 2), stride=2)
    nearest = nn.functional.interpolate(coarse, scale_factor=2, mode="nearest")
    shuffled = nn.functional.pixel_shuffle(coarse.repeat(1, 4, 1, 1), 2)
    normed = nn.functional.batch_norm(frame, x.new_zeros(6), x.new_ones(6))
    return (normed + larger + nearest + shuffled).flatten(2).transpose(1, 2)


def padded_and_cropped(net: Function, x: Tensor) -> Tensor:
    return nn.functional.pad(conv3d(net, x), (0, 0, 2, 3))[:, 2:-3]


def halved_and_split_again(net: Function, x: Tensor) -> Tensor:
    """Four channels of a coarser patch are spread over its four patches, beside those that were skipped to them."""
    y = net.text(nn.functional.avg_pool3d(net.conv3d(x), (1, 2, 1)).permute(0, 2, 3, 4, 1)[..., :5])
    y = y.unflatten(-1, (2, 3)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    return torch.lerp(conv3d(net, x)[..., :3], y.flatten(1, 3), 0.5)


def shuffled_pixels(net: Function, x: Tensor) -> Tensor:
    frames = nn.functional.pixel_shuffle(net.conv2d(x.transpose(1, 2).flatten(0, 1)).repeat(1, 2, 1, 1), 2)
    return net.conv2d(frames[:, :2]).flatten(2).mT.unflatten(0, (1, 3)).flatten(1, 2)


@pytest.mark.parametrize(
    "function",
    [
        conv3d,
        halved_and_split_again,
        shuffled_pixels,
        lambda net, x: nn.functional.normalize(conv3d(net, x), dim=-1),
        lambda net, x: (
            net.conv3d(nn.functional.interpolate(net.conv3d(x), scale_factor=(1, 2, 2))[:, :2]).flatten(2).mT
        ),
        lambda net, x: (
            net.conv3d(nn.functional.conv_transpose3d(net.conv3d(x), net.conv3d.weight, stride=(1, 2, 2))).flatten(2).mT
        ),
        reshape_and_linear,
        conv2d_per_frame,
        slices_of_text_and_back,
        split_back,
        through_heads,
        rolled_there_and_back,
        rotated,
        windows_there_and_back,
        shifted_windows_there_and_back,
        unit_vectors,
        padded_and_cropped,
        lambda net, x: conv3d(net, x).repeat(1, 1, 2),
        lambda net, x: torch.stack([conv3d(net, x), conv3d(net, x)]).mean(0),
        lambda net, x: conv3d(net, x)[:, None].expand(-1, 2, -1, -1)[:, 0],
        lambda net, x: conv3d(net, x) * net.text.bias + conv3d(net, x).mean(1, keepdim=True),
        lambda net, x: conv3d(net, x.bfloat16().float()).chunk(2, dim=-1)[0],
        lambda net, x: torch.cat([conv3d(net, x)[:, :20], conv3d(net, x)[:, 20:]], 1),
    ],
)
def test_tokens_keep_the_order_of_the_grid(function: Callable[..., Tensor]) -> None:
    inputs = [VIDEO, TEXT][: function.__code__.co_argcount - 1]
    layout = layout_of(Function(function), *inputs)
    assert layout[1] == of_x(GRID)
    assert layout[0] == ONE


def test_video_with_frames_before_channels() -> None:
    layout = layout_of(Function(lambda net, x: conv3d(net, x.transpose(1, 2))), VIDEO.transpose(1, 2))
    assert layout[1] == of_x(row_major(patched(1, 3, 1), patched(3, 8, 2), patched(4, 10, 2)))


def test_patches_of_time_and_of_one_axis_only() -> None:
    def function(net: Function, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, x.new_ones(2, 2, 3, 1, 5), stride=(3, 1, 5))

    layout = layout_of(Function(function), VIDEO)
    assert layout[2:] == (ONE, of_x(patched(3, 8, 1)), of_x(patched(4, 10, 5)))


def test_text_and_video_in_one_sequence() -> None:
    layout = layout_of(Function(lambda net, x, y: torch.cat([net.text(y), conv3d(net, x)], 1)), VIDEO, TEXT)
    assert layout[1] == of_x(concatenate([input_axis("text", 1, 7), GRID]))


def test_slice_of_frames() -> None:
    layout = layout_of(Function(lambda net, x: net.conv3d(x)[:, :, 1:].flatten(2)), VIDEO)
    frames = Axis.of((Digit(Origin("x", 2, 3), 1, 2, 3, 1),))
    assert layout[2] == of_x(row_major(frames, patched(3, 8, 2), patched(4, 10, 2)))


def test_roll_moves_the_tail_to_the_front() -> None:
    layout = layout_of(Function(lambda net, x: x.roll((1, -3), (2, 4))), VIDEO)
    frames, columns = Origin("x", 2, 3), Origin("x", 4, 10)
    assert layout[2] == of_x(Axis(((Digit(frames, 1, 1, 3, 2),), (Digit(frames, 1, 2, 3, 0),))))
    assert layout[4] == of_x(Axis(((Digit(columns, 1, 7, 10, 3),), (Digit(columns, 1, 3, 10, 0),))))
    assert layout[3] == of_x(patched(3, 8, 1))


def test_pad_puts_unknown_tokens_around() -> None:
    layout = layout_of(Function(lambda net, x: nn.functional.pad(conv3d(net, x), (0, 0, 2, 3))), VIDEO)
    before, grid, after = layout[1].segments
    assert Axis((grid,)) == of_x(GRID)
    assert [math.prod(d.size for d in s) for s in (before, after)] == [2, 3]
    assert not any(d.origin.is_known for d in (*before, *after))


def test_windows_are_the_inner_digits() -> None:
    def function(net: Function, x: Tensor) -> Tensor:
        return net.conv3d(x).unflatten(3, (2, 2)).permute(0, 3, 2, 4, 5, 1).flatten(0, 1).flatten(1, 3)

    layout = layout_of(Function(function), VIDEO)
    origin = Origin("x", 3, 8)
    assert layout[0] == of_x(Axis.of((Digit(origin, 4, 2, 2),)))
    assert layout[1] == of_x(row_major(patched(2, 3, 1), Axis.of((Digit(origin, 2, 2, 2),)), patched(4, 10, 2)))


@pytest.mark.parametrize(
    ("function", "maker"),
    [
        (lambda net, x: x.flip(2) + 0, "aten.flip"),
        (lambda net, x: x[:, :, [2, 0, 1]], "aten.index"),
        (lambda net, x: x.sort(2).values, "aten.sort"),
        (lambda net, x: torch.gather(x, 2, torch.zeros_like(x, dtype=torch.long)), "aten.gather"),
        (lambda net, x: x[:, :, ::2], "aten.slice"),
        (lambda net, x: x.repeat(1, 1, 2, 1, 1), "aten.repeat"),
    ],
)
def test_order_that_is_lost_names_the_operation(function: Callable[..., Tensor], maker: str) -> None:
    axis = layout_of(Function(function), VIDEO)[2]
    assert not axis.is_known
    digit = axis.segments[0][0]
    assert maker in str(digit.origin)
    assert "node '" in str(digit.origin)


@pytest.mark.parametrize("batch", [1, 2])
def test_multi_head_attention_keeps_the_order_of_text_and_video(batch: int) -> None:
    """It flattens the sequence with the batch behind it, and splits them again."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval()

    def function(net: Function, x: Tensor, y: Tensor) -> Tensor:
        tokens = torch.cat([net.text(y), conv3d(net, x)], 1)
        tokens = tokens + attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + attention(tokens, tokens, tokens)[0]

    net = Function(function)
    net.attention = attention
    layout = layout_of(net, VIDEO.expand(batch, -1, -1, -1, -1), TEXT.expand(batch, -1, -1))
    assert layout[1] == of_x(concatenate([input_axis("text", 1, 7), GRID]))


def test_stretches_with_the_same_inner_factor_are_split_from_it() -> None:
    sequence, batch = concatenate([input_axis("text", 1, 7), product([T, H])]), input_axis("x", 0, 2)
    assert product([sequence, batch]).split([31, 2]) == [sequence, batch]
    assert product([sequence, batch]).split([1, 31, 1, 2]) == [ONE, sequence, ONE, batch]
    unlike = concatenate([product([T, batch]), product([H, W])])
    split = unlike.split([43, 2])
    assert split is not None
    assert not any(part.is_known for part in split)


def test_reordered_parts_of_a_concatenation_are_no_axis() -> None:
    def function(net: Function, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :, :1]], 2).unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3)

    axis = layout_of(Function(function), VIDEO)[2]
    assert [digit.stride for digit in axis.segments[0]] == [1, 2]


def test_patches_of_two_pictures_side_by_side() -> None:
    """And a convolution that pads behind only."""
    layout = layout_of(Function(lambda net, x, y: net.conv3d(torch.cat([x, y], 4))), VIDEO, VIDEO)
    both = concatenate([patched(4, 10, 2), patched(4, 10, 2, "text")])
    assert layout[4] == of_x(both)

    def padded_behind(net: Function, x: Tensor) -> Tensor:
        return nn.functional.conv3d(nn.functional.pad(x, (0, 1, 0, 1)), x.new_ones(2, 2, 1, 3, 3), stride=(1, 2, 2))

    layout = layout_of(Function(padded_behind), VIDEO)
    assert layout[3:] == (of_x(patched(3, 8, 2)), of_x(patched(4, 10, 2)))


def test_patches_across_two_pictures_are_lost() -> None:
    layout = layout_of(Function(lambda net, x: net.conv3d(torch.cat([x[..., :7], x[..., 1:8]], 4))), VIDEO)
    assert not layout[4].is_known


@pytest.mark.parametrize("function", [coarse_beside_fine, upsampled_beside_fine])
def test_a_coarse_stage_beside_a_fine_one_leaves_its_order(function: Callable[..., Tensor]) -> None:
    layout = layout_of(Function(function), torch.randn(1, 2, 3, 8, 8))
    frames = [patched(2, 3, 1)] if function is coarse_beside_fine else []
    assert layout[1] == of_x(row_major(*frames, patched(3, 8, 2), patched(4, 8, 2)))


def test_tokens_mixed_with_each_other_have_no_order() -> None:
    def function(net: Function, x: Tensor) -> Tensor:
        tokens = conv3d(net, x)
        return tokens + nn.functional.linear(tokens.mT, tokens.new_ones(60, 60)).mT

    axis = layout_of(Function(function), VIDEO)[1]
    assert not axis.is_known


def test_operands_in_different_orders_make_no_order() -> None:
    square = torch.randn(1, 2, 3, 8, 8)
    axes = layout_of(Function(lambda net, x: x + x.transpose(3, 4)), square)
    assert axes[2] == of_x(patched(2, 3, 1))
    assert not axes[3].is_known
    assert not axes[4].is_known


def test_three_operands_of_which_two_contradict_make_no_order() -> None:
    square = torch.randn(1, 2, 3, 8, 8)
    axes = layout_of(Function(lambda net, x: torch.where(x > 0, x.transpose(3, 4), x)), square)
    assert not axes[3].is_known


def test_rope_of_the_published_architecture_keeps_the_order() -> None:
    model, inputs = tiny_wan(layers=1)
    program = trace(model, (), inputs)
    tracker = LayoutTracker(program.graph, user_input_names(program.exported))
    scatters = [n for n in program.graph.nodes if n.target is torch.ops.aten.slice_scatter.default]
    assert len(scatters) == 4
    expected = row_major(*(patched(i, n, p, "hidden_states") for i, n, p in ((2, 3, 1), (3, 8, 2), (4, 8, 2))))
    assert all(expected in tracker.layout(node) for node in scatters)
