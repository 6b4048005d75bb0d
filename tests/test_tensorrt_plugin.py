"""Our side of TensorRT's plugin contract, driven through its real Python bindings.

The bindings' own plugin template asks, our plugins answer, from types to PTX. What TensorRT's builder and runtime make
of the answers is not shown here: there is no TensorRT behind these bindings.
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from t3compile.export.build_tactics import offered_tiles
from t3compile.export.check_ptx import check_text, require_gates
from t3compile.export.compile_kernel import CompiledKernel, entry_parameters
from t3compile.export.plugin_kernels import PluginKernels, compile_plugin_layers, tactic_of
from t3compile.export.plugin_layers import PluginLayers, plan_plugin_layers, with_plugin_nodes
from t3compile.export.window_function import FunctionKey
from t3compile.ops import WindowAttentionArgs
from t3compile.ops.window_launch import Tile, WindowLaunch
from t3compile.presets import PRESETS
from tests.tensorrt_bindings import VERSIONS, run_with_bindings
from tests.test_plugin_layers import GROUPED, ONE_BRANCH, PLAIN, file_of

DRIVE = "import sys; from tests.drive_plugin import main; main(*sys.argv[1:])"
WAN = PRESETS[0]
# A pattern of Wan2.1 at 4K: 12 heads of 128, some 685,000 tokens.
PRESET = FunctionKey(
    WindowAttentionArgs(WAN.grid, WAN.schedule.patterns[1]),
    1,
    WAN.heads,
    WAN.head_dim,
    WAN.head_dim,
    "bfloat16",
    "attention",
)
KEYS = (PLAIN, GROUPED, ONE_BRANCH, PRESET)
SMALL_TILES = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))
DATA_TYPES = {"float16": "HALF", "bfloat16": "BF16", "bool": "BOOL"}


def few_tiles(launch: WindowLaunch) -> tuple[Tile, ...]:
    """The tiles of the real pattern, and two for the others, so that the tests are quick."""
    return offered_tiles(launch) if launch.head_dim == PRESET.head_dim else SMALL_TILES


@dataclass(frozen=True)
class Planned:
    """A file's plugin layers with their kernels, and its graph with plugin nodes."""

    plugins: PluginLayers
    kernels: PluginKernels
    graph: ir.Model


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    model = file_of(KEYS, tmp_path_factory.mktemp("file") / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t3compile.export.build_tactics.offered_tiles", few_tiles)
        plugins, kernels = compile_plugin_layers(plan_plugin_layers(model))
    assert not plugins.declined
    return Planned(plugins, kernels, with_plugin_nodes(model, plugins))


@pytest.fixture(scope="module", params=VERSIONS)
def answers(planned: Planned, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What our plugins answered to the template of one version."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "given").write_bytes(pickle.dumps((planned.plugins, planned.kernels)))
    run_with_bindings(request.param, DRIVE, str(folder / "given"), str(folder / "answers.json"))
    told = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    assert told["version"] == request.param
    return told


def test_the_template_gets_types_shapes_formats_and_tactics(planned: Planned, answers: Any) -> None:
    for layer in planned.plugins.layers:
        told = answers["layers"][layer.name]
        assert (told["outputs"], told["aliased"]) == (1, -1)
        assert told["out_type"] == DATA_TYPES[layer.output.dtype]
        assert told["out_shape"] == list(layer.output.shape)
        dtypes = [DATA_TYPES[x.dtype] for x in (*layer.inputs, layer.output)]
        # One combination: a second would make the list longer.
        assert told["formats"] == [[dtype, "LINEAR"] for dtype in dtypes]
        assert told["tactics"] == sorted(map(tactic_of, few_tiles(layer.launch)))
    assert answers["failures"] == {}


def test_the_template_gets_kernels_that_pass_the_gates(planned: Planned, answers: Any) -> None:
    compiled = planned.kernels.compiled()
    told = {(name, one["tactic"]): one for name, layer in answers["layers"].items() for one in layer["kernels"]}
    assert told.keys() == compiled.keys()
    for (name, tactic), one in told.items():
        kernel = replace(compiled[name, tactic], ptx=one["ptx"], entry=one["entry"])
        require_gates(kernel, check_text(kernel))
        assert kernel.sha256 == compiled[name, tactic].sha256
        (layer,) = (layer for layer in planned.plugins.layers if layer.name == name)
        assert len(entry_parameters(one["ptx"])) == len(layer.inputs) + 1
        assert one["extra_arguments"] == [0, 0]
        threads, blocks = 32 * kernel.tile.warps, layer.launch.programs(kernel.tile)
        ones = dict.fromkeys(("grid_y", "grid_z", "block_y", "block_z"), 1)
        assert one["launch"] == {"grid_x": blocks, "block_x": threads, "shared_mem": kernel.shared_bytes, **ones}


def test_every_plugin_node_finds_its_creator(planned: Planned, answers: Any) -> None:
    nodes = {node.op_type for node in planned.graph.graph if node.domain == "t3"}
    assert answers["registered"] == [[name, "1", "t3"] for name in sorted(nodes)]
    assert sorted(answers["new"]) == sorted(nodes)


def test_a_second_engine_in_the_process_registers_again(answers: Any) -> None:
    assert answers["new again"] == []
    assert answers["failures after refusals"] != {}
    assert answers["failures of the next engine"] == {}


def test_what_the_kernel_is_not_made_for_is_refused(planned: Planned, answers: Any) -> None:
    first = planned.plugins.layers[0]
    shape, output, dtype, tactic = answers["refusals"]
    assert "input 'q' has shape [1, 4, 31, 32], the kernel is made for q [1, 4, 30, 32] float16" in shape
    assert "tensor 'out' is [1, 4, 30, 40] HALF LINEAR" in output
    assert "tensor 'q' is [1, 4, 30, 32] FLOAT LINEAR" in dtype
    assert "asks for tactic 7; offered: [64032042, 64064042]" in tactic
    assert answers["failures after refusals"] == {first.name: shape}


def test_a_name_that_is_taken_is_refused(planned: Planned, answers: Any) -> None:
    other, foreign = answers["taken name"]
    assert f"'t3::{planned.plugins.layers[0].name}' is registered in this process with another configuration" in other
    assert "'t3::WindowAttention_foreign' is registered by something else" in foreign


def test_plugins_are_prepared_from_the_file_beside_the_bindings(planned: Planned, tmp_path: Path) -> None:
    file_of([ONE_BRANCH, replace(PLAIN, dtype="float32")], tmp_path / "model.onnx")
    code = """
import json, sys
import onnx_ir as ir
import tensorrt
import t3compile.export.build_tactics as tactics
from t3compile.export.prepare_plugins import prepare_plugins
from tests.drive_plugin import install_stand_ins
from tests.test_tensorrt_plugin import few_tiles

tactics.offered_tiles = few_tiles
_, registry = install_stand_ins()
prepared = prepare_plugins(ir.load(sys.argv[1]), tensorrt, architectures=(80,))
kernels = prepared.kernels.compiled().values()
nodes = [node.op_type for node in prepared.model.graph if node.domain == "t3"]
told = (sorted(registry.creators), sorted(kernel.sha256 for kernel in kernels), nodes, dict(prepared.plugins.declined))
open(sys.argv[2], "w").write(json.dumps(told))
"""
    run_with_bindings(VERSIONS[-1], code, str(tmp_path / "model.onnx"), str(tmp_path / "told.json"))
    registered, hashes, nodes, declined = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    (native,) = declined
    assert registered == [[ONE_BRANCH.name, "1", "t3"]]
    assert nodes == 2 * [ONE_BRANCH.name] + 2 * [native]
    assert hashes == sorted(kernel.sha256 for kernel in planned.kernels.tactics(ONE_BRANCH.name).values())


ADDRESS = r"\[\s*(%\w+)"


def accesses(kernel: CompiledKernel) -> list[str]:
    """What the entry does with the memory behind each of its pointers, in order: "read", "write" or both.

    Follows every pointer through the registers that are computed from it.
    """
    parameters = [text.split()[-1] for text in entry_parameters(kernel.ptx)]
    behind: dict[str, set[int]] = {}
    found = [set() for _ in parameters]
    lines = [re.sub(r"^\s*(@!?%\w+)?\s*", "", line) for line in kernel.ptx.splitlines()]
    for _ in range(3):
        for line in lines:
            if match := re.match(r"ld\.param\.[bu]64\s+(%\w+), \[([\w$]+)\]", line):
                behind.setdefault(match[1], set()).add(parameters.index(match[2]))
            elif match := re.match(r"st\.global\S*\s+" + ADDRESS, line):
                for i in behind.get(match[1], ()):
                    found[i].add("write")
            elif match := re.match(r"(?:ld\.global\S*\s.*|cp\.async\S*\.global\S*\s[^,]*,\s*)" + ADDRESS, line):
                for i in behind.get(match[1], ()):
                    found[i].add("read")
            elif match := re.match(r"(?:add|mad|sub|mov|cvta|selp|shl|max|min)\S*\s+(%\w+),(.*)", line):
                sources = re.findall(r"%\w+", match[2])
                behind.setdefault(match[1], set()).update(*(behind.get(source, set()) for source in sources))
    return [" and ".join(sorted(one)) or "nothing" for one in found]


def test_the_kernel_reads_its_inputs_and_writes_its_last_pointer(planned: Planned) -> None:
    for kernel in planned.kernels.compiled().values():
        assert accesses(kernel) == ["read"] * kernel.launch.inputs + ["write"]


def test_a_function_that_no_tile_suits_keeps_its_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(PLAIN, head_dim=256, value_dim=256)
    tiles = {256: (Tile(128, 64, 8, 2),), 32: (Tile(64, 32, 4, 2),)}
    monkeypatch.setattr("t3compile.export.build_tactics.offered_tiles", lambda launch: tiles[launch.head_dim])
    monkeypatch.setattr("t3compile.export.build_tactics.smaller_tiles", lambda launch: ())
    model = file_of([wide, ONE_BRANCH], tmp_path / "model.onnx")
    heard: list[str] = []
    plugins, kernels = compile_plugin_layers(plan_plugin_layers(model), on_layer=lambda layer: heard.append(layer.name))
    assert heard == [f"{wide.name}_local", ONE_BRANCH.name]
    assert [layer.name for layer in plugins.layers] == [ONE_BRANCH.name] == [*kernels.by_layer]
    assert "128x64, 8 warps" in plugins.declined[wide.name]
    assert "shared memory" in plugins.declined[wide.name]
    assert [name for _, name, _ in with_plugin_nodes(model, plugins).functions] == [wide.name]


def test_tiles_that_a_gate_refuses_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, large = Tile(32, 32, 4, 1), Tile(128, 64, 8, 2)
    monkeypatch.setattr("t3compile.export.build_tactics.offered_tiles", lambda launch: (fits, large))
    key = replace(ONE_BRANCH, head_dim=256, value_dim=256)
    plugins, kernels = compile_plugin_layers(plan_plugin_layers(file_of([key], tmp_path / "model.onnx")))
    (layer,) = plugins.layers
    assert [*kernels.tactics(layer.name)] == [tactic_of(fits)]
    assert [one.tile for one in kernels.dropped()[layer.name]] == [large]


def test_tactics_are_different_positive_int32() -> None:
    tiles = [Tile(*sizes) for sizes in itertools.product((16, 64, 256), (16, 128, 256), (1, 4, 32), (1, 2, 9))]
    tactics = set(map(tactic_of, tiles))
    assert len(tactics) == len(tiles)
    assert min(tactics) > 0
    assert max(tactics) < 2**31
