"""Wan's relatives in diffusers: self-attention of every variant is found, rewritten and proven, none by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import t3compile

diffusers = pytest.importorskip("diffusers")

CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
GRID = t3compile.TokenGrid(3, 4, 5)


def video(channels: int) -> torch.Tensor:
    return torch.randn(1, channels, GRID.t, 2 * GRID.h, 2 * GRID.w)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_states": video(4),
        "timestep": torch.tensor([7.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
        **changes,
    }


IMAGE = {"encoder_hidden_states_image": torch.randn(1, 257, 8)}
IMAGE_CONFIG = {"image_dim": 8, "added_kv_proj_dim": 48}
VARIANTS = {
    "text to video": ("WanTransformer3DModel", {}, {}),
    "a timestep per token": ("WanTransformer3DModel", {}, {"timestep": torch.full((1, GRID.tokens), 7.0)}),
    "image to video": (
        "WanTransformer3DModel",
        {**IMAGE_CONFIG, "in_channels": 8},
        {"hidden_states": video(8), **IMAGE},
    ),
    "control branch": (
        "WanVACETransformer3DModel",
        {"vace_layers": [0, 2], "vace_in_channels": 6},
        {"control_hidden_states": video(6)},
    ),
    "SkyReels": ("SkyReelsV2Transformer3DModel", {}, {}),
    "ChronoEdit": ("ChronoEditTransformer3DModel", IMAGE_CONFIG, IMAGE),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_found_rewritten_and_proven(name: str) -> None:
    class_name, config, changes = VARIANTS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name).from_config({**CONFIG, **config}).eval()
    program = t3compile.trace(model, kwargs=inputs(**changes))
    survey = t3compile.detect(program)
    stacks: dict[str, list[int]] = {}
    for site in survey.found:
        assert site.grid == GRID
        stacks.setdefault(site.stack, []).append(site.index)
    expected = {"blocks.*.attn1": [0, 1, 2]}
    if name == "control branch":
        expected["vace_blocks.*.attn1"] = [0, 1]
    assert stacks == expected
    assert {call.reason for call in survey.declined} == {"cross-attention"}
    plan = t3compile.make_plan(survey, [(3, 1, 1), (1, 2, 2)])
    rewritten = t3compile.rewrite(program, plan)
    assert t3compile.verify(program, rewritten, plan).passed
