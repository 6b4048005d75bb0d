"""Wan 14B at 4K through every command, from a sharded checkpoint larger than memory: wall time and peak memory of each.

Run by `make bench-14b` or `python -m tests.bench_14b [--layers 40] [--folder DIR]`; not one of the tests. The
checkpoint holds random numbers and is written streaming; whatever was written is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Source: Hugging Face Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json.
WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
# Token grid (21, 136, 240): five seconds at 4K.
SIZE = ["--frames", "81", "--height", "2176", "--width", "3840", "--text-tokens", "512"]
SHARD_BYTES = 5 * 2**30
STEM = "diffusion_pytorch_model"


def write_checkpoint(folder: Path, config: Mapping[str, object], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a diffusers folder with bfloat16 weights of random numbers, in shards; returns the bytes of the weights.

    No more than one block of random numbers is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    shards = _split(_shapes(config), shard_bytes)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**26, generator=generator) * 0.02).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, start=1):
        name = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        total += _write_shard(folder / name, shapes, block, number)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shapes(config: Mapping[str, object]) -> dict[str, torch.Size]:
    import diffusers

    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel.from_config(dict(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _split(shapes: Mapping[str, torch.Size], shard_bytes: int) -> list[dict[str, torch.Size]]:
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * shape.numel()
    return shards


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], block: Tensor, seed: int) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = memoryview(block.view(torch.uint8).numpy())
    at = 2 * 1009 * seed  # no two tensors are alike
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = 2 * shape.numel()
            while left:
                part = data[at : at + left]
                file.write(part)
                left -= len(part)
                at = (at + len(part) + 2 * 1009) % len(data)
    return end
