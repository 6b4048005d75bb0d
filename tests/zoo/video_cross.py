"""Video models whose text comes in through cross-attention, or whose self-attention is linear or causal."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from t3compile.geometry import TokenGrid

from .entry import ZooEntry

GRID = TokenGrid(3, 4, 6)
WAN_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
ANIMATE_SIZES: dict[str, Any] = WAN_SIZES | {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 24,
    "added_kv_proj_dim": 32,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}


def _latents(channels: int = 4, frames: int = 3) -> Tensor:
    return torch.randn(1, channels, frames, 8, 12)


def _text(width: int = 32, length: int = 8) -> Tensor:
    return torch.randn(1, length, width)


def _padded(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1] * 6 + [0] * 2], dtype=dtype)


def _wan_inputs(channels: int = 4, frames: int = 3, text_length: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": _latents(channels, frames),
        "timestep": torch.tensor([977]),
        "encoder_hidden_states": _text(length=text_length),
        "return_dict": False,
    }


def _vace_inputs() -> dict[str, Any]:
    return _wan_inputs() | {
        "control_hidden_states": _latents(12),
        "control_hidden_states_scale": torch.ones(2),
    }


def _animate_inputs() -> dict[str, Any]:
    # The model takes all but the last 512 context tokens for image tokens.
    return _wan_inputs(channels=12, text_length=512) | {
        "encoder_hidden_states_image": _text(24, length=5),
        "pose_hidden_states": _latents(4, frames=2),
        "face_pixel_values": torch.rand(1, 3, 5, 16, 16) * 2 - 1,
    }


def _animate2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": [_latents()[0]],
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": [_text()[0]],
        "encoder_hidden_states_image": _text(1280, length=5),
        "condition_latents": [_latents(8)[0]],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": GRID.tokens,
        "offset_grid_sizes": torch.tensor([[3, 4, 6]]),
        "return_dict": False,
    }


def _skyreels_inputs() -> dict[str, Any]:
    return _wan_inputs() | {
        "timestep": torch.tensor([[977, 977, 977]]),
        "enable_diffusion_forcing": True,
        "fps": [1],
    }


def _anyflow_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents().transpose(1, 2).contiguous(),
        "timestep": torch.full((1, 3), 800.0),
        "r_timestep": torch.full((1, 3), 400.0),
        "encoder_hidden_states": _text(),
        "return_dict": False,
    }


def _far_inputs() -> dict[str, Any]:
    cache = {
        layer: {"full_cache": torch.randn(2, 1, 2, 216, 16), "compressed_cache": torch.randn(2, 1, 2, 36, 16)}
        for layer in range(2)
    }
    return _anyflow_inputs() | {
        "chunk_partition": [1, 3, 3, 3],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 3, "is_cache_step": False},
    }


def _helios_inputs() -> dict[str, Any]:
    first, long, mid, last, now = torch.arange(23)[None].split([1, 16, 2, 1, 3], dim=1)
    return _wan_inputs() | {
        "timestep": torch.tensor([977.0]),
        "indices_hidden_states": now,
        "indices_latents_history_short": torch.cat([first, last], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": _latents(frames=2),
        "latents_history_mid": _latents(frames=2),
        "latents_history_long": _latents(frames=16),
    }


def _cosmos_inputs() -> dict[str, Any]:
    condition = torch.zeros(1, 1, 3, 8, 12)
    condition[:, :, 0] = 1
    return {
        "hidden_states": _latents(),
        "timestep": torch.tensor([0.8]),
        "encoder_hidden_states": _text(),
        "fps": 30,
        "condition_mask": condition,
        "return_dict": False,
    }


def _allegro_inputs() -> dict[str, Any]:
    *frequencies, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (4, 6)), grid_size=(4, 6), temporal_size=3, interpolation_scale=(2.2, 2, 2)
    )
    positions = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T[:, None].contiguous()
    return {
        "hidden_states": _latents(),
        "encoder_hidden_states": _text()[:, None],
        "encoder_attention_mask": _padded(torch.int64),
        "timestep": torch.tensor([999.0]),
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
        "return_dict": False,
    }


def _latte_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([981]),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, GRID.tokens, 8),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([993.0]),
        "encoder_attention_mask": _padded(torch.bool),
        "num_frames": 3,
        "height": 4,
        "width": 6,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def _sana_video_inputs() -> dict[str, Any]:
    return _wan_inputs() | {"encoder_attention_mask": _padded(torch.int64)}


def _sana_wm_inputs() -> dict[str, Any]:
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, 2, 3] = torch.arange(3) * 0.1
    intrinsics = torch.tensor([5.0, 5.0, 3.0, 2.0]).expand(3, 4)
    return {
        "hidden_states": torch.randn(1, 8, 3, 4, 6),
        "timestep": torch.tensor([[[0.0, 900.0, 900.0]]]),
        "encoder_hidden_states": _text()[:, None],
        "mask": _padded(torch.int64),
        "data_info": {"img_hw": torch.tensor([[128.0, 192.0]])},
        "camera_conditions": torch.cat([pose.flatten(1), intrinsics], dim=1)[None],
        "chunk_plucker": torch.randn(1, 48, 3, 4, 6),
        "return_dict": False,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        name="WanTransformer3DModel",
        build=lambda: diffusers.WanTransformer3DModel(**WAN_SIZES),
        inputs=_wan_inputs,
        grid_sites=2,
        grid=GRID,
    ),
    ZooEntry(
        name="WanVACETransformer3DModel",
        build=lambda: diffusers.WanVACETransformer3DModel(
            **WAN_SIZES | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=12
        ),
        inputs=_vace_inputs,
        grid_sites=5,
        grid=GRID,
        expected="Two control blocks attend over a second sequence, the control video's tokens on the same grid.",
    ),
    ZooEntry(
        name="WanAnimateTransformer3DModel",
        build=lambda: diffusers.WanAnimateTransformer3DModel(**ANIMATE_SIZES),
        inputs=_animate_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Frame 0 of the grid is the reference image; two face adapters attend frame by frame, across.",
    ),
    ZooEntry(
        name="WanAnimate2Transformer3DModel",
        build=lambda: diffusers.WanAnimate2Transformer3DModel(
            text_len=8, in_dim=12, dim=32, ffn_dim=64, freq_dim=32, text_dim=32, out_dim=4, num_heads=2, num_layers=2
        ),
        inputs=_animate2_inputs,
        grid_sites=2,
        grid=GRID,
        expected=(
            "This is the reference pass, which fills a cache object that torch.export does not take; the denoising"
            " passes attend through flex_attention under a BlockMask."
        ),
    ),
    ZooEntry(
        name="SkyReelsV2Transformer3DModel",
        build=lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN_SIZES, inject_sample_info=True),
        inputs=_skyreels_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Synchronous diffusion forcing: one timestep a frame, and no causal mask with blocks of one frame.",
    ),
    ZooEntry(
        name="ChronoEditTransformer3DModel",
        build=lambda: diffusers.ChronoEditTransformer3DModel(
            **WAN_SIZES | {"attention_head_dim": 24, "in_channels": 12}, image_dim=24, added_kv_proj_dim=48
        ),
        inputs=lambda: (
            _wan_inputs(channels=12, frames=2, text_length=512) | {"encoder_hidden_states_image": _text(24, length=5)}
        ),
        grid_sites=2,
        grid=TokenGrid(2, 4, 6),
        expected="Two frames, the image before and after, at positions 0 and 7 of the rotary embedding.",
    ),
    ZooEntry(
        name="AnyFlowTransformer3DModel",
        build=lambda: diffusers.AnyFlowTransformer3DModel(**WAN_SIZES),
        inputs=_anyflow_inputs,
        grid_sites=2,
        grid=GRID,
        expected="The latents hold frames before channels.",
    ),
    ZooEntry(
        name="AnyFlowFARTransformer3DModel",
        build=lambda: diffusers.AnyFlowFARTransformer3DModel(**WAN_SIZES),
        inputs=_far_inputs,
        grid_sites=2,
        grid=TokenGrid(3, 4, 6),
        expected=(
            "flex_attention over a sequence padded to 128 tokens; the padding is not hidden, and one chunk without a"
            " cache attends to all of itself. The eager reference cannot replace flex_attention."
        ),
    ),
    ZooEntry(
        name="HeliosTransformer3DModel",
        build=lambda: diffusers.HeliosTransformer3DModel(
            **{key: size for key, size in WAN_SIZES.items() if key != "rope_max_seq_len"}, rope_dim=(8, 4, 4)
        ),
        inputs=_helios_inputs,
        grid_sites=2,
        grid=GRID,
        expected="62 tokens of history stand before the grid: 8 of coarse, 6 of medium and 48 of fine patches.",
    ),
    ZooEntry(
        name="CosmosTransformer3DModel",
        # The padding mask is switched off because its resizing needs torchvision.
        build=lambda: diffusers.CosmosTransformer3DModel(
            in_channels=5,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            text_embed_dim=32,
            adaln_lora_dim=8,
            max_size=(16, 32, 32),
            concat_padding_mask=False,
        ),
        inputs=_cosmos_inputs,
        grid_sites=2,
        grid=GRID,
        expected="A mask of the conditioning frames is one more channel of the latents, not a mask of the attention.",
    ),
    ZooEntry(
        name="AllegroTransformer3DModel",
        build=lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=12,
            sample_frames=3,
            caption_channels=32,
        ),
        inputs=_allegro_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Rotary frequencies and flat positions are inputs, and the text has a padding mask.",
    ),
    ZooEntry(
        name="LatteTransformer3DModel",
        build=lambda: diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=32,
            video_length=3,
        ),
        inputs=_latte_inputs,
        grid_sites=0,
        expected="Self-attention is factorised: within each frame, then along the frames of each place.",
    ),
    ZooEntry(
        name="LTXVideoTransformer3DModel",
        build=lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        inputs=_ltx_inputs,
        grid_sites=2,
        grid=GRID,
        hint="3x4x6",
        expected="The latents come packed, their sizes as Python ints.",
    ),
    ZooEntry(
        name="SanaVideoTransformer3DModel",
        build=lambda: diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            rope_max_seq_len=32,
        ),
        inputs=_sana_video_inputs,
        grid_sites=0,
        expected="Self-attention is linear: relu features, keys and values multiplied first.",
    ),
    ZooEntry(
        name="SanaWMTransformer3DModel",
        build=lambda: diffusers.SanaWMTransformer3DModel(
            in_channels=8,
            num_layers=4,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            caption_channels=32,
        ),
        inputs=_sana_wm_inputs,
        grid_sites=4,
        grid=GRID,
        expected=(
            "Every second block has softmax attention in two branches, cast to bfloat16, the camera branch with heads"
            " zero-padded to 128; the other blocks are gated delta rules."
        ),
    ),
)
