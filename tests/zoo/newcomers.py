"""Three models that nobody has seen: written as their authors might, not for any tool."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from t3compile.geometry import TokenGrid
from tests.zoo.entry import ZooEntry

GRID = TokenGrid(3, 4, 6)


def timestep_features(t: Tensor, dim: int) -> Tensor:
    rates = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(1e4) / (dim // 2)))
    angles = t[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeInnermostAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.LayerNorm(dim // heads)
        self.k_norm = nn.LayerNorm(dim // heads)
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_norm(self.q(x).reshape(b, n, self.heads, -1))
        k = self.k_norm(self.k(x).reshape(b, n, self.heads, -1))
        v = self.v(x).reshape(b, n, self.heads, -1)
        q, k = self.rotate(q, rotary), self.rotate(k, rotary)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    @staticmethod
    def rotate(x: Tensor, rotary: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = rotary.cos()[:, None], rotary.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class TimeInnermostBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim)
        self.attn = TimeInnermostAttention(dim, heads)
        self.norm2 = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(dim, dim)
        self.ada = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor) -> Tensor:
        s1, g1, s2, g2 = self.ada(F.silu(c)).unsqueeze(1).chunk(4, dim=-1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + s1), rotary)
        a, b = self.gate(self.norm2(x) * (1 + s2)).chunk(2, dim=-1)
        return x + g2 * self.down(F.silu(a) * b)


class ChannelsLastVideoDiT(nn.Module):
    """Latents [B, T, H, W, C]; patches by reshape and Linear; a sequence with time innermost."""

    def __init__(self, channels: int = 4, dim: int = 48, heads: int = 2, depth: int = 2, patch: int = 2) -> None:
        super().__init__()
        self.patch, self.dim, self.heads = patch, dim, heads
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.label = nn.Linear(20, dim)
        self.t_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(TimeInnermostBlock(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, channels * patch * patch)

    def rotary(self, frames: int, rows: int, columns: int) -> Tensor:
        pairs = self.dim // self.heads // 2
        rates = 100.0 ** (-torch.arange(pairs // 3) * 3 / pairs)
        y, x, t = torch.meshgrid(torch.arange(rows), torch.arange(columns), torch.arange(frames), indexing="ij")
        return torch.cat([axis.reshape(-1, 1) * rates for axis in (y, x, t)], dim=-1)

    def forward(self, video: Tensor, t: Tensor, label: Tensor) -> Tensor:
        b, frames, height, width, channels = video.shape
        p = self.patch
        x = video.reshape(b, frames, height // p, p, width // p, p, channels)
        x = x.permute(0, 2, 4, 1, 3, 5, 6).reshape(b, -1, p * p * channels)  # b (h w t) (p p c)
        x = self.embed(x)
        c = self.t_embed(timestep_features(t, self.dim)) + self.label(label)
        rotary = self.rotary(frames, height // p, width // p)
        for block in self.blocks:
            x = block(x, c, rotary)
        x = self.head(x).reshape(b, height // p, width // p, frames, p, p, channels)
        return x.permute(0, 3, 1, 4, 2, 5, 6).reshape(b, frames, height, width, channels)


class PackedBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(dim)
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.c_proj(y.permute(0, 2, 1, 3).flatten(2))
        return x + self.mlp(self.ln_2(x))


class UShapedVideoTransformer(nn.Module):
    """A fine and a coarse stage, each with registers in front and learned positions."""

    def __init__(self, channels: int = 4, dim: int = 32, heads: int = 2, grid: TokenGrid = GRID) -> None:
        super().__init__()
        t, h, w = grid.sizes
        self.grid = grid.sizes
        self.conv_in = nn.Conv3d(channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.time = nn.Linear(32, dim)
        self.registers = nn.Parameter(0.1 * torch.randn(4, dim))
        self.fine_positions = nn.Parameter(0.1 * torch.randn(1, t * h * w, dim))
        self.coarse_positions = nn.Parameter(0.1 * torch.randn(1, t * h * w // 4, 2 * dim))
        self.fine = PackedBlock(dim, heads)
        self.merge = nn.Linear(4 * dim, 2 * dim)
        self.widen = nn.Linear(dim, 2 * dim)
        self.coarse = PackedBlock(2 * dim, heads)
        self.split = nn.Linear(2 * dim, 4 * dim)
        self.conv_out = nn.ConvTranspose3d(dim, channels, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frames, rows, columns = self.grid
        x = self.conv_in(x).flatten(2).mT + self.fine_positions + self.time(timestep_features(t, 32))[:, None]
        registers = self.registers.expand(x.shape[0], -1, -1)
        x = self.fine(torch.cat([registers, x], dim=1))
        registers, x = x[:, :4], x[:, 4:]
        y = x.unflatten(1, (frames, rows // 2, 2, columns // 2, 2)).permute(0, 1, 2, 4, 3, 5, 6)
        y = self.merge(y.flatten(4).flatten(1, 3)) + self.coarse_positions
        y = self.coarse(torch.cat([self.widen(registers), y], dim=1))[:, 4:]
        y = self.split(y).view(y.shape[0], frames, rows // 2, columns // 2, 2, 2, -1)
        x = x + y.permute(0, 1, 2, 4, 3, 5, 6).flatten(1, 5)
        return self.conv_out(x.mT.unflatten(2, self.grid))


class JointBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image_qkv, self.text_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.image_out, self.text_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.image_mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.text_mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def heads_first(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        return tuple(part.view(b, n, self.heads, -1).transpose(1, 2) for part in x.chunk(3, dim=-1))

    def forward(self, image: Tensor, text: Tensor, c: Tensor, freqs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        normed = F.layer_norm(image, image.shape[-1:]) * (1 + scale) + shift
        pairs = zip(self.heads_first(self.text_qkv(text)), self.heads_first(self.image_qkv(normed)), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        q, k = (self.rotate(x, freqs) for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        text_y, image_y = y[:, : text.shape[1]], y[:, text.shape[1] :]
        image = image + self.image_out(image_y)
        text = text + self.text_out(text_y)
        return image + self.image_mlp(image), text + self.text_mlp(text)

    @staticmethod
    def rotate(x: Tensor, freqs: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * freqs
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class PackedJointDiT(nn.Module):
    """Packed latents with (t, y, x) position ids, text in front, its padding hidden by a key mask."""

    def __init__(self, channels: int = 16, text_dim: int = 24, dim: int = 48, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.dim, self.axes_dim = dim, (8, 8, 8)
        self.img_in = nn.Linear(channels, dim)
        self.txt_in = nn.Sequential(nn.RMSNorm(text_dim), nn.Linear(text_dim, dim))
        self.t_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(JointBlock(dim, heads) for _ in range(depth))
        self.out = nn.Linear(dim, channels)

    def frequencies(self, ids: Tensor) -> Tensor:
        parts = []
        for axis, dim in enumerate(self.axes_dim):
            rates = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
            angles = ids[:, axis, None].double() * rates
            parts.append(torch.polar(torch.ones_like(angles), angles).to(torch.complex64))
        return torch.cat(parts, dim=-1)

    def forward(
        self, img: Tensor, txt: Tensor, timesteps: Tensor, img_ids: Tensor, txt_ids: Tensor, txt_mask: Tensor
    ) -> Tensor:
        image, text = self.img_in(img), self.txt_in(txt)
        c = self.t_in(timestep_features(timesteps * 1000, self.dim))
        freqs = self.frequencies(torch.cat([txt_ids, img_ids]))
        mask = torch.cat([txt_mask, txt_mask.new_ones(img.shape[:2])], dim=1)[:, None, None]
        for block in self.blocks:
            image, text = block(image, text, c, freqs, mask)
        return self.out(F.layer_norm(image, image.shape[-1:]))


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        "ChannelsLastVideoDiT",
        ChannelsLastVideoDiT,
        lambda: {"video": torch.randn(1, 3, 8, 12, 4), "t": torch.tensor([400.0]), "label": torch.randn(1, 20)},
        grid_sites=2,
        grid=GRID,
        expected="latents [B, T, H, W, C], patches by reshape and Linear, time innermost in the sequence",
    ),
    ZooEntry(
        "UShapedVideoTransformer",
        UShapedVideoTransformer,
        lambda: {"x": torch.randn(1, 4, 3, 8, 12), "t": torch.tensor([400.0])},
        grid_sites=2,
        grid=GRID,
        more_grids=(TokenGrid(3, 2, 3),),
        expected="a fine and a coarse stage, four registers in front, learned positions, packed qkv",
    ),
    ZooEntry(
        "PackedJointDiT",
        PackedJointDiT,
        lambda: {
            "img": torch.randn(1, GRID.tokens, 16),
            "txt": torch.randn(1, 7, 24),
            "timesteps": torch.tensor([0.4]),
            "img_ids": torch.cartesian_prod(*(torch.arange(size) for size in GRID.sizes)),
            "txt_ids": torch.zeros(7, 3, dtype=torch.int64),
            "txt_mask": (torch.arange(7) < 5)[None],
        },
        grid_sites=2,
        grid=GRID,
        expected="packed latents with position ids; text before the grid, padded under a boolean key mask",
    ),
)
