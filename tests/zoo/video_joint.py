"""Video transformers of diffusers with text (or more) and video in one attention, and their relatives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    Cosmos3OmniTransformer,
    EasyAnimateTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LTX2VideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed
from torch import Tensor

from t3compile.geometry import TokenGrid
from tests.zoo.entry import ZooEntry

GRID = TokenGrid(3, 4, 6)
TEXT = 8
TIMESTEP = 500.0


def _latents(channels: int = 4, patch: int = 2) -> Tensor:
    return torch.randn(1, channels, GRID.t, GRID.h * patch, GRID.w * patch)


def _text(dim: int = 32, tokens: int = TEXT) -> Tensor:
    return torch.randn(1, tokens, dim)


def _mask(tokens: int = TEXT, valid: int = 6) -> Tensor:
    return (torch.arange(tokens) < valid)[None]


def _timestep() -> Tensor:
    return torch.tensor([TIMESTEP])


def _grid_positions() -> Tensor:
    """The (t, h, w) indices of every grid token, frame-major: [T*H*W, 3]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in GRID.sizes))


def _cogvideox_rope(head_dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = get_3d_rotary_pos_embed(head_dim, ((0, 0), (GRID.h, GRID.w)), (GRID.h, GRID.w), GRID.t)
    return cos, sin


COGVIDEOX: dict[str, Any] = {
    "attention_head_dim": 16,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


def _cogvideox_inputs(channels: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(channels).transpose(1, 2).contiguous(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": _cogvideox_rope(16),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cosmos3_inputs() -> dict[str, Any]:
    length = TEXT + GRID.tokens
    rows = torch.arange(TEXT, length)
    text_positions = torch.arange(TEXT, dtype=torch.float32).expand(3, TEXT)
    vision_positions = _grid_positions().T.float() + torch.tensor([[15008.0], [0.0], [0.0]])
    return {
        "input_ids": torch.randint(32, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([text_positions, vision_positions], dim=1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [_latents()],
        "vision_token_shapes": [GRID.sizes],
        "vision_sequence_indexes": rows,
        "vision_mse_loss_indexes": rows.clone(),
        "vision_timesteps": torch.full((GRID.tokens,), TIMESTEP),
        "vision_noisy_frame_indexes": [torch.arange(GRID.t)],
        "return_dict": False,
    }


HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(),
        "timestep": _timestep(),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask().float(),
        "pooled_projections": torch.randn(1, 16),
        "guidance": torch.tensor([6000.0]),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _framepack_inputs() -> dict[str, Any]:
    prefix, history_4x, history_2x, history_1x, current = torch.arange(20 + GRID.t).split([1, 16, 2, 1, GRID.t])
    history = torch.randn(1, 4, 20, 2 * GRID.h, 2 * GRID.w)
    return _hunyuan_inputs() | {
        "image_embeds": _text(16, tokens=5),
        "indices_latents": current,
        "latents_clean": history[:, :, [0, 19]],
        "indices_latents_clean": torch.cat([prefix, history_1x]),
        "latents_history_2x": history[:, :, 17:19],
        "indices_latents_history_2x": history_2x,
        "latents_history_4x": history[:, :, 1:17],
        "indices_latents_history_4x": history_4x,
    }


KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 32,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
}


def _kandinsky_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(9).permute(0, 2, 3, 4, 1).contiguous(),
        "encoder_hidden_states": _text(),
        "pooled_projections": torch.randn(1, 16),
        "timestep": _timestep(),
        "return_dict": False,
    }


def _ltx2_coords() -> Tensor:
    """[start, end) of every token, in seconds and pixels: eight frames and 32 x 32 pixels a latent, 24 frames/s."""
    start = _grid_positions().T.float()
    coords = torch.stack([start, start + 1], dim=-1) * torch.tensor([8.0, 32.0, 32.0])[:, None, None]
    coords[0] = (coords[0] - 7).clamp(min=0) / 24
    return coords[None]


def _ltx2_audio_coords(tokens: int) -> Tensor:
    start = torch.arange(tokens, dtype=torch.float32) * 4
    return ((torch.stack([start, start + 4], dim=-1) - 3).clamp(min=0) * 160 / 16000)[None, None]


LTX2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 32,
    "rope_type": "split",
}


def _ltx2_inputs() -> dict[str, Any]:
    audio_tokens = 10
    return {
        "hidden_states": torch.randn(1, GRID.tokens, 8),
        "audio_hidden_states": torch.randn(1, audio_tokens, 8),
        "encoder_hidden_states": _text(),
        "audio_encoder_hidden_states": _text(16),
        "timestep": _timestep(),
        "sigma": _timestep(),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "audio_encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "num_frames": GRID.t,
        "height": GRID.h,
        "width": GRID.w,
        "fps": 24.0,
        "audio_num_frames": audio_tokens,
        "video_coords": _ltx2_coords(),
        "audio_coords": _ltx2_audio_coords(audio_tokens),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _sana_refiner_inputs() -> dict[str, Any]:
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=32, rope_type="split", num_attention_heads=2)
    return {
        "hidden_states": torch.randn(1, GRID.tokens, 8),
        "encoder_hidden_states": _text(),
        "timestep": torch.full((1, GRID.tokens), TIMESTEP),
        "video_rotary_emb": rope(_ltx2_coords()),
        "encoder_attention_mask": _mask().flip(1).long(),
        "return_dict": False,
    }


def _minimax_h3_inputs() -> dict[str, Any]:
    audio = 2 * 5
    sizes = [TEXT, audio, GRID.tokens]
    text_rows, audio_rows, video_rows = torch.arange(sum(sizes)).split(sizes)
    positions = torch.zeros(sum(sizes), 3, dtype=torch.float64)
    positions[text_rows, 0] = text_rows.double()
    positions[audio_rows, 0] = TEXT + torch.arange(5).double().repeat(2)
    positions[audio_rows, 2] = torch.tensor([-3.6, 29.1]).double().repeat_interleave(5)
    frame_times = torch.tensor([0, 5, 25]).double() / 3
    t, h, w = _grid_positions().unbind(1)
    positions[video_rows] = torch.stack([TEXT + frame_times[t], 2.9 + 6.5 * h, -3.6 + 6.5 * w], dim=1)
    return {
        "hidden_states": torch.randn(1, GRID.tokens, 16),
        "audio_hidden_states": torch.randn(1, audio, 8),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5, 0.7]),
        "timestep_indices": torch.tensor([0, 1, 0]).repeat_interleave(torch.tensor(sizes)),
        "attention_kwargs": None,
        "return_dict": False,
        "position_ids": positions,
        "token_tags": torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(sizes)),
        "video_indices": video_rows,
        "audio_indices": audio_rows,
        "text_indices": text_rows,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        "CogVideoXTransformer3DModel",
        lambda: CogVideoXTransformer3DModel(num_attention_heads=2, in_channels=4, **COGVIDEOX),
        lambda: _cogvideox_inputs(4),
        grid_sites=2,
        grid=GRID,
        expected="text before the grid in one sequence without mask; latents are [B, T, C, H, W]",
    ),
    ZooEntry(
        "ConsisIDTransformer3DModel",
        # Three heads: the face features are two thirds as wide as the transformer.
        lambda: ConsisIDTransformer3DModel(
            num_attention_heads=3,
            in_channels=8,
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=20,
            LFE_vit_dim=16,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=32,
            LFE_num_scale=2,
            **COGVIDEOX,
        ),
        lambda: (
            _cogvideox_inputs(8)
            | {"id_vit_hidden": [_text(16, tokens=10), _text(16, tokens=10)], "id_cond": torch.randn(1, 20)}
        ),
        grid_sites=2,
        grid=GRID,
        expected="CogVideoX plus a face extractor; cross-attention to faces, a list input, is written as two matmuls",
    ),
    ZooEntry(
        "Cosmos3OmniTransformer",
        lambda: Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=64,
            intermediate_size=96,
            latent_channel=4,
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=2,
            patch_latent_dim=16,
            action_dim=8,
            action_gen=True,
            sound_dim=8,
            sound_gen=True,
            vocab_size=32,
            rope_axes_dim=(4, 2, 2),
        ),
        _cosmos3_inputs,
        grid_sites=2,
        grid=GRID,
        expected="grid queries attend to text and grid keys, grouped-query; text has a causal call of its own; "
        "rows are scattered into the sequence by index inputs; latents come in a list",
    ),
    ZooEntry(
        "EasyAnimateTransformer3DModel",
        lambda: EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=12,
            sample_height=8,
            num_layers=4,
            mmdit_layers=2,
            time_embed_dim=16,
            add_norm_text_encoder=True,
            text_embed_dim=32,
        ),
        lambda: {
            "hidden_states": _latents(),
            "timestep": _timestep(),
            "encoder_hidden_states": _text(),
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="text before the grid in one sequence without mask, in two blocks with weights of its own",
    ),
    ZooEntry(
        "HunyuanVideoTransformer3DModel",
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_single_layers=2, pooled_projection_dim=16, **HUNYUAN
        ),
        _hunyuan_inputs,
        grid_sites=4,
        grid=GRID,
        expected="text after the grid; a boolean key mask [B, 1, 1, S] computed from the number of text tokens",
    ),
    ZooEntry(
        "HunyuanVideo15Transformer3DModel",
        lambda: HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, text_embed_2_dim=16, image_embed_dim=16, **HUNYUAN
        ),
        lambda: {
            "hidden_states": _latents(9, patch=1),
            "image_embeds": torch.zeros(1, 5, 16),
            "timestep": _timestep(),
            "attention_kwargs": None,
            "return_dict": False,
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": _mask().float(),
            "encoder_hidden_states_2": _text(16, tokens=4),
            "encoder_attention_mask_2": _mask(4, valid=3).float(),
        },
        grid_sites=2,
        grid=GRID,
        expected="branches in Python on image_embeds being zero and sorts two texts and image tokens by their masks; "
        "they stand after the grid, with a boolean mask of query and key padding [B, 1, S, S]",
    ),
    ZooEntry(
        "HunyuanVideoFramepackTransformer3DModel",
        lambda: HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_single_layers=2,
            pooled_projection_dim=16,
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
            **HUNYUAN,
        ),
        _framepack_inputs,
        grid_sites=4,
        grid=GRID,
        expected="three history grids before the grid, image and text tokens after it; with batch 1 the text is cut to "
        "a length read from its mask",
    ),
    ZooEntry(
        "Kandinsky5Transformer3DModel",
        lambda: Kandinsky5Transformer3DModel(**KANDINSKY),
        lambda: (
            _kandinsky_inputs()
            | {
                "visual_rope_pos": [torch.arange(size) for size in GRID.sizes],
                "text_rope_pos": torch.arange(TEXT),
                "scale_factor": (1, 2, 2),
                "sparse_params": None,
            }
        ),
        grid_sites=2,
        grid=GRID,
        expected="self-attention over the grid alone, cross-attention to text; RoPE rounds through bfloat16; "
        "latents are [B, T, H, W, C]",
    ),
    ZooEntry(
        "Kandinsky6Transformer3DModel",
        lambda: Kandinsky6Transformer3DModel(
            in_audio_dim=6,
            out_audio_dim=6,
            text_token_padding=True,
            ca_rope=True,
            cross_gates=True,
            fix_modulation=True,
            visual_token_type_num_embeddings=2,
            **KANDINSKY,
        ),
        lambda: (
            _kandinsky_inputs()
            | {
                "audio_hidden_states": torch.randn(1, 10, 6),
                "visual_rope_pos": None,
                "encoder_attention_mask": _mask(),
                "visual_token_type_ids": None,
            }
        ),
        grid_sites=2,
        grid=GRID,
        expected="self-attention over the grid alone; audio and text come by cross-attention and have self-attention "
        "of their own; latents are [B, T, H, W, C]",
    ),
    ZooEntry(
        "Kandinsky6SRTransformer3DModel",
        lambda: Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=8,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            nabla_window=(1, 1, 1),
        ),
        lambda: {"hidden_states": torch.randn(1, 3, 8, 16, 9), "timestep": _timestep(), "return_dict": False},
        grid_sites=0,
        expected="sparse already: flex_attention with a block mask computed from queries and keys; 8x8 tiles; "
        "run eagerly, it ignores the blocks",
    ),
    ZooEntry(
        "LTX2VideoTransformer3DModel",
        lambda: LTX2VideoTransformer3DModel(
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            use_prompt_embeddings=False,
            perturbed_attn=True,
            **LTX2,
        ),
        _ltx2_inputs,
        grid_sites=2,
        grid=GRID,
        expected="packed latents; video_coords holds [start, end) of every token in seconds and pixels; audio and text "
        "come by cross-attention",
    ),
    ZooEntry(
        "SanaWMLTX2RefinerTransformer3DModel",
        lambda: SanaWMLTX2RefinerTransformer3DModel(**LTX2),
        _sana_refiner_inputs,
        grid_sites=2,
        grid=GRID,
        hint="3x4x6",
        expected="packed latents and ready RoPE tables; called without the pipeline's cache object, whose earlier "
        "frames would stand before the grid's keys",
    ),
    ZooEntry(
        "MiniMaxH3Transformer3DModel",
        lambda: MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=2,
            ffn_dim=64,
            in_channels=4,
            audio_in_channels=8,
            text_dim=32,
            time_embed_hidden_dim=24,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax_h3_inputs,
        grid_sites=2,
        grid=GRID,
        expected="packed latents; text, audio and video rows are placed in one sequence by index inputs; position_ids "
        "are uneven in time and fractional in space",
    ),
    ZooEntry(
        "MochiTransformer3DModel",
        lambda: MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=32,
            time_embed_dim=16,
            max_sequence_length=TEXT,
        ),
        lambda: {
            "hidden_states": _latents(),
            "encoder_hidden_states": _text(),
            "timestep": _timestep(),
            "encoder_attention_mask": _mask(),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="text after the grid, picked by the nonzero positions of its mask: the length depends on data",
    ),
    ZooEntry(
        "MotifVideoTransformer3DModel",
        lambda: MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=4,
            num_decoder_layers=2,
            text_embed_dim=32,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda: {
            "hidden_states": _latents(9),
            "timestep": _timestep(),
            "attention_kwargs": None,
            "return_dict": False,
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": _mask(),
        },
        grid_sites=6,
        grid=GRID,
        expected="text after the grid, a boolean key mask [B, 1, 1, S]; the last two of the six calls attend over the "
        "grid twice, decoder tokens then encoder tokens, without mask",
    ),
)
