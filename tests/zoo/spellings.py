"""Small DiTs in the style of original repositories, one for each way to spell attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import TokenGrid
from tests.zoo.entry import ZooEntry

VIDEO, IMAGE = TokenGrid(3, 4, 6), TokenGrid(1, 4, 6)
DIM, HEADS, TEXT = 16, 2, 5
Spelling = Callable[..., Tensor]


class Attention(nn.Module):
    """One call: q, k, v (and a mask) in the spelling's own layout -> the same layout as q."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.spelling(q, k, v) if mask is None else self.spelling(q, k, v, mask)


def scale_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def scale_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]), dim=-1).matmul(v)


def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = q.shape[-1] ** -0.25
    return ((q * root) @ (k * root).mT).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, s, d = q.shape
    q, k, v = (x.reshape(b * n, s, d) for x in (q, k, v))
    empty = torch.empty(b * n, s, s, dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(b, n, s, d)


def packed_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _, d = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * d**-0.5).softmax(-1), v).unflatten(0, (b, n))


def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b i h d, b j h d -> b h i j", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("b h i j, b j h d -> b i h d", scores.softmax(-1), v)


def float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    return torch.softmax(scores, -1, dtype=torch.float32).type_as(q) @ v


def minus_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def additive_mask(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    bias = (1 - visible.to(q.dtype)) * -1e9
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def boolean_fill(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf).softmax(-1) @ v


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return scale_after(q, k, v)


def expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, s, d)
    return scale_after(q, k.unsqueeze(2), v.unsqueeze(2)).reshape(b, n, s, d)


def enabled_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def heads_last_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flat_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).unflatten(0, (b, n))


class Block(nn.Module):
    """Modulated attention and MLP; the projections stand outside the attention's own submodule."""

    def __init__(self, spelling: Spelling, heads: int, kv_heads: int, heads_last: bool, attend_text: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.heads_last, self.attend_text = heads, kv_heads, heads_last, attend_text
        width = DIM // heads * kv_heads
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.modulation = nn.Linear(DIM, 4 * DIM)
        self.qkv = nn.Linear(DIM, DIM + 2 * width)
        self.attention = Attention(spelling)
        self.out = nn.Linear(DIM, DIM)
        if attend_text == "cross":
            self.cross_q, self.cross_kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
            self.cross = Attention(spelling)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        x = x.unflatten(-1, (heads, -1))
        return x if self.heads_last else x.transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return (x if self.heads_last else x.transpose(1, 2)).flatten(2)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        shift, scale, gate, gate_mlp = self.modulation(time).unsqueeze(1).chunk(4, dim=-1)
        width = DIM // self.heads * self.kv_heads
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).split((DIM, width, width), dim=-1)
        q, k, v = self._split(q, self.heads), self._split(k, self.kv_heads), self._split(v, self.kv_heads)
        x = x + gate * self.out(self._join(self.attention(q, k, v, mask)))
        if self.attend_text == "cross":
            k, v = (self._split(y, self.heads) for y in self.cross_kv(text).chunk(2, dim=-1))
            x = x + self._join(self.cross(self._split(self.cross_q(x), self.heads), k, v))
        return x + gate_mlp * self.mlp(self.norm(x))


class TorchAttention(nn.Module):
    """q, k, v -> torch's own module."""

    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.batch_first, self.need_weights = batch_first, need_weights
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.batch_first:
            return self.inner(q, k, v, need_weights=self.need_weights)[0]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return self.inner(q, k, v, need_weights=self.need_weights)[0].transpose(0, 1)


class TorchBlock(nn.Module):
    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.modulation = nn.Linear(DIM, DIM)
        self.attention = TorchAttention(batch_first, need_weights)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x) + self.modulation(time).unsqueeze(1)
        return x + self.attention(y, y, y)


