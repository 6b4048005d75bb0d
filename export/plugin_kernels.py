"""The kernels of plugin layers: each layer's tactics, compiled without a GPU, those that pass every gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from t3compile.errors import KernelError
from t3compile.export.assemble_ptx import find_ptxas
from t3compile.export.build_tactics import DroppedTile, LaunchKernels, build_tactics
from t3compile.export.compile_kernel import CompiledKernel
from t3compile.export.plugin_layers import PluginLayer, PluginLayers
from t3compile.ops.window_launch import Tile


def tactic_of(tile: Tile) -> int:
    """The number by which TensorRT and its timing cache know a tile: 128x32, 8 warps, 2 stages is 128032082.

    The digits are the tile's own, not its place in a table, so that a cached choice means the same kernel after the
    table has changed. Positive and below 2^31.
    """
    return tile.block_m * 1_000_000 + tile.block_n * 1_000 + tile.warps * 10 + tile.stages


@dataclass(frozen=True)
class PluginKernels:
    """What was compiled for each layer, by the layer's name."""

    by_layer: Mapping[str, LaunchKernels]

    def tactics(self, layer: str) -> dict[int, CompiledKernel]:
        """The kernels of a layer by tactic, in the order in which they are offered."""
        return {tactic_of(tactic.kernel.tile): tactic.kernel for tactic in self.by_layer[layer].tactics}

    def compiled(self) -> dict[tuple[str, int], CompiledKernel]:
        """All kernels by layer and tactic: an engine holds one of each layer's."""
        return {(layer, tactic): kernel for layer in self.by_layer for tactic, kernel in self.tactics(layer).items()}

    def dropped(self) -> dict[str, tuple[DroppedTile, ...]]:
        """Tiles that a gate refused, by layer."""
        return {layer: kernels.dropped for layer, kernels in self.by_layer.items() if kernels.dropped}


def compile_plugin_layers(
    plugins: PluginLayers,
    *,
    architectures: Sequence[int] = (),
    on_layer: Callable[[PluginLayer], None] = lambda layer: None,
) -> tuple[PluginLayers, PluginKernels]:
    """Compile every layer with each tile of its table, without a GPU; ``on_layer`` hears of each before.

    The gates over the PTX's text apply, and those over what ptxas makes of it for the ``architectures``, such as 90.
    A function with a layer that no tile suits is declined, with the reason, in the layers that come back.
    MissingExtraError without triton, KernelError where there are architectures and no ptxas.
    """
    ptxas = find_ptxas() if architectures else None
    kernels: dict[str, LaunchKernels] = {}
    declined: dict[str, str] = {}
    for layer in plugins.layers:
        if layer.function in declined:
            continue
        on_layer(layer)
        try:
            kernels[layer.name] = build_tactics(layer.launch, architectures, ptxas)
        except KernelError as error:
            declined[layer.function] = str(error)
    fitting = plugins.without(declined)
    return fitting, PluginKernels({layer.name: kernels[layer.name] for layer in fitting.layers})
