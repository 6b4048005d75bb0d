"""t3::window_attention: full attention cut into windows, local and dilated branch averaged.

Contract: k, v [B, N, S, D] with S = prefix + T*H*W + suffix and q [B, N, Sq, D] with Sq = query_prefix + T*H*W +
query_suffix (None: as many as the keys), after normalisation and RoPE with global positions; any floating dtype.
``grid`` and ``splits`` stand in sequence order, outermost axis first: the op has no other notion of the three axes.
Returns [B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv] as fused SDPA does. A grid query sees its window and all
prefix/suffix keys; a prefix/suffix query sees everything.
``mask`` is that of the full attention, bool (True: visible) or additive, broadcastable to [B, N, Sq, S]. Among grid
tokens it must hide nothing (add one number everywhere), and all grid queries must have the same row: the op reads one
of them, so the caller has to prove it. A query outside the grid that sees no key gets what torch's SDPA gives, 0.
Differentiable but for the mask; the backward pass recomputes.
Source: arXiv 2512.13492; prefix/suffix tokens and masks over them are an own extension.
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
    "int prefix=0, int suffix=0, float? scale=None, "
    "int? query_prefix=None, int? query_suffix=None, Tensor? mask=None) -> Tensor"
)


@dataclass(frozen=True)
class WindowAttentionArgs:
    """The op's arguments that are no tensors, as checked types; grid and pattern in sequence order."""

    grid: TokenGrid
    pattern: WindowPattern
    prefix: int = 0
    suffix: int = 0
    scale: float | None = None
    query_prefix: int = None  # type: ignore[assignment]  # not given: as many as the keys have
    query_suffix: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.query_prefix is None:
            object.__setattr__(self, "query_prefix", self.prefix)
        if self.query_suffix is None:
            object.__setattr__(self, "query_suffix", self.suffix)
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"{_NAME}: prefix {self.prefix} and suffix {self.suffix} must not be negative")
        if self.query_prefix < 0 or self.query_suffix < 0:
            raise ValueError(
                f"{_NAME}: query_prefix {self.query_prefix} and query_suffix {self.query_suffix} must not be negative"
            )

    @property
    def extra_tokens(self) -> int:
        """Keys outside the grid."""
        return self.prefix + self.suffix

    @property
    def extra_queries(self) -> int:
        """Queries outside the grid."""
        return self.query_prefix + self.query_suffix

    @property
    def tokens(self) -> int:
        """Keys."""
        return self.grid.tokens + self.extra_tokens

    @property
    def query_tokens(self) -> int:
        return self.grid.tokens + self.extra_queries

    def as_op_args(self) -> tuple[Any, ...]:
        """Positional arguments of the op after q, k, v; the queries' own extra tokens only where they differ."""
        shared = (
            list(self.grid.sizes),
            list(self.pattern.splits.counts),
            "+".join(self.pattern.branches),
            self.prefix,
            self.suffix,
            self.scale,
        )
        if (self.query_prefix, self.query_suffix) == (self.prefix, self.suffix):
            return shared
        return (*shared, self.query_prefix, self.query_suffix)

    def as_attributes(self) -> dict[str, Any]:
        """The same as ONNX attributes; what is default is absent."""
        names = ("grid", "splits", "branches", "prefix", "suffix", "scale", "query_prefix", "query_suffix")
        named = dict(zip(names, self.as_op_args(), strict=False))
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_op_args(
        cls,
        grid: list[int],
        splits: list[int],
        branches: str,
        prefix: int = 0,
        suffix: int = 0,
        scale: float | None = None,
        query_prefix: int | None = None,
        query_suffix: int | None = None,
    ) -> WindowAttentionArgs:
        names = tuple(cast("list[Branch]", branches.split("+")))
        pattern = WindowPattern(Splits(*splits), names)
        token_grid = TokenGrid(*grid)
        pattern.check_fit(token_grid)
        query_prefix = prefix if query_prefix is None else query_prefix
        query_suffix = suffix if query_suffix is None else query_suffix
        return cls(token_grid, pattern, prefix, suffix, scale, query_prefix, query_suffix)


