"""Sizes as they are typed: 480p:25, 25x480x832, and the schedules of presets at other grids than their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from t3compile.errors import GridError, InputsError
from t3compile.geometry import Splits, TokenGrid
from t3compile.pattern import Schedule
from t3compile.presets import Preset

# Heights and widths that the patches of common video models divide.
NAMED_SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1088, 1920), "4k": (2176, 3840)}
DEFAULT_FRAMES = 81
Keep = Literal["windows", "splits"]
# Both presets were trained on 2176x3840 pixels in 81 frames; their VAEs make one latent frame of four.
_PRESET_HEIGHT, _VAE_FRAMES = 2176, 4


@dataclass(frozen=True)
class PixelSize:
    """A video in pixels and how the user wrote it."""

    text: str
    frames: int
    height: int
    width: int


def parse_sizes(text: str) -> tuple[PixelSize, ...]:
    """Sizes joined by commas: NAME[:FRAMES] (480p, 720p, 1080p, 4k; 81 frames unless given) or FRAMESxHEIGHTxWIDTH.

    InputsError for anything else, and for a size that is named twice.
    """
    sizes = tuple(_parse_size(part.strip()) for part in text.split(","))
    for i, size in enumerate(sizes):
        if any(replace(size, text="") == replace(other, text="") for other in sizes[:i]):
            raise InputsError(f"--sizes '{text}' names {size.text} twice; leave one out")
    return sizes


def _parse_size(text: str) -> PixelSize:
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
        frames, height, width = map(int, found.groups())
        return PixelSize(text, frames, height, width)
    name, _, frames_text = text.partition(":")
    if name.lower() not in NAMED_SIZES or not re.fullmatch(r"\d*", frames_text) or text.endswith(":"):
        raise InputsError(
            f"'{text}' is not a size: give FRAMESxHEIGHTxWIDTH in pixels, such as 25x480x832, or one of "
            f"{', '.join(NAMED_SIZES)} with its frames, such as 480p:25"
        )
    return PixelSize(text, int(frames_text or DEFAULT_FRAMES), *NAMED_SIZES[name.lower()])


def preset_grid(preset: Preset, size: PixelSize) -> TokenGrid:
    """The token grid of a size in the model that a preset was trained on; InputsError where it does not divide."""
    step = _PRESET_HEIGHT // preset.grid.h
    if (size.frames - 1) % _VAE_FRAMES or size.height % step or size.width % step:
        raise InputsError(
            f"size {size.text} is no grid of {preset.name}'s model: frames must be {_VAE_FRAMES}*k + 1, height and "
            f"width multiples of {step}"
        )
    return TokenGrid((size.frames - 1) // _VAE_FRAMES + 1, size.height // step, size.width // step)


def scaled_schedule(preset: Preset, grid: TokenGrid, keep: Keep = "windows") -> Schedule:
    """The preset's patterns on another grid.

    ``keep`` "windows": windows of about the same extent, splits scale with the axes; a smaller grid has fewer.
    "splits": those of the preset, so that every pattern keeps its share of the work; windows shrink. GridError where
    an axis is longer than the preset's (T3 was not trained there, and no rule says how to split), or shorter than its
    splits.
    """
    if grid == preset.grid:
        return preset.schedule
    if any(length > own for length, own in zip(grid.sizes, preset.grid.sizes, strict=True)):
        raise GridError(f"grid {grid} is larger than {preset.grid}, at which {preset.name} was trained")
    if keep == "splits":
        for pattern in preset.schedule.patterns:
            if any(n > length for n, length in zip(pattern.splits.counts, grid.sizes, strict=True)):
                raise GridError(f"splits {pattern.splits} of {preset.name} cut no grid as small as {grid}")
        return replace(preset.schedule, name=f"{preset.name} on {grid}")
    patterns = tuple(
        replace(pattern, splits=Splits(*_scaled(pattern.splits.counts, preset.grid, grid)))
        for pattern in preset.schedule.patterns
    )
    return Schedule(f"{preset.name} scaled to {grid}", patterns, preset.schedule.source)


def _scaled(counts: tuple[int, int, int], own: TokenGrid, grid: TokenGrid) -> list[int]:
    """Halves round up: windows rather shorter than longer."""
    return [
        min(length, max(1, (2 * n * length + whole) // (2 * whole)))
        for n, length, whole in zip(counts, grid.sizes, own.sizes, strict=True)
    ]
