"""Transformers of diffusers for audio, embeddings, molecules and single axes: none has a token grid."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    PriorTransformer,
    RFD4ProteinaTransformer,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
    TransformerTemporalModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import MiniMaxMusic3RVQDepthDecoder
from diffusers.models.transformers.transformer_minimax_music3 import MiniMaxMusic3Transformer1DModel
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS
from torch import Tensor

from tests.zoo.entry import ZooEntry

FRAMES = 24
TEXT = 8
VALID_TEXT = 6
RESIDUES = 12


def _text(dim: int = 32, tokens: int = TEXT) -> Tensor:
    return torch.randn(1, tokens, dim)


def _mask(dtype: torch.dtype = torch.bool, tokens: int = TEXT, valid: int = VALID_TEXT) -> Tensor:
    return (torch.arange(tokens) < valid)[None].to(dtype)


def _timestep(value: float = 0.5) -> Tensor:
    return torch.tensor([value])


def _rfd4_inputs() -> dict[str, Any]:
    per_residue = (1, RESIDUES)
    per_atom = (1, RESIDUES, 37)
    padding = _mask(tokens=RESIDUES, valid=RESIDUES - 2)
    chain = (torch.arange(RESIDUES) * 2 // RESIDUES)[None]
    positions = torch.arange(RESIDUES)
    neighbours = ((positions[:, None] - positions).abs() == 1)[None]
    conditioning = {
        CONDITION_KEYS[name]: torch.zeros(per_atom, dtype=torch.int64)
        for name in ("rasa", "hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord", "hotspot")
    }
    conditioning |= {
        CONDITION_KEYS["sequence"]: torch.zeros(per_residue, dtype=torch.int64),
        CONDITION_KEYS["secondary_structure"]: torch.randint(0, 4, per_residue),
        CONDITION_KEYS["index_group"]: chain,
        "molecule_iid": chain,
        "molecule_entity_id": chain,
        "bond_mask": neighbours,
        "token_bond_path_length": (positions[:, None] - positions).abs()[None],
        "is_in_context_conditioning": torch.zeros(per_residue, dtype=torch.bool),
        "supports_local_latent": torch.ones(per_residue, dtype=torch.bool),
    }
    return {
        "bb_ca": torch.randn(1, RESIDUES, 3),
        "local_latents": torch.randn(1, RESIDUES, 8),
        "bb_ca_time": _timestep(0.4),
        "local_latents_time": _timestep(0.3),
        "padding_mask": padding,
        "token_type": torch.zeros(per_residue, dtype=torch.int64),
        "atom37_mask": torch.ones(per_atom, dtype=torch.bool),
        "conditioning": conditioning,
        "recycle_depth": 2,
        "attention_kwargs": None,
        "return_dict": False,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        name="AceStepTransformer1DModel",
        build=lambda: AceStepTransformer1DModel(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=4,
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 2 * FRAMES, 8),
            "timestep": _timestep(),
            "timestep_r": _timestep(),
            "encoder_hidden_states": _text(),
            "context_latents": torch.randn(1, 2 * FRAMES, 16),
            "attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=0,
        expected="One full and one banded grouped-query attention over a single audio axis.",
    ),
    ZooEntry(
        name="LongCatAudioDiTTransformer",
        build=lambda: LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=24, latent_dim=8),
        inputs=lambda: {
            "hidden_states": torch.randn(1, FRAMES, 8),
            "encoder_hidden_states": _text(24),
            "encoder_attention_mask": _mask(),
            "timestep": _timestep(),
            "attention_mask": torch.ones(1, FRAMES, dtype=torch.bool),
            "latent_cond": torch.zeros(1, FRAMES, 8),
            "return_dict": False,
        },
        grid_sites=0,
        expected="Two full attentions over a single audio axis under a key mask.",
    ),
    ZooEntry(
        name="MiniMaxMusic3RVQDepthDecoder",
        build=lambda: MiniMaxMusic3RVQDepthDecoder(
            hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=64, audio_vocab_size=16
        ),
        inputs=lambda: {"inputs_embeds": torch.randn(1, 8, 32)},
        grid_sites=0,
        expected="An autoregressive decoder: its attention over the codebooks of one frame is causal.",
    ),
    ZooEntry(
        name="MiniMaxMusic3Transformer1DModel",
        build=lambda: MiniMaxMusic3Transformer1DModel(
            in_channels=8,
            condition_dim=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=64,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 8, FRAMES),
            "timestep": _timestep(),
            "encoder_hidden_states": _text(16, FRAMES),
            "return_dict": False,
        },
        grid_sites=0,
        expected="Two full attentions over a time token and a single audio axis.",
    ),
    ZooEntry(
        name="PriorTransformer",
        build=lambda: PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=24, num_embeddings=TEXT
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 24),
            "timestep": torch.tensor(500),
            "proj_embedding": torch.randn(1, 24),
            "encoder_hidden_states": _text(24),
            "attention_mask": _mask(),
            "return_dict": False,
        },
        grid_sites=0,
        expected="It denoises one embedding: text and four single tokens attend causally.",
    ),
    ZooEntry(
        name="RFD4ProteinaTransformer",
        build=lambda: RFD4ProteinaTransformer(
            nlayers=2,
            token_dim=32,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=16,
            latent_dim=8,
            token_type_emb_dim=8,
            cath_emb_dim=8,
            t_emb_dim=16,
            seq_sep_dim=16,
            tri_mult_c=16,
        ),
        inputs=_rfd4_inputs,
        grid_sites=0,
        expected="Tokens are residues and atoms; every attention adds a learned bias for each pair of them.",
    ),
    ZooEntry(
        name="StableAudio3DiTModel",
        build=lambda: StableAudio3DiTModel(
            io_channels=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            cond_token_dim=24,
            global_cond_dim=24,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            num_memory_tokens=4,
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 8, FRAMES),
            "timestep": _timestep(),
            "encoder_hidden_states": _text(24),
            "global_hidden_states": torch.randn(1, 24),
            "encoder_attention_mask": _mask(torch.int64),
            "return_dict": False,
        },
        grid_sites=0,
        expected="Each layer subtracts two full attentions over memory tokens and a single audio axis.",
    ),
    ZooEntry(
        name="StableAudioDiTModel",
        build=lambda: StableAudioDiTModel(
            sample_size=FRAMES,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=8,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(1, 8, FRAMES),
            "timestep": _timestep(),
            "encoder_hidden_states": _text(16, TEXT + 2),
            "global_hidden_states": _text(32, 1),
            "rotary_embedding": get_1d_rotary_pos_embed(8, FRAMES + 1, use_real=True, repeat_interleave_real=False),
            "return_dict": False,
        },
        grid_sites=0,
        expected="Two full attentions over a global token and a single audio axis.",
    ),
    ZooEntry(
        name="T5FilmDecoder",
        build=lambda: T5FilmDecoder(
            input_dims=8, targets_length=FRAMES, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64
        ),
        inputs=lambda: {
            "encodings_and_masks": [
                (_text(), _mask()),
                (_text(tokens=FRAMES), torch.ones(1, FRAMES, dtype=torch.bool)),
            ],
            "decoder_input_tokens": torch.randn(1, FRAMES, 8),
            "decoder_noise_time": _timestep(),
        },
        grid_sites=0,
        expected="Two full attentions over the time axis of a spectrogram, spelled as baddbmm and softmax.",
    ),
    ZooEntry(
        name="TransformerTemporalModel",
        build=lambda: TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, norm_num_groups=8
        ),
        inputs=lambda: {
            "hidden_states": torch.randn(3, 32, 4, 6),
            "num_frames": 3,
            "cross_attention_kwargs": None,
            "return_dict": False,
        },
        grid_sites=0,
        expected="Frames lie in the batch axis, and every pixel attends over frames alone, twice in each block.",
    ),
)
