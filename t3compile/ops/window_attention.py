"""t3::window_attention: full attention cut into windows, local and dilated branch averaged.

Contract: q, k, v [B, N, S, D] after normalisation and RoPE with global positions, S = prefix + T*H*W + suffix,
grid tokens frame-major; any floating dtype. Returns [B, N, S, Dv], a view of a contiguous [B, S, N, Dv] as fused
SDPA does. A grid query sees its window and all prefix/suffix keys; a prefix/suffix query sees everything.
Differentiable; the backward pass recomputes.
Source: arXiv 2512.13492; prefix/suffix tokens are an own extension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import Splits, TokenGrid
from t3compile.ops.regroup import Box, boxes, group, ungroup
from t3compile.pattern import Branch, WindowPattern

_NAME = "t3::window_attention"
# Domain and type of the ONNX node that stands for the op until it is bound to its function.
ONNX_NAME = "t3::WindowAttention"
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, int[] grid, int[] splits, str branches, "
    "int prefix=0, int suffix=0, float? scale=None) -> Tensor"
)


@dataclass(frozen=True)
class WindowAttentionArgs:
    """The op's arguments after q, k, v, as checked types."""

    grid: TokenGrid
    pattern: WindowPattern
    prefix: int = 0
    suffix: int = 0
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"{_NAME}: prefix {self.prefix} and suffix {self.suffix} must not be negative")

    @property
    def extra_tokens(self) -> int:
        return self.prefix + self.suffix

    def as_op_args(self) -> tuple[Any, ...]:
        """Positional arguments of the op after q, k, v."""
        return (
            list(self.grid.sizes),
            list(self.pattern.splits.counts),
            "+".join(self.pattern.branches),
            self.prefix,
            self.suffix,
            self.scale,
        )

    def as_attributes(self) -> dict[str, Any]:
        """The same as ONNX attributes; ``scale`` is absent when it is the default."""
        names = ("grid", "splits", "branches", "prefix", "suffix", "scale")
        named = dict(zip(names, self.as_op_args(), strict=True))
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of_call(cls, args: Any, kwargs: Any) -> WindowAttentionArgs:
        """From all arguments of a call of the op, q, k and v included."""
        return cls.from_op_args(*args[3:], **kwargs)

    @classmethod
    def from_op_args(
        cls,
        grid: list[int],
        splits: list[int],
        branches: str,
        prefix: int = 0,
        suffix: int = 0,
        scale: float | None = None,
    ) -> WindowAttentionArgs:
        names = tuple(cast("list[Branch]", branches.split("+")))
        pattern = WindowPattern(Splits(*splits), names)
        token_grid = TokenGrid(*grid)
        pattern.check_fit(token_grid)
        return cls(token_grid, pattern, prefix, suffix, scale)


def window_attention(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs) -> Tensor:
    """The op in differentiable torch calls: tokens regrouped by window, one batched SDPA per window size.

    q, k, v: [B, N, S, D]. Both branches run in one call, stacked along the batch.
    """
    if args.pattern.is_full():
        full = scaled_dot_product_attention(q, k, v, scale=args.scale)
        return full.transpose(1, 2).contiguous().transpose(1, 2)
    grid, splits = args.grid, args.pattern.splits
    branches = args.pattern.computed_branches(grid)
    folded = [x.flatten(0, 1) for x in (q, k, v)]  # [M, S, D] with M = B * N
    grid_qkv = [x.narrow(1, args.prefix, grid.tokens).unflatten(1, grid.sizes) for x in folded]
    extra_kv = [_extra_tokens(x, 1, args) for x in folded[1:]]
    by_branch: list[list[Tensor]] = [[] for _ in branches]
    for box in boxes(grid, splits):
        q_w, k_w, v_w = (_stack_branches(x, grid, splits, branches, box) for x in grid_qkv)
        k_w, v_w = (_append_extra(x, extra, box, len(branches)) for x, extra in zip((k_w, v_w), extra_kv, strict=True))
        out = scaled_dot_product_attention(q_w, k_w, v_w, scale=args.scale)
        for results, piece in zip(by_branch, out.unbind(0), strict=True):
            results.append(piece.unflatten(1, box.sizes).unflatten(0, (-1, *box.parts)))
    merged = [ungroup(results, grid, splits, branch) for results, branch in zip(by_branch, branches, strict=True)]
    mean = merged[0] if len(merged) == 1 else (merged[0] + merged[1]) * 0.5
    by_token = mean.flatten(0, 2).unflatten(1, q.shape[:2]).transpose(0, 1)  # [B, G, N, Dv]
    return _with_extra_queries(by_token, q, k, v, args).contiguous().transpose(1, 2)