@dataclass(frozen=True)
class WindowAttentionCall:
    """All arguments of a call of the op: its tensors (graph nodes, where the call is one) and the rest."""

    q: Any
    k: Any
    v: Any
    mask: Any
    args: WindowAttentionArgs

    @property
    def tensors(self) -> tuple[Any, ...]:
        """q, k, v and, if there is one, the mask."""
        return (self.q, self.k, self.v) if self.mask is None else (self.q, self.k, self.v, self.mask)

    @classmethod
    def read(cls, args: Any, kwargs: Any) -> WindowAttentionCall:
        """From the positional and keyword arguments of a call."""
        names = [argument.name for argument in WINDOW_ATTENTION._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        q, k, v, mask = (given.pop(name, None) for name in ("q", "k", "v", "mask"))
        return cls(q, k, v, mask, WindowAttentionArgs.from_op_args(**given))


def window_attention(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> Tensor:
    """The op in differentiable torch calls: tokens regrouped by window, one batched SDPA per window size.

    q [B, N, Sq, D], k and v [B, N, S, D], mask broadcastable to [B, N, Sq, S]. Both branches run in one call,
    stacked along the batch.
    """
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if args.pattern.is_full():
        full = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=args.scale)
        return full.transpose(1, 2).contiguous().transpose(1, 2)
    grid, splits = args.grid, args.pattern.splits
    branches = args.pattern.computed_branches(grid)
    starts = (args.query_prefix, args.prefix, args.prefix)
    folded = [x.flatten(0, 1) for x in (q, k, v)]  # [M, S, D] with M = B * N
    grid_qkv = [
        x.narrow(1, start, grid.tokens).unflatten(1, grid.sizes) for x, start in zip(folded, starts, strict=True)
    ]
    extra_kv = [_around_grid(x, 1, args.prefix, args.suffix) for x in folded[1:]]
    extra_mask = None if mask is None else _mask_of_grid_queries(mask, q.shape[:2], args)
    by_branch: list[list[Tensor]] = [[] for _ in branches]
    for box in boxes(grid, splits):
        q_w, k_w, v_w = (_stack_branches(x, grid, splits, branches, box) for x in grid_qkv)
        k_w, v_w = (_append_extra(x, extra, box, len(branches)) for x, extra in zip((k_w, v_w), extra_kv, strict=True))
        out = _attend_in_windows(q_w, k_w, v_w, extra_mask, args.scale)
        for results, piece in zip(by_branch, out.unbind(0), strict=True):
            results.append(piece.unflatten(1, box.sizes).unflatten(0, (-1, *box.parts)))
    merged = [ungroup(results, grid, splits, branch) for results, branch in zip(by_branch, branches, strict=True)]
    mean = merged[0] if len(merged) == 1 else (merged[0] + merged[1]) * 0.5
    by_token = mean.flatten(0, 2).unflatten(1, q.shape[:2]).transpose(0, 1)  # [B, G, N, Dv]
    return _with_extra_queries(by_token, q, k, v, mask, args).contiguous().transpose(1, 2)


class WindowAttention(nn.Module):
    """The torch implementation as a module of q, k, v and, where there is one, the mask, for tracing its body."""

    def __init__(self, args: WindowAttentionArgs) -> None:
        super().__init__()
        self.args = args

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, self.args, mask)


def _stack_branches(x: Tensor, grid: TokenGrid, splits: Splits, branches: tuple[Branch, ...], box: Box) -> Tensor:
    """[M, T, H, W, D] -> [branches, M*windows, window tokens, D], with one copy per branch."""
    grouped = [group(x, grid, splits, branch, box) for branch in branches]
    stacked = grouped[0] if len(grouped) == 1 else torch.cat(grouped, 0)
    return stacked.reshape(len(branches), -1, box.window_tokens, x.shape[-1])


def _around_grid(x: Tensor, dim: int, before: int, after: int) -> Tensor | None:
    """The first and last tokens along ``dim``, or None where there are none outside the grid."""
    if before + after == 0:
        return None
    return torch.cat([x.narrow(dim, 0, before), x.narrow(dim, x.shape[dim] - after, after)], dim)


def _append_extra(x: Tensor, extra: Tensor | None, box: Box, branches: int) -> Tensor:
    """Append the global keys (or values) [M, E, D] to those of every window [branches, M*windows, s, D]."""
    if extra is None:
        return x
    folded, tokens, depth = extra.shape
    spread = extra.unsqueeze(1).expand(folded, box.windows, tokens, depth)
    spread = spread.reshape(1, folded * box.windows, tokens, depth)
    return torch.cat([x, spread.expand(branches, -1, -1, -1)], dim=2)


