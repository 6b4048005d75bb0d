"""Image transformers of diffusers outside the Flux, SD3 and Qwen families."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    ErnieImageTransformer2DModel,
    HunyuanDiT2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    NucleusMoEImageTransformer2DModel,
    OmniGenTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    SanaTransformer2DModel,
    Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from torch import Tensor, nn

from t3compile.geometry import TokenGrid
from tests.zoo.entry import ZooEntry

GRID = TokenGrid(1, 4, 6)
TEXT = 8
VALID_TEXT = 6


def _latents(channels: int = 4, patch: int = 2) -> Tensor:
    return torch.randn(1, channels, GRID.h * patch, GRID.w * patch)


def _text(dim: int = 32, tokens: int = TEXT) -> Tensor:
    return torch.randn(1, tokens, dim)


def _mask(dtype: torch.dtype = torch.int64) -> Tensor:
    return (torch.arange(TEXT) < VALID_TEXT)[None].to(dtype)


def _timestep(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def _grid_positions() -> Tensor:
    """The (t, h, w) indices of every grid token: [H*W, 3]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in GRID.sizes))


UNET_BLOCK: dict[str, Any] = {"in_channels": 32, "num_layers": 2, "norm_num_groups": 8, "cross_attention_dim": 32}


def _unet_block_inputs(text: int = TEXT) -> dict[str, Any]:
    return {
        "hidden_states": _latents(32, patch=1),
        "encoder_hidden_states": _text(tokens=text),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def _dreamlite() -> nn.Module:
    model = DreamLiteTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_kv_heads=1, qk_norm="rms_norm", ff_mult=6, **UNET_BLOCK
    )
    # The U-Net around it installs this processor; the default one cannot group heads.
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())
    return model


def _dual() -> nn.Module:
    model = DualTransformer2DModel(num_attention_heads=2, attention_head_dim=16, **UNET_BLOCK)
    model.condition_lengths = [TEXT, 10]
    return model


def _hunyuan_dit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(),
        "timestep": _timestep(),
        "encoder_hidden_states": _text(),
        "text_embedding_mask": _mask(),
        "encoder_hidden_states_t5": _text(),
        "text_embedding_mask_t5": _mask(),
        "image_meta_size": torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (GRID.h, GRID.w)), (GRID.h, GRID.w), output_type="pt"),
        "return_dict": False,
    }


def _ideogram4_inputs() -> dict[str, Any]:
    padding, first = TEXT - VALID_TEXT, TEXT
    tokens = TEXT + GRID.tokens
    latents = torch.cat([torch.zeros(1, TEXT, 16), torch.randn(1, GRID.tokens, 16)], dim=1)
    text = torch.zeros(1, tokens, 32)
    text[:, padding:first] = torch.randn(VALID_TEXT, 32)
    positions = torch.zeros(1, tokens, 3, dtype=torch.int64)
    positions[:, padding:first] = torch.arange(VALID_TEXT)[:, None]
    positions[:, first:] = _grid_positions() + IMAGE_POSITION_OFFSET
    segments = torch.ones(1, tokens, dtype=torch.int64)
    segments[:, :padding] = SEQUENCE_PADDING_INDICATOR
    indicator = torch.zeros(1, tokens, dtype=torch.int64)
    indicator[:, padding:first] = LLM_TOKEN_INDICATOR
    indicator[:, first:] = OUTPUT_IMAGE_INDICATOR
    return {
        "hidden_states": latents,
        "timestep": _timestep(0.5),
        "encoder_hidden_states": text,
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
        "attention_kwargs": None,
        "return_dict": False,
    }


JOYIMAGE: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 32,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
REFERENCE = (1, 3, 5)


def _joyimage_plus_inputs() -> dict[str, Any]:
    patches = GRID.tokens + TokenGrid(*REFERENCE).tokens
    return {
        "hidden_states": torch.randn(1, patches, 4, 1, 2, 2),
        "timestep": _timestep(),
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": _mask(),
        "shape_list": [[GRID.sizes, REFERENCE]],
        "return_dict": False,
    }


