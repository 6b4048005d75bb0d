"""Windows of a token grid as strided views: no run of windows needs a gather, a pad or a concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from t3compile.ops.regroup import Box, boxes
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.pattern import Branch


@dataclass(frozen=True)
class WindowSteps:
    """Where the windows of a box stand: per axis (t, h, w) how many parts of how many tokens; steps in tokens."""

    parts: tuple[int, ...]
    sizes: tuple[int, ...]
    part_steps: tuple[int, ...]
    token_steps: tuple[int, ...]
    first: int

    @classmethod
    def of(cls, args: WindowAttentionArgs, branch: Branch, box: Box) -> WindowSteps:
        """Both index laws are a start and a step per axis."""
        _, height, width = args.grid.sizes
        part_steps, token_steps, first = [], [], 0
        for pitch, length, n, run in zip(
            (height * width, width, 1), args.grid.sizes, args.pattern.splits.counts, box.runs, strict=True
        ):
            if branch == "local":
                longer = length % n if run.first_part else 0
                start, part_step, token_step = run.first_part * run.size + longer, run.size, 1
            else:
                start, part_step, token_step = run.first_part, 1, n
            part_steps.append(part_step * pitch)
            token_steps.append(token_step * pitch)
            first += start * pitch
        return cls(box.parts, box.sizes, tuple(part_steps), tuple(token_steps), first)

    @classmethod
    def in_order(cls, args: WindowAttentionArgs, branch: Branch) -> WindowSteps | None:
        """Those of all windows, where one after the other they are the tokens one after the other; else None."""
        box, *others = boxes(args.grid, args.pattern.splits)
        steps = cls.of(args, branch, box)
        step = merged_step((*steps.parts, *steps.sizes), (*steps.part_steps, *steps.token_steps))
        return steps if not others and step in (0, 1) else None

    def view(self, x: Tensor, start: int) -> Tensor:
        """[B, N, S, D] whose grid begins at token ``start`` -> [B, p_t, p_h, p_w, N, s_t, s_h, s_w, D], a view."""
        batch, heads, _, depth = x.shape
        batch_step, head_step, token, depth_step = x.stride()
        shape = (batch, *self.parts, heads, *self.sizes, depth)
        part_steps, token_steps = ([step * token for step in steps] for steps in (self.part_steps, self.token_steps))
        steps = (batch_step, *part_steps, head_step, *token_steps, depth_step)
        return x.as_strided(shape, steps, x.storage_offset() + (start + self.first) * token)


def merged_step(sizes: Sequence[int], steps: Sequence[int]) -> int | None:
    """The step of these axes, outermost first, taken as one; 0 where all have size 1, None where they make no one."""
    merged: int | None = None
    length = 1
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if size == 1:
            continue
        if merged is None:
            merged = step
        elif step != merged * length:
            return None
        length *= size
    return 0 if merged is None else merged


def as_attention_input(windows: Tensor, leading: int) -> Tensor | None:
    """[leading axes, N, s_t, s_h, s_w, D] -> [windows, N, window tokens, D], or None where that is no view.

    Neither where the depth is not contiguous, which torch's fused SDPA on CPUs asks for.
    """
    sizes, steps = windows.shape, windows.stride()
    batch = merged_step(sizes[:leading], steps[:leading])
    token = merged_step(sizes[leading + 1 : -1], steps[leading + 1 : -1])
    if batch is None or token is None or (steps[-1] != 1 and sizes[-1] > 1):
        return None
    shape = (sizes[:leading].numel(), sizes[leading], sizes[leading + 1 : -1].numel(), sizes[-1])
    return windows.as_strided(shape, (batch, steps[leading], token, 1))
