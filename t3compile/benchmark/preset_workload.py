"""A preset's attention without a model around it: layers of the model that it was trained on."""

from __future__ import annotations

from t3compile.benchmark.cases import Workload
from t3compile.benchmark.sizes import Keep, PixelSize, preset_grid, scaled_schedule
from t3compile.benchmark.variants import AttentionLayer
from t3compile.ops import WindowAttentionArgs
from t3compile.presets import Preset


def preset_workload(
    preset: Preset,
    size: PixelSize | None = None,
    *,
    dtype: str = "float32",
    batch: int = 1,
    heads: int | None = None,
    keep: Keep = "windows",
) -> Workload:
    """One cycle of a preset, at its own grid or as scaled_schedule has it at a size; ``heads`` None: its model's."""
    grid = preset.grid if size is None else preset_grid(preset, size)
    layers: dict[AttentionLayer, int] = {}
    for pattern in scaled_schedule(preset, grid, keep).patterns:
        args = WindowAttentionArgs(grid, pattern)
        layer = AttentionLayer.by_tokens(args, heads or preset.heads, preset.head_dim, dtype, batch)
        layers[layer] = layers.get(layer, 0) + 1
    return Workload(str(grid) if size is None else size.text, layers=layers)