def _krea2_inputs() -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    mask[:, 4:6] = False  # the prompt is padded before its suffix is appended
    return {
        "hidden_states": torch.randn(1, GRID.tokens, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 3, 16),
        "timestep": _timestep(0.5),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _grid_positions().float()]),
        "encoder_attention_mask": mask,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _nucleus() -> nn.Module:
    model = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # allocated without values
            nn.init.normal_(parameter, std=0.1)
    return model


def _omnigen_inputs() -> dict[str, Any]:
    padding, tokens = TEXT - VALID_TEXT, TEXT + 1 + GRID.tokens
    image = TEXT + 1
    mask = torch.ones(tokens, tokens)
    mask[:image, :image].tril_()
    mask[:image, image:] = 0
    mask[:, :padding] = 0
    mask[:padding] = 1
    positions = (torch.arange(tokens) - padding).clamp(min=0)
    return {
        "hidden_states": _latents(),
        "timestep": _timestep(0.5),
        "input_ids": torch.randint(1, 100, (1, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask[None],
        "position_ids": positions[None],
        "return_dict": False,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        name="DiTTransformer2DModel",
        build=lambda: DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "timestep": torch.tensor([500]),
            "class_labels": torch.tensor([7]),
            "return_dict": False,
        },
        grid_sites=2,
        grid=TokenGrid(1, 4, 4),
        expected="The model takes the square root of the token count for height and width, so grids are square.",
    ),
    ZooEntry(
        name="DreamLiteTransformer2DModel",
        build=_dreamlite,
        inputs=_unet_block_inputs,
        grid_sites=2,
        grid=GRID,
        expected="One key-value head is repeated for all query heads before the attention.",
    ),
    ZooEntry(
        name="DualTransformer2DModel",
        build=_dual,
        inputs=lambda: _unet_block_inputs(TEXT + 10),
        grid_sites=4,
        grid=GRID,
        expected="Two stacks of two blocks read the same latents and are averaged.",
    ),
    ZooEntry(
        name="ErnieImageTransformer2DModel",
        build=lambda: ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=8,
            out_channels=8,
            text_in_dim=24,
            rope_axes_dim=(4, 6, 6),
        ),
        inputs=lambda: {
            "hidden_states": _latents(8, patch=1),
            "timestep": _timestep(),
            "text_bth": _text(24),
            "text_lens": torch.tensor([VALID_TEXT]),
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="Text follows the grid under a key mask made of text_lens; the sequence precedes the batch axis.",
    ),
    ZooEntry(
        name="HunyuanDiT2DModel",
        build=lambda: HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=32,
            num_layers=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        inputs=_hunyuan_dit_inputs,
        grid_sites=4,
        grid=GRID,
        expected="Four layers are the fewest with a long skip connection; masks only choose the text embeddings.",
    ),
    ZooEntry(
        name="Ideogram4Transformer2DModel",
        build=lambda: Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=32,
            mrope_section=(4, 2, 2),
        ),
        inputs=_ideogram4_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Text (padded on the left) precedes the grid in one packed input; equal segment_ids make the mask.",
    ),
    ZooEntry(
        name="JoyImageEditTransformer3DModel",
        build=lambda: JoyImageEditTransformer3DModel(**JOYIMAGE),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 2, 4, 1, GRID.h * 2, GRID.w * 2),
            "timestep": _timestep(),
            "encoder_hidden_states": _text(),
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="The last item of axis 1 is the image, moved before the reference image; text follows both.",
    ),
    ZooEntry(
        name="JoyImageEditPlusTransformer3DModel",
        build=lambda: JoyImageEditPlusTransformer3DModel(**JOYIMAGE),
        inputs=_joyimage_plus_inputs,
        grid_sites=2,
        grid=GRID,
        hint="1x4x6",
        expected="A packed reference image of another size and text follow the grid under one key mask.",
    ),
    ZooEntry(
        name="Krea2Transformer2DModel",
        build=lambda: Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=_krea2_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Text precedes the packed grid under a key mask; key-value heads are repeated before the attention.",
    ),
    ZooEntry(
        name="Lumina2Transformer2DModel",
        build=lambda: Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 16, 16),
            cap_feat_dim=32,
        ),
        inputs=lambda: {
            "hidden_states": _latents(),
            "timestep": _timestep(0.5),
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": _mask(),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Two noise refiners see the grid alone; Python reads the mask to drop padded text before the grid.",
    ),
    ZooEntry(
        name="LuminaNextDiT2DModel",
        build=lambda: LuminaNextDiT2DModel(
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=32,
        ),
        inputs=lambda: {
            "hidden_states": _latents(),
            "timestep": _timestep(0.5),
            "encoder_hidden_states": _text(),
            "encoder_mask": _mask(),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
            "cross_attention_kwargs": {"base_sequence_length": 4096},
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="Self-attention has a mask of ones over the grid, repeated key-value heads and a scale of its own.",
    ),
    ZooEntry(
        name="NucleusMoEImageTransformer2DModel",
        build=_nucleus,
        inputs=lambda: {
            "hidden_states": torch.randn(1, GRID.tokens, 16),
            "timestep": _timestep(0.5),
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_mask": _mask(),
            "img_shapes": [GRID.sizes],
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        hint="1x4x6",
        expected="Only grid tokens ask; keys are grid then text under a key mask; Python reads the counts of experts.",
    ),
    ZooEntry(
        name="OmniGenTransformer2DModel",
        build=lambda: OmniGenTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            num_layers=2,
            pad_token_id=0,
            vocab_size=100,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0 + step for step in range(8)]},
            pos_embed_max_size=16,
            time_step_dim=32,
        ),
        inputs=_omnigen_inputs,
        grid_sites=2,
        grid=GRID,
        expected="Text and a time token precede the grid; the mask input is causal for text; Python reads positions.",
    ),
    ZooEntry(
        name="PRXTransformer2DModel",
        build=lambda: PRXTransformer2DModel(
            in_channels=4, context_in_dim=32, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
        ),
        inputs=lambda: {
            "hidden_states": _latents(),
            "timestep": _timestep(0.5),
            "encoder_hidden_states": _text(),
            "attention_mask": _mask(torch.bool),
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
        expected="Only grid tokens ask; keys are text then grid under a key mask.",
    ),
    ZooEntry(
        name="PixArtTransformer2DModel",
        build=lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=32,
        ),
        inputs=lambda: {
            "hidden_states": _latents(),
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": _mask(),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {"resolution": torch.tensor([[64.0, 96.0]]), "aspect_ratio": torch.tensor([[0.67]])},
            "return_dict": False,
        },
        grid_sites=2,
        grid=GRID,
    ),
    ZooEntry(
        name="SanaTransformer2DModel",
        build=lambda: SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        inputs=lambda: {
            "hidden_states": _latents(8, patch=1),
            "encoder_hidden_states": _text(),
            "encoder_attention_mask": _mask(),
            "timestep": _timestep(),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=0,
        expected="Self-attention over the grid is linear: two matrix products without a softmax.",
    ),
    ZooEntry(
        name="Transformer2DModel",
        build=lambda: Transformer2DModel(num_attention_heads=2, attention_head_dim=16, **UNET_BLOCK),
        inputs=_unet_block_inputs,
        grid_sites=2,
        grid=GRID,
        expected="A block of a U-Net, called as the U-Net calls it.",
    ),
    ZooEntry(
        name="ZImageTransformer2DModel",
        build=lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        ),
        inputs=lambda: {
            "x": [torch.randn(4, 1, GRID.h * 2, GRID.w * 2)],
            "t": _timestep(0.5),
            "cap_feats": [torch.randn(TEXT, 32)],
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=4,
        grid=GRID,
        expected="Lists of unbatched images and texts; grid and text are each padded to 32 tokens that stay visible.",
    ),
)
