"""Image transformers whose text and image tokens share one attention: a tiny model of each class of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers
from torch import Tensor

from t3compile.geometry import TokenGrid
from tests.zoo.entry import ZooEntry

HEIGHT, WIDTH, TEXT = 4, 6, 8
TOKENS = HEIGHT * WIDTH
GRID = TokenGrid(1, HEIGHT, WIDTH)
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TWO_STACKS = {**HEADS, "num_layers": 2, "num_single_layers": 2}
ROPE = (4, 6, 6)


def _latents(channels: int, patch: int = 2) -> Tensor:
    return torch.randn(1, channels, HEIGHT * patch, WIDTH * patch)


def _packed(channels: int) -> Tensor:
    return torch.randn(1, TOKENS, channels)


def _text(channels: int, length: int = TEXT) -> Tensor:
    return torch.randn(1, length, channels)


def _mask(length: int = TEXT, padding: int = 2) -> Tensor:
    return torch.tensor([[1] * (length - padding) + [0] * padding])


def _image_ids(first: float = 0.0, start: int = 0) -> Tensor:
    """(plane, row, column) of every token."""
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(HEIGHT), torch.arange(WIDTH)).float()
    return ids + torch.tensor([first, start, start])


def _counted_text_ids() -> Tensor:
    count = torch.arange(TEXT).float()
    return torch.stack([torch.zeros(TEXT), count, count], dim=-1)


def _four_axis_ids(height: int, width: int, length: int) -> Tensor:
    """(time, row, column, text position), counted in int64."""
    return torch.cartesian_prod(*(torch.arange(n) for n in (1, height, width, length)))


def _aura_flow() -> ZooEntry:
    return ZooEntry(
        name="AuraFlowTransformer2DModel",
        build=lambda: transformers.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            **HEADS,
            joint_attention_dim=16,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "encoder_hidden_states": _text(16),
            "timestep": torch.tensor([0.5]),
            "return_dict": False,
            "attention_kwargs": None,
        },
        grid_sites=4,
        grid=GRID,
        expected="Eight learned register tokens and then the text stand before the grid.",
    )


def _bria() -> ZooEntry:
    return ZooEntry(
        name="BriaTransformer2DModel",
        build=lambda: transformers.BriaTransformer2DModel(
            in_channels=16, **TWO_STACKS, joint_attention_dim=16, axes_dims_rope=list(ROPE)
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": _text(16),
            "attention_kwargs": None,
            "return_dict": False,
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": _image_ids(),
        },
        grid_sites=4,
        grid=GRID,
        expected="Latents come packed and only img_ids tells the grid; the text stands before it.",
    )


def _bria_fibo() -> ZooEntry:
    def inputs() -> dict[str, Any]:
        mask = torch.cat([_mask(), torch.ones(1, TOKENS, dtype=torch.int64)], dim=1).bool()
        return {
            "hidden_states": _packed(8),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": _text(32),
            "text_encoder_layers": [_text(16) for _ in range(4)],
            "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
            "return_dict": False,
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": _image_ids(),
        }

    return ZooEntry(
        name="BriaFiboTransformer2DModel",
        build=lambda: transformers.BriaFiboTransformer2DModel(
            in_channels=8, **TWO_STACKS, joint_attention_dim=32, text_encoder_dim=16, axes_dims_rope=list(ROPE)
        ),
        inputs=inputs,
        grid_sites=4,
        grid=GRID,
        expected="A bool key mask [1, 1, 1, text + grid] comes as an input inside a dict and hides padded text only; "
        "every block takes its own text layer from a list of tensors.",
    )


def _bria_fibo2() -> ZooEntry:
    return ZooEntry(
        name="BriaFibo2Transformer2DModel",
        build=lambda: transformers.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1, 3),
            perceiver_num_layers=2,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=ROPE,
            axes_lens=(32, 16, 16),
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, 3, TEXT, 16),
            "encoder_attention_mask": None,
            "context_latents": None,
            "return_dict": False,
        },
        grid_sites=6,
        grid=GRID,
        expected="The two refiner blocks see the grid alone, the four others see resampled text before it; two blocks "
        "and the resampler cross-attend to the text as well, whose second axis is a stack of encoder layers; rotary "
        "tables are kept in Python on the first call, so a model exported before any real call is spoilt.",
    )


def _chroma() -> ZooEntry:
    return ZooEntry(
        name="ChromaTransformer2DModel",
        build=lambda: transformers.ChromaTransformer2DModel(
            in_channels=16,
            **TWO_STACKS,
            joint_attention_dim=16,
            axes_dims_rope=ROPE,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": _text(16),
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": _image_ids(),
            "attention_mask": torch.cat([_mask().float(), torch.ones(1, TOKENS)], dim=1),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="The padding mask's outer product, 0.0 or 1.0 over all query and key pairs, is added to the scores: "
        "one for every pair of grid tokens, zero where either token is padded text.",
    )


def _cogview3_plus() -> ZooEntry:
    return ZooEntry(
        name="CogView3PlusTransformer2DModel",
        build=lambda: transformers.CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=2,
            **HEADS,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "encoder_hidden_states": _text(16),
            "timestep": torch.tensor([500]),
            "original_size": torch.tensor([[64.0, 96.0]]),
            "target_size": torch.tensor([[64.0, 96.0]]),
            "crop_coords": torch.zeros(1, 2),
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
    )


def _cogview4() -> ZooEntry:
    return ZooEntry(
        name="CogView4Transformer2DModel",
        build=lambda: transformers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            **HEADS,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            rope_axes_dim=(16, 16),
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "encoder_hidden_states": _text(16),
            "timestep": torch.tensor([500.0]),
            "original_size": torch.tensor([[64.0, 96.0]]),
            "target_size": torch.tensor([[64.0, 96.0]]),
            "crop_coords": torch.zeros(1, 2),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="Rotary embedding is written into a slice of the joint queries and keys in place; no mask, although "
        "the text is padded.",
    )


def _flux() -> ZooEntry:
    return ZooEntry(
        name="FluxTransformer2DModel",
        build=lambda: transformers.FluxTransformer2DModel(
            in_channels=16,
            **TWO_STACKS,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=ROPE,
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "pooled_projections": torch.randn(1, 16),
            "encoder_hidden_states": _text(16),
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": _image_ids(),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Latents come packed and only img_ids tells the grid; the text stands before it.",
    )


def _flux2() -> ZooEntry:
    return ZooEntry(
        name="Flux2Transformer2DModel",
        build=lambda: transformers.Flux2Transformer2DModel(
            in_channels=16,
            **TWO_STACKS,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([4.0]),
            "encoder_hidden_states": _text(16),
            "txt_ids": _four_axis_ids(1, 1, TEXT)[None],
            "img_ids": _four_axis_ids(HEIGHT, WIDTH, 1)[None],
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Latents come packed; img_ids counts (time, row, column, text position) in int64 with a batch axis.",
    )


def _flux3() -> ZooEntry:
    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "return_dict": False,
            "img_ids": _four_axis_ids(HEIGHT, WIDTH, 1) * torch.tensor([1, 0.5, 0.5, 1]),
            "encoder_hidden_states": _text(16),
            "txt_ids": _four_axis_ids(1, 1, TEXT).float(),
        }

    return ZooEntry(
        name="Flux3Transformer2DModel",
        build=lambda: transformers.Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            **TWO_STACKS,
            joint_attention_dim=16,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        inputs=inputs,
        grid_sites=4,
        grid=GRID,
        expected="Two blocks see the grid alone and two see text and grid (two more, not counted, see text alone); "
        "rows and columns in img_ids are half-integer steps, scaled by 0.5.",
    )


def _glm_image() -> ZooEntry:
    return ZooEntry(
        name="GlmImageTransformer2DModel",
        build=lambda: transformers.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            **HEADS,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "encoder_hidden_states": _text(16),
            "prior_token_id": torch.randint(0, 64, (1, TOKENS)),
            "prior_token_drop": torch.zeros(1, TOKENS, dtype=torch.bool),
            "timestep": torch.tensor([499.0]),
            "target_size": torch.tensor([[64.0, 96.0]]),
            "crop_coords": torch.zeros(1, 2),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="A row of prior tokens, one per grid token, is embedded and added, some dropped by a bool index; the "
        "pipeline's key-value cache object, idle without condition images, is left out.",
    )


def _hidream_image() -> ZooEntry:
    return ZooEntry(
        name="HiDreamImageTransformer2DModel",
        build=lambda: transformers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            **TWO_STACKS,
            caption_channels=[16, 16],
            text_emb_dim=16,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 2, 3],
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "timesteps": torch.tensor([500.0]),
            "encoder_hidden_states_t5": _text(16),
            "encoder_hidden_states_llama3": torch.randn(4, 1, TEXT, 16),
            "pooled_embeds": torch.randn(1, 16),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="An image that is not square is padded with zero tokens to the largest resolution (here 64 tokens), "
        "the padded keys zeroed rather than masked, text behind; axis 0 of the second text is its layers; the experts "
        "are chosen in Python from the routing of every token.",
    )


def _hunyuan_image() -> ZooEntry:
    return ZooEntry(
        name="HunyuanImageTransformer2DModel",
        build=lambda: transformers.HunyuanImageTransformer2DModel(
            in_channels=8,
            out_channels=8,
            **TWO_STACKS,
            num_refiner_layers=2,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(8, 8),
        ),
        inputs=lambda: {
            "hidden_states": _latents(8, patch=1),
            "timestep": torch.tensor([500.0]),
            "timestep_r": None,
            "guidance": None,
            "attention_kwargs": {},
            "return_dict": False,
            "encoder_hidden_states": _text(16),
            "encoder_attention_mask": _mask(),
            "encoder_hidden_states_2": _text(16, 4),
            "encoder_attention_mask_2": _mask(4, 1),
        },
        grid_sites=4,
        grid=GRID,
        expected="The grid stands before two texts, whose valid tokens are moved to the front by bool indices, with a "
        "bool key mask [1, 1, 1, grid + text] made of their masks.",
    )


def _longcat_image() -> ZooEntry:
    return ZooEntry(
        name="LongCatImageTransformer2DModel",
        build=lambda: transformers.LongCatImageTransformer2DModel(
            in_channels=16, **TWO_STACKS, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=list(ROPE)
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "guidance": None,
            "encoder_hidden_states": _text(16),
            "txt_ids": _counted_text_ids(),
            "img_ids": _image_ids(first=1.0, start=512),
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Latents come packed; rows and columns in img_ids start at 512, the text's ids count on a diagonal.",
    )


def _ovis_image() -> ZooEntry:
    return ZooEntry(
        name="OvisImageTransformer2DModel",
        build=lambda: transformers.OvisImageTransformer2DModel(
            in_channels=16, out_channels=16, **TWO_STACKS, joint_attention_dim=16, axes_dims_rope=ROPE
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": _text(16),
            "txt_ids": _counted_text_ids(),
            "img_ids": _image_ids(),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Latents come packed and only img_ids tells the grid; the text's ids count on a diagonal.",
    )


def _qwen_image() -> ZooEntry:
    return ZooEntry(
        name="QwenImageTransformer2DModel",
        build=lambda: transformers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, **HEADS, joint_attention_dim=16, axes_dims_rope=ROPE
        ),
        inputs=lambda: {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "guidance": None,
            "encoder_hidden_states_mask": None,
            "encoder_hidden_states": _text(16),
            "img_shapes": [[(1, HEIGHT, WIDTH)]],
            "attention_kwargs": {},
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        hint=f"1x{HEIGHT}x{WIDTH}",
        expected="Latents come packed and the sizes as Python ints; the pipeline drops the text mask when, as for one "
        "prompt, nothing is padded.",
    )


def _qwen_image21() -> ZooEntry:
    def inputs() -> dict[str, Any]:
        slots = torch.cat([torch.zeros(1, TEXT, dtype=torch.bool), torch.ones(1, TOKENS // 4, dtype=torch.bool)], dim=1)
        return {
            "hidden_states": _packed(16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": _text(16),
            "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, HEIGHT, WIDTH)]],
            "img_mask": slots,
            "attention_kwargs": {},
            "kv_cache": None,
            "kv_cache_mode": None,
            "return_dict": False,
        }

    return ZooEntry(
        name="QwenImage21Transformer2DModel",
        build=lambda: transformers.QwenImage21Transformer2DModel(
            in_channels=16, out_channels=16, num_layers=2, **HEADS, context_in_dim=16, axes_dims_rope=ROPE
        ),
        inputs=inputs,
        grid_sites=2,
        grid=GRID,
        hint=f"1x{HEIGHT}x{WIDTH}",
        expected="Per block one call whose queries are the grid and whose keys are text and grid, and one causal call "
        "over the text; where image tokens stand is read from a bool mask in Python; as with use_kv_cache=False.",
    )


def _sd3() -> ZooEntry:
    return ZooEntry(
        name="SD3Transformer2DModel",
        build=lambda: transformers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            **HEADS,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        inputs=lambda: {
            "hidden_states": _latents(4),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": _text(16),
            "pooled_projections": torch.randn(1, 16),
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=3,
        grid=GRID,
        expected="The grid stands before the text; the first block has a second attention over the grid alone.",
    )


ENTRIES: tuple[ZooEntry, ...] = (
    _aura_flow(),
    _bria(),
    _bria_fibo(),
    _bria_fibo2(),
    _chroma(),
    _cogview3_plus(),
    _cogview4(),
    _flux(),
    _flux2(),
    _flux3(),
    _glm_image(),
    _hidream_image(),
    _hunyuan_image(),
    _longcat_image(),
    _ovis_image(),
    _qwen_image(),
    _qwen_image21(),
    _sd3(),
)