class WindowAttention(nn.Module):
    """The torch implementation as a module of q, k, v, for tracing its body."""

    def __init__(self, args: WindowAttentionArgs) -> None:
        super().__init__()
        self.args = args

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, self.args)


def _stack_branches(x: Tensor, grid: TokenGrid, splits: Splits, branches: tuple[Branch, ...], box: Box) -> Tensor:
    """[M, T, H, W, D] -> [branches, M*windows, window tokens, D], with one copy per branch."""
    grouped = [group(x, grid, splits, branch, box) for branch in branches]
    stacked = grouped[0] if len(grouped) == 1 else torch.cat(grouped, 0)
    return stacked.reshape(len(branches), -1, box.window_tokens, x.shape[-1])


def _extra_tokens(x: Tensor, dim: int, args: WindowAttentionArgs) -> Tensor | None:
    """Prefix and suffix tokens along ``dim``, or None where there are none."""
    if args.extra_tokens == 0:
        return None
    suffix_start = args.prefix + args.grid.tokens
    return torch.cat([x.narrow(dim, 0, args.prefix), x.narrow(dim, suffix_start, args.suffix)], dim)


def _append_extra(x: Tensor, extra: Tensor | None, box: Box, branches: int) -> Tensor:
    """Append the global keys (or values) [M, E, D] to those of every window [branches, M*windows, s, D]."""
    if extra is None:
        return x
    folded, tokens, depth = extra.shape
    spread = extra.unsqueeze(1).expand(folded, box.windows, tokens, depth)
    spread = spread.reshape(1, folded * box.windows, tokens, depth)
    return torch.cat([x, spread.expand(branches, -1, -1, -1)], dim=2)


def _with_extra_queries(grid_out: Tensor, q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs) -> Tensor:
    """[B, G, N, Dv] -> [B, S, N, Dv]: prefix and suffix queries attend to all keys."""
    extra_q = _extra_tokens(q, 2, args)
    if extra_q is None:
        return grid_out
    out = scaled_dot_product_attention(extra_q, k, v, scale=args.scale).transpose(1, 2)
    before, after = out.split([args.prefix, args.suffix], dim=1)
    return torch.cat([before, grid_out, after], dim=1)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs) -> None:
    tokens = args.prefix + args.grid.tokens + args.suffix
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[2] != tokens:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(x.shape)}, expected [B, N, {tokens}, D] for grid "
                f"{args.grid}, prefix {args.prefix}, suffix {args.suffix}"
            )

    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        heads = ", ".join(f"{name} {tuple(x.shape[:2])}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{_NAME}: batch and heads must be the same, but are {heads}")


def _kernel(q: Tensor, k: Tensor, v: Tensor, *op_args: Any) -> Tensor:
    args = WindowAttentionArgs.from_op_args(*op_args)
    _check_shapes(q, k, v, args)
    return window_attention(q, k, v, args)


def _fake(q: Tensor, k: Tensor, v: Tensor, *op_args: Any) -> Tensor:
    args = WindowAttentionArgs.from_op_args(*op_args)
    _check_shapes(q, k, v, args)
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, *ctx.op_args = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    args = WindowAttentionArgs.from_op_args(*ctx.op_args)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        q, k, v = inputs
        out = window_attention(q, k, v, args)
        grads = torch.autograd.grad(out, inputs, grad)
    return (*grads, *(None for _ in ctx.op_args))


torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, "CompositeExplicitAutograd")(_kernel)
torch.library.register_fake(_NAME)(_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_save_for_backward)

WINDOW_ATTENTION = torch.ops.t3.window_attention.default
