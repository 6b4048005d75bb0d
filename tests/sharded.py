"""A small Wan as a diffusers folder with its weights in several safetensors files, for tests of where weights are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from t3compile.inputs import VideoSize

# Grid 2x4x4 with Wan's VAE factors.
SIZE = VideoSize(frames=5, height=64, width=64, text_tokens=5)
STEM = "diffusion_pytorch_model"


def write_folder(folder: Path, model: nn.Module, *, shards: int = 3, dtype: torch.dtype | None = None) -> Path:
    """Write the model as save_pretrained does, tensors dealt over the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}  # type: ignore[call-overload]
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": type(model).__name__}))
    state = {name: x.to(dtype or x.dtype).contiguous() for name, x in model.state_dict().items()}
    write_shards(folder, state, shards)
    return folder


def write_shards(folder: Path, state: Mapping[str, Tensor], shards: int) -> None:
    weight_map: dict[str, str] = {}
    for number in range(shards):
        names = list(state)[number::shards]
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def shard(folder: Path, number: int = 1) -> Path:
    """One of the files of weights."""
    return sorted(folder.glob("*.safetensors"))[number - 1]
