"""Small video DiTs for tests: diffusers' Wan with the published architecture, and an independent
hand-written one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WAN_VAE_CONFIG = {"_class_name": "AutoencoderKLWan", "temperal_downsample": [False, True, True]}


def tiny_wan(
    layers: int = 2,
    grid: tuple[int, int, int] = (3, 4, 4),
    *,
    heads: int = 2,
    head_dim: int = 12,
    text_tokens: int = 7,
    batch: int = 1,
    seed: int = 0,
    **config: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """diffusers' WanTransformer3DModel at the token grid (T, H, W), in eval mode, and its keyword
    inputs.
    """
    import diffusers

    build: Any = diffusers.WanTransformer3DModel
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
        **config,
    }
    model: nn.Module = build(**fields).eval()
    frames, height, width = grid
    inputs = {
        "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text_tokens, 16),
    }
    return model, inputs


class HandWrittenDiT(nn.Module):
    """A Wan-like video DiT in plain torch: Conv3d patches, real-valued RoPE, AdaLN, self- and
    cross-attention.

    forward(x [B, C, T, H, W], t [B], text [B, S, text_dim]) -> [B, C, T, H, W].
    """

    def __init__(
        self,
        layers: int = 2,
        heads: int = 2,
        head_dim: int = 12,
        grid: tuple[int, int, int] = (3, 4, 4),
        patch: tuple[int, int, int] = (1, 2, 2),
        channels: int = 4,
        text_dim: int = 16,
        text_tokens: int = 5,
        ffn_dim: int = 32,
        batch: int = 1,
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.grid, self.patch, self.channels = grid, patch, channels
        self.text_dim, self.text_tokens, self.batch = text_dim, text_tokens, batch
        self.patchify = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)
        self.time_in = nn.Linear(dim, dim)
        self.time_modulation = nn.Linear(dim, 6 * dim)
        self.text_in = nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList([_Block(dim, heads, ffn_dim) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation_out = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))
        self.unpatchify = nn.Linear(dim, channels * math.prod(patch))
        cos, sin = _rope_tables(grid, head_dim)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        tokens = self.patchify(x)  # [B, dim, T, H, W]
        frames, height, width = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)  # [B, S, dim]
        time = torch.nn.functional.silu(self.time_in(_sinusoids(t, tokens.shape[-1])))
        modulation = self.time_modulation(time).reshape(x.shape[0], 6, -1)
        context = self.text_in(text)
        for block in self.blocks:
            tokens = block(tokens, context, modulation, self.rope_cos, self.rope_sin)
        shift, scale = (self.modulation_out + time.unsqueeze(1)).chunk(2, dim=1)
        out: Tensor = self.unpatchify(self.norm_out(tokens) * (1 + scale) + shift)
        out = out.reshape(-1, frames, height, width, *self.patch, self.channels)
        # [B, T, H, W, pt, ph, pw, C] -> [B, C, T, pt, H, ph, W, pw]
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def example_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Seeded (x, t, text) at the module's grid."""
        generator = torch.Generator().manual_seed(1)
        sizes = [length * size for length, size in zip(self.grid, self.patch, strict=True)]
        return (
            torch.randn((self.batch, self.channels, *sizes), generator=generator),
            torch.full((self.batch,), 500.0),
            torch.randn((self.batch, self.text_tokens, self.text_dim), generator=generator),
        )


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim)
        self.norm_k = nn.RMSNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_q = nn.Linear(dim, dim)
        self.cross_kv = nn.Linear(dim, 2 * dim)
        self.cross_out = nn.Linear(dim, dim)
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).chunk(6, dim=1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
        q, k, v = (self._split(y) for y in (self.norm_q(q), self.norm_k(k), v))
        attended = scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + gate1 * self.out(attended.transpose(1, 2).flatten(2))
        k, v = (self._split(y) for y in self.cross_kv(context).chunk(2, dim=-1))
        attended = scaled_dot_product_attention(self._split(self.cross_q(self.norm2(x))), k, v)
        x = x + self.cross_out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, dim] -> [B, N, S, D]"""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, N, S, D] with tables [S, D/2]; pairs are neighbours."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _rope_tables(grid: tuple[int, int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, D/2]: a third of the pairs for each axis, the rest for time."""
    pairs = head_dim // 2
    per_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = torch.meshgrid(*(torch.arange(length).double() for length in grid), indexing="ij")
    angles = [
        position.flatten().unsqueeze(1) * 10_000.0 ** (-torch.arange(count).double() / max(count, 1))
        for position, count in zip(positions, per_axis, strict=True)
    ]
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


def _sinusoids(t: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim]"""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.unsqueeze(1) * rates
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(t.dtype)
