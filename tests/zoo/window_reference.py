"""The eager model with windows in the place of its full attention, to compare rewritten graphs with.

Shares with the tool only the masks of the naive reference. Attention is caught where the eager model calls it:
scaled_dot_product_attention, a softmax over scores [.., Q, K], or a submodule that the model lists itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from t3compile.geometry import AXES
from t3compile.ops.reference import branch_mask
from t3compile.pattern import WindowPattern
from t3compile.sites import AttentionSite

_SDPA = functional.scaled_dot_product_attention
_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
_MULTI_HEAD = functional.multi_head_attention_forward


@dataclass(frozen=True)
class EagerCall:
    """One attention call of the eager model; a softmax may as well be something else."""

    spelling: Literal["sdpa", "softmax", "module"]
    query_tokens: int
    key_tokens: int

    @property
    def tokens(self) -> tuple[int, int]:
        return self.query_tokens, self.key_tokens


def window_masks(site: AttentionSite, pattern: WindowPattern) -> list[Tensor]:
    """Which keys each query sees, a bool [Q, K] for each branch, in the order of the site's own sequence."""
    in_sequence = torch.arange(site.grid.tokens).reshape(site.grid.sizes)
    in_sequence = in_sequence.permute([AXES.index(axis) for axis in site.order]).reshape(-1)
    keys = torch.arange(site.tokens)
    keys[site.prefix : site.prefix + site.grid.tokens] = site.prefix + in_sequence
    before = site.prefix if site.query_prefix is None else site.query_prefix
    after = site.suffix if site.query_suffix is None else site.query_suffix
    masks = []
    for branch in pattern.branches:
        frame_major = branch_mask(site.grid, pattern, branch, prefix=site.prefix, suffix=site.suffix)
        grid_rows = frame_major[site.prefix + in_sequence][:, keys]
        everything = torch.ones(max(before, after), site.tokens, dtype=torch.bool)
        masks.append(torch.cat([everything[:before], grid_rows, everything[:after]]))
    return masks