class SpelledDiT(nn.Module):
    """forward(x [B, 4, T, 2H, 2W] or [B, 4, 2H, 2W], t [B], text [B, 5, 8], mask [B, 5] bool) -> like x."""

    def __init__(self, block: Callable[[], nn.Module], *, image: bool = False, joint: bool = False) -> None:
        super().__init__()
        self.image, self.joint = image, joint
        self.patchify = nn.Conv2d(4, DIM, 2, 2) if image else nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.time_in, self.text_in = nn.Linear(1, DIM), nn.Linear(8, DIM)
        self.blocks = nn.ModuleList([block() for _ in range(2)])
        self.unpatchify = nn.Linear(DIM, 16)

    def attention_calls(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, Attention | TorchAttention)]

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        grid = self.patchify(x)  # [B, dim, (T,) H, W]
        sizes = grid.shape[2:]
        tokens = grid.flatten(2).transpose(1, 2)
        time, text = self.time_in(t.unsqueeze(-1)), self.text_in(text)
        if self.joint:
            tokens = torch.cat((text, tokens), dim=1)
        if mask is not None:
            seen = torch.ones(x.shape[0], math.prod(sizes), dtype=torch.bool)
            mask = torch.cat((mask, seen), dim=1)[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, text, time, mask)
        out = self.unpatchify(tokens[:, text.shape[1] :] if self.joint else tokens)
        out = out.unflatten(1, sizes).unflatten(-1, (2, 2, 4))  # [B, (T,) H, W, 2, 2, 4]
        if self.image:
            return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class UnpackedDiT(nn.Module):
    """forward(x: a list of latents [4, T, 2H, 2W], t [B], text) -> a list like x."""

    def __init__(self, inner: SpelledDiT) -> None:
        super().__init__()
        self.inner = inner

    def attention_calls(self) -> list[nn.Module]:
        return self.inner.attention_calls()

    def forward(self, x: list[Tensor], t: Tensor, text: Tensor) -> list[Tensor]:
        return list(self.inner(torch.stack(x), t, text).unbind(0))


def _spelled(
    spelling: Spelling,
    *,
    kv_heads: int = HEADS,
    heads: int = HEADS,
    heads_last: bool = False,
    attend_text: str = "",
    **model: bool,
) -> nn.Module:
    return SpelledDiT(partial(Block, spelling, heads, kv_heads, heads_last, attend_text), **model)


def _inputs(*, image: bool = False, masked: bool = False) -> Mapping[str, Any]:
    sizes = (2, 4, 8, 12) if image else (2, 4, 3, 8, 12)
    inputs = {"x": torch.randn(sizes), "t": torch.rand(2), "text": torch.randn(2, TEXT, 8)}
    return inputs | ({"mask": torch.arange(TEXT) < torch.tensor([[3], [5]])} if masked else {})


def _list_inputs() -> Mapping[str, Any]:
    named = dict(_inputs())
    return named | {"x": list(named["x"].unbind(0))}


def _entry(name: str, spelling: Spelling, **options: Any) -> ZooEntry:
    image, masked = options.get("image", False), options.pop("masked", False)
    grid = IMAGE if image else VIDEO
    build = partial(_spelled, spelling, **options)
    return ZooEntry(f"spelled {name}", build, partial(_inputs, image=image, masked=masked), 2, grid)


def _torch_entry(name: str, batch_first: bool, need_weights: bool) -> ZooEntry:
    block = partial(TorchBlock, batch_first, need_weights)
    return ZooEntry(f"spelled {name}", partial(SpelledDiT, block), _inputs, 2, VIDEO)


def _unpacked() -> nn.Module:
    inner = _spelled(scale_before)
    assert isinstance(inner, SpelledDiT)
    return UnpackedDiT(inner)


ENTRIES: tuple[ZooEntry, ...] = (
    _entry("scale before", scale_before),
    _entry("scale after", scale_after),
    _entry("divided", divided),
    _entry("scale on both", scale_on_both),
    _entry("baddbmm", baddbmm),
    _entry("packed bmm", packed_bmm),
    _entry("einsum heads first", einsum_heads_first),
    _entry("einsum heads last", einsum_heads_last, heads_last=True),
    _entry("float32 softmax", float32_softmax),
    _entry("minus maximum", minus_maximum),
    _entry("joint additive mask", additive_mask, joint=True, masked=True),
    _entry("joint boolean fill", boolean_fill, joint=True, masked=True),
    _entry("joint", scale_after, joint=True),
    _entry("repeated heads", repeated_heads, heads=4, kv_heads=2),
    _entry("expanded heads", expanded_heads, heads=4, kv_heads=2),
    _entry("enabled groups", enabled_groups, heads=4, kv_heads=2),
    _entry("heads last fused", heads_last_fused, heads_last=True),
    _entry("flat fused", flat_fused),
    _entry("cross-attention", scale_before, attend_text="cross"),
    _entry("image", einsum_heads_first, image=True),
    _torch_entry("module batch first", True, False),
    _torch_entry("module batch first with weights", True, True),
    _torch_entry("module sequence first", False, False),
    ZooEntry("spelled unpacked list", _unpacked, _list_inputs, 2, VIDEO, hint="3x4x6", expected="inputs are a list"),
)
