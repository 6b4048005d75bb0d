"""The schedules that T3-Video was trained with, as plain data.

Source: arXiv 2512.13492 and the authors' code (zhangzjn/T3-Video, diffsynth/models/wan_video_dit.py). Heads and head
dims are those of the models' published configurations, ``num_heads`` and ``dim`` over it (Wan-Video/Wan2.1,
wan/configs/wan_t2v_1_3B.py; Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from t3compile.errors import PatternError
from t3compile.geometry import TokenGrid
from t3compile.pattern import Schedule


@dataclass(frozen=True)
class Preset:
    """A published schedule, the one grid that it was trained at, and the attention of the model it was trained on."""

    schedule: Schedule
    grid: TokenGrid
    heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return self.schedule.name


PRESETS = (
    Preset(
        Schedule.from_splits(
            [(21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)],
            name="t3-wan2.1-4k",
            source="arXiv 2512.13492, Wan2.1-T2V-1.3B at 2176x3840, 81 frames",
        ),
        TokenGrid(21, 136, 240),
        heads=12,
        head_dim=128,
    ),
    Preset(
        Schedule.from_splits(
            [(21, 1, 1), (1, 17, 20), (1, 17, 6), (3, 4, 15), (7, 4, 8)],
            name="t3-wan2.2-4k",
            source="arXiv 2512.13492, Wan2.2-TI2V-5B at 2176x3840, 81 frames",
        ),
        TokenGrid(21, 68, 120),
        heads=24,
        head_dim=128,
    ),
)


def preset_named(name: str) -> Preset:
    """The preset of that name; PatternError lists the known ones."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    known = ", ".join(["auto", *(preset.name for preset in PRESETS)])
    raise PatternError(f"schedule '{name}' is unknown; known: {known}, or splits such as 5,1,1/1,3,4")


def preset_for(grid: TokenGrid) -> Preset | None:
    """The preset trained at exactly this grid, if any."""
    return next((preset for preset in PRESETS if preset.grid == grid), None)