@dataclass
class _AttentionMode(TorchFunctionMode):
    """Records every attention call; those whose number is in ``windows`` see the given keys, branch by branch."""

    windows: Mapping[int, Sequence[Tensor]]
    widest: torch.dtype
    calls: list[EagerCall] = field(default_factory=list)
    passing: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.passing:
            return func(*args, **kwargs)
        if func is _SDPA:
            return self._scaled_dot_product(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, *args, **kwargs)
        if func is _MULTI_HEAD:
            # It hands itself to the mode once more unless it believes that there is none.
            with patch.object(functional, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def attention_module(self, forward: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> Tensor:
        """A submodule's attention, applied to the tokens of each window by itself."""
        masks_of_branches = self._next("module", q.shape[-2], k.shape[-2])
        self.passing = True
        try:
            if masks_of_branches is None:
                return forward(q, k, v, *masks)
            total = [_by_equal_rows(forward, q, k, v, masks, visible) for visible in masks_of_branches]
        finally:
            self.passing = False
        return sum(total[1:], start=total[0]) / len(total)

    def _next(self, spelling: Any, query_tokens: int, key_tokens: int) -> Sequence[Tensor] | None:
        self.calls.append(EagerCall(spelling, query_tokens, key_tokens))
        return self.windows.get(len(self.calls) - 1)

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        visible = self._next("sdpa", query.shape[-2], key.shape[-2])
        if visible is None:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return _SDPA(query, key, value, attn_mask, **options)
        q, k, v = (x.to(self.widest) for x in (query, key, value))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask.to(self.widest)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        out = (_mean_softmax(scores, visible) @ v).to(query.dtype)
        # The strides of the fused call: models take views of it.
        return out.transpose(-3, -2).contiguous().transpose(-3, -2)

    def _softmax(self, func: Any, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() < 3 or dim is None or dim % x.dim() < x.dim() - 2:
            return func(x, dim, *args, **kwargs)
        scores = x if dim % x.dim() == x.dim() - 1 else x.transpose(-1, -2)
        visible = self._next("softmax", scores.shape[-2], scores.shape[-1])
        if visible is None:
            return func(x, dim, *args, **kwargs)
        out = _mean_softmax(scores.to(self.widest), visible).to(func(x, dim, *args, **kwargs).dtype)
        return out if scores is x else out.transpose(-1, -2)


def _mean_softmax(scores: Tensor, visible: Sequence[Tensor]) -> Tensor:
    """Mean over the branches of the softmax over the keys [Q, K] that each admits; a row without keys gives zeros."""
    weights = [scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0) for mask in visible]
    return sum(weights[1:], start=weights[0]) / len(weights)


def _by_equal_rows(
    forward: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, masks: tuple[Any, ...], visible: Tensor
) -> Tensor:
    """Queries that see the same keys attend together, to those keys alone."""
    rows, groups = visible.unique(dim=0, return_inverse=True)
    out = None
    for number, row in enumerate(rows):
        queries, keys = (groups == number).nonzero().flatten(), row.nonzero().flatten()
        own_masks = [_of_window(mask, queries, keys, visible.shape) for mask in masks]
        part = forward(q[..., queries, :], k[..., keys, :], v[..., keys, :], *own_masks)
        out = part.new_zeros(*part.shape[:-2], q.shape[-2], part.shape[-1]) if out is None else out
        out[..., queries, :] = part
    assert out is not None
    return out


def _of_window(mask: Any, queries: Tensor, keys: Tensor, shape: torch.Size) -> Any:
    """A mask's part for some queries and keys; axes of length 1 stay."""
    if not isinstance(mask, Tensor):
        return mask
    if mask.shape[-1] == shape[1]:
        mask = mask[..., keys]
    return mask[..., queries, :] if mask.dim() > 1 and mask.shape[-2] == shape[0] else mask


@contextmanager
def _watched_modules(model: nn.Module, mode: _AttentionMode) -> Iterator[None]:
    """Submodules that a hand-written model lists as its attention go through the mode."""
    with ExitStack() as stack:
        for module in model.attention_calls():
            forward = module.forward

            def watched(q: Tensor, k: Tensor, v: Tensor, *masks: Any, _forward: Any = forward) -> Tensor:
                return mode.attention_module(_forward, q, k, v, *masks)

            stack.enter_context(patch.object(module, "forward", watched))
        yield


def run_windowed(
    model: nn.Module,
    inputs: Mapping[str, Any],
    windows: Mapping[int, Sequence[Tensor]],
    *,
    widest: torch.dtype = torch.float64,
    modules: bool = False,
) -> tuple[Any, list[EagerCall]]:
    """The model's output with attention call number i under the masks ``windows[i]``, and all its calls in order.

    The replaced attention is computed in ``widest``. Without windows it is the model as it is. ``modules`` takes the
    submodules of ``model.attention_calls()`` for its calls, for spellings without a softmax.
    """
    mode = _AttentionMode(windows, widest)
    watched = _watched_modules(model, mode) if modules else nullcontext()
    with torch.no_grad(), watched, mode:
        output = model(**inputs)
    return output, mode.calls


def match_calls(eager: Sequence[EagerCall], graph: Sequence[tuple[int, int]]) -> list[int] | str:
    """For every attention call of the graph the number of the eager call that it is, or why there is none.

    ``graph`` lists (query tokens, key tokens) in graph order. A softmax of the eager model may be left over, since
    models take softmaxes of other things too; other calls may not.
    """
    for spelling in ("module", "sdpa"):
        numbers = [number for number, call in enumerate(eager) if call.spelling == spelling]
        if numbers and [eager[number].tokens for number in numbers] == list(graph):
            return numbers
    matched: list[int] = []
    for number, call in enumerate(eager):
        if len(matched) < len(graph) and call.tokens == graph[len(matched)]:
            matched.append(number)
        elif call.spelling != "softmax":
            return f"{_in_words(eager)} in eager are {len(graph)} attention calls in the graph"
    if len(matched) < len(graph):
        return f"{_in_words(eager)} in eager are {len(graph)} attention calls in the graph"
    return matched


def _in_words(eager: Sequence[EagerCall]) -> str:
    counts = {spelling: sum(call.spelling == spelling for call in eager) for spelling in ("sdpa", "softmax", "module")}
    return " and ".join(f"{count} {spelling} calls" for spelling, count in counts.items() if count) or "no calls"