def _mask_of_grid_queries(mask: Tensor, batch_and_heads: torch.Size, args: WindowAttentionArgs) -> Tensor | None:
    """The row that all grid queries have, at the keys outside the grid, [1 or B or M, 1, 1, E]; None: all visible."""
    if mask.shape[3] == 1:
        return None  # the same at the keys of the grid, which are visible
    row = mask if mask.shape[2] == 1 else mask.narrow(2, args.query_prefix, 1)
    extra = _around_grid(row, 3, args.prefix, args.suffix)
    if extra is not None and extra.dtype != torch.bool:
        # What is added at every key of the grid alike counts for nothing; the others are weighted against it.
        extra = extra - row.narrow(3, args.prefix, 1)
    if extra is None or extra.shape[1] == 1:
        return extra
    return extra.expand(*batch_and_heads, -1, -1).flatten(0, 1).unsqueeze(1)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, extra_mask: Tensor | None, scale: float | None) -> Tensor:
    """SDPA of [branches, M*windows, s, D]; the mask of the extra keys is shared by all windows of its batch element.

    The batch elements with a mask of their own go to the first axis: so the mask broadcasts over windows.
    """
    if extra_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    masks, branches = extra_mask.shape[0], q.shape[0]
    window = (masks, 1, 1, q.shape[2])
    visible = extra_mask.new_ones(window) if extra_mask.dtype == torch.bool else extra_mask.new_zeros(window)
    mask = torch.cat([visible, extra_mask], dim=3)
    if masks == 1:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    mask = torch.cat([mask] * branches, dim=0)
    q, k, v = (x.reshape(branches * masks, -1, *x.shape[2:]) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(branches, -1, *out.shape[2:])


def _with_extra_queries(
    grid_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: WindowAttentionArgs
) -> Tensor:
    """[B, G, N, Dv] -> [B, Sq, N, Dv]: queries outside the grid attend to all keys that their mask shows."""
    around = (args.query_prefix, args.query_suffix)
    extra_q = _around_grid(q, 2, *around)
    if extra_q is None:
        return grid_out
    if mask is not None and mask.shape[2] != 1:
        mask = _around_grid(mask, 2, *around)
    out = scaled_dot_product_attention(extra_q, k, v, attn_mask=mask, scale=args.scale).transpose(1, 2)
    before, after = out.split(around, dim=1)
    return torch.cat([before, grid_out, after], dim=1)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: WindowAttentionArgs) -> None:
    keys = f"prefix {args.prefix}, suffix {args.suffix}"
    queries = f"query_prefix {args.query_prefix}, query_suffix {args.query_suffix}"
    if args.as_op_args()[6:] == ():
        queries = keys
    expected = ((q, args.query_tokens, queries), (k, args.tokens, keys), (v, args.tokens, keys))
    for name, (x, tokens, extra) in zip("qkv", expected, strict=True):
        if x.dim() != 4 or x.shape[2] != tokens:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(x.shape)}, expected [B, N, {tokens}, D] for grid "
                f"{args.grid}, {extra}"
            )
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        heads = ", ".join(f"{name} {tuple(x.shape[:2])}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{_NAME}: batch and heads must be the same, but are {heads}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"{_NAME}: mask has dtype {mask.dtype}, expected bool (True: visible) or a floating one")
    whole = (*q.shape[:2], args.query_tokens, args.tokens)
    tail = whole[4 - mask.dim() :]
    if not 1 <= mask.dim() <= 4 or any(size not in (1, full) for size, full in zip(mask.shape, tail, strict=True)):
        raise ValueError(f"{_NAME}: mask of shape {tuple(mask.shape)} does not broadcast to {whole}")


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    splits: list[int],
    branches: str,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
    query_prefix: int | None = None,
    query_suffix: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    args = WindowAttentionArgs.from_op_args(grid, splits, branches, prefix, suffix, scale, query_prefix, query_suffix)
    _check_shapes(q, k, v, mask, args)
    return window_attention(q, k, v, args, mask)


def _fake(q: Tensor, k: Tensor, v: Tensor, *op_args: Any, **named: Any) -> Tensor:
    call = WindowAttentionCall.read((q, k, v, *op_args), named)
    _check_shapes(q, k, v, call.mask, call.args)
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = WindowAttentionCall.read(inputs, {})
    if call.mask is not None and call.mask.requires_grad:
        raise ValueError(f"{_NAME}: a mask has no gradient here: pass mask.detach()")
    ctx.window_args, ctx.given = call.args, len(inputs)
    ctx.save_for_backward(call.q, call.k, call.v, call.mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *qkv, mask = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in qkv]
        q, k, v = inputs
        out = window_attention(q, k, v, ctx.window_args, mask)
        grads = torch.autograd.grad(out, inputs, grad)
    return (*grads, *(None for _ in range(ctx.given - 3)))


torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, "CompositeExplicitAutograd")(_kernel)
torch.library.register_fake(_NAME)(_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_save_for_backward)

WINDOW_ATTENTION = torch.ops.t3.window_attention.default
