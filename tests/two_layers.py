"""A video model of two attention layers over a grid of 2x4x6 tokens, to compare variants of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import t3compile
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.pattern import WindowPattern
from t3compile.program import Program

ARGS = WindowAttentionArgs(TokenGrid(2, 4, 6), WindowPattern(Splits(1, 2, 3)))


class Video(nn.Module):
    """Attention over a grid of 2x4x6 tokens in two layers, made of patches of a [1, 2, 2, 8, 12] video."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv3d(2, 16, (1, 2, 2), stride=(1, 2, 2))
        self.layers = nn.ModuleList([nn.Linear(16, 48) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # [B, S, D]
        for layer in self.layers:
            q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in layer(tokens).chunk(3, dim=2))
            tokens = tokens + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return tokens


def two_layer_programs() -> tuple[Program, Program]:
    """The original, and rewritten with another pattern in each of its two layers."""
    program = t3compile.trace(Video().eval(), (torch.randn(1, 2, 2, 8, 12),))
    plan = t3compile.make_plan(t3compile.detect(program), [(2, 1, 1), (1, 2, 3)])
    return program, t3compile.rewrite(program, plan)
