"""t3compile kernels build: from presets, plans, ONNX files and models to a folder of PTX, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

import t3compile
from t3compile.cli import main
from t3compile.errors import KernelError, ModelFileError, OutputError
from t3compile.export import build_tactics, check_ptx
from t3compile.export.assemble_ptx import PTXAS_VARIABLE, find_ptxas
from t3compile.export.check_ptx import TEXT_GATES
from t3compile.export.compile_kernel import compile_launch, entry_name, entry_parameters
from t3compile.export.function_launches import window_launches
from t3compile.export.kernel_set import MANIFEST_NAME, KernelSet
from t3compile.export.kernel_sources import GivenNumbers, keys_of_onnx, keys_of_preset, keys_of_program
from t3compile.export.window_function import FunctionKey, MaskKey
from t3compile.export.write_onnx import write_onnx
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.ops.window_launch import Layout, Tile
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.pattern import WindowPattern
from t3compile.plan import Plan, SitePlan
from t3compile.presets import PRESETS
from t3compile.program import Program
from tests.test_window_function import CALLS, _case

pytest.importorskip("triton", reason="needs triton: pip install 't3compile[kernels]'")

ROOT = Path(__file__).parents[1]
GRID = TokenGrid(2, 8, 12)
PATTERN = WindowPattern(Splits(1, 2, 3))
TILE = Tile(64, 32, 4, 2)


def _plan(path: Path, *patterns: WindowPattern | None) -> Path:
    sites = tuple(SitePlan(f"site_{i}", GRID, 0, 0, pattern, "") for i, pattern in enumerate(patterns))
    path.write_text(Plan("0" * 64, "custom", sites).dumps())
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """One pattern, twice, beside a site that stays full."""
    return _plan(tmp_path / "plan.json", PATTERN, None, PATTERN)


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a single tile, for what does not depend on how many there are."""
    monkeypatch.setattr(build_tactics, "portable_tiles", lambda *_: (TILE,))
    monkeypatch.setattr(build_tactics, "_SMALLER", {2: ()})


def _build(source: Any, output: Path, **options: Any) -> KernelSet:
    return t3compile.build_kernels(source, output, **{"heads": 2, "head_dim": 64, "architectures": (80,), **options})


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["kernels", "build", *map(str, arguments)])


# --- what is written -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """With all tiles, on two architectures."""
    tree = tmp_path_factory.mktemp("kernels")
    options = ("--heads", "2", "--head-dim", "64", "--batch", "3", "--arch", "80", "--arch", "120", "--json")
    return tree / "out", _invoke(_plan(tree / "plan.json", PATTERN, None, PATTERN), "-o", tree / "out", *options)


def test_the_manifest_describes_every_file(built: tuple[Path, Result]) -> None:
    folder, result = built
    assert result.exit_code == 0, result.output
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert json.loads(result.stdout) == manifest
    assert (manifest["t3compile_kernels"], manifest["target"]) == (1, "sm_80")
    assert manifest["architectures"] == ["sm_80", "sm_120"]
    assert manifest["gates_not_run"] == []
    (function,) = manifest["functions"]
    local, dilated = function["launches"]
    tactics = [tactic for launch in (local, dilated) for tactic in launch["tactics"]]
    assert {path.name for path in folder.iterdir()} == {MANIFEST_NAME, *(tactic["file"] for tactic in tactics)}
    assert len({tactic["entry"] for tactic in tactics}) == len(tactics) >= 4
    for tactic in tactics:
        ptx = (folder / tactic["file"]).read_text()
        assert hashlib.sha256(ptx.encode()).hexdigest() == tactic["sha256"]
        assert f".visible .entry {tactic['entry']}(" in ptx
        assert tactic["file"] == f"{tactic['entry']}.ptx"
        assert tactic["block_x"] == 32 * tactic["tile"]["warps"]
        # 6 windows of 2 x 4 x 4 tokens, for each of 3 x 2 heads.
        assert tactic["grid_x"] == 3 * 2 * 6
        assert tactic["shared_bytes"] <= 49_152
        assert set(tactic["registers"]) == {"sm_80", "sm_120"}
        gates = [gate["gate"] for gate in tactic["gates"]]
        assert gates == [gate.name for gate in TEXT_GATES] + ["assembles", "spills"] * 2
        assert {gate["verdict"] for gate in tactic["gates"]} == {"passed"}
    shape = [3, 2, 192, 64]
    inputs = [{"name": name, "dtype": "bfloat16", "shape": shape} for name in ("q", "k", "v")]
    assert local["pointers"] == [*inputs, {**inputs[0], "name": "out"}]
    assert dilated["pointers"] == [*inputs, {**inputs[0], "name": "other"}, {**inputs[0], "name": "out"}]
    assert [(launch["branch"], launch["averages"]) for launch in (local, dilated)] == [
        ("local", False),
        ("dilated", True),
    ]
    assert "no mask" in result.stderr


def test_nothing_but_the_folder_is_left(built: tuple[Path, Result]) -> None:
    assert sorted(path.name for path in built[0].parent.iterdir()) == ["out", "plan.json"]


@pytest.mark.usefixtures("one_tile")
def test_the_table_shows_the_costs(plan: Path, tmp_path: Path) -> None:
    result = _invoke(plan, "-o", tmp_path / "out", "--heads", 2, "--head-dim", 64, "--arch", 80, "--arch", 90)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("(")]
    assert [row[3].rstrip(",") for row in rows] == ["local", "dilated"]
    assert all(row[-1] == "0" for row in rows)
    assert "wrote" in result.stderr
    assert "2 kernels" in result.stderr


@pytest.mark.usefixtures("one_tile")
def test_a_build_replaces_an_earlier_one_and_no_other_folder(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _build(plan, out)
    before = {path.name for path in out.iterdir()}
    _build(plan, out, batch=2)
    assert not before & {path.name for path in out.iterdir()} - {MANIFEST_NAME}
    (out / "notes.txt").write_text("mine")
    for folder, message in ((out, "holds other files .'notes.txt'"), (plan, "it is a file"), (tmp_path, "other files")):
        with pytest.raises(OutputError, match=message):
            _build(plan, folder)
    with pytest.raises(OutputError, match="does not exist"):
        _build(plan, tmp_path / "no" / "out")
    assert (out / "notes.txt").read_text() == "mine"


# --- the same text everywhere --------------------------------------------------------------------


def test_the_text_depends_on_launch_and_tile_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the caches or settings of the user's triton, whose environment stays as it was."""
    launch = window_launches(FunctionKey(WindowAttentionArgs(GRID, PATTERN), 1, 2, 64, 64, "bfloat16", "attention"))[1]
    compile_anew = compile_launch.__wrapped__
    plain = compile_anew(launch, TILE)
    settings = {
        "TRITON_DISABLE_LINE_INFO": "0",
        "TRITON_FORCE_DISABLE_FP_FUSION": "1",
        "TRITON_OVERRIDE_ARCH": "sm90",
        "TRITON_STORE_BINARY_ONLY": "1",
        # As in a home that cannot be written.
        "TRITON_CACHE_DIR": "/proc/cache",
        "TRITON_HOME": "/proc",
        "HOME": "/proc",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert compile_anew(launch, TILE) == plain
    assert dict(os.environ) == before


def test_entries_are_named_after_everything_baked_in() -> None:
    args = WindowAttentionArgs(GRID, PATTERN, 2, 1)
    key = FunctionKey(args, 1, 2, 64, 64, "bfloat16", "attention")
    keys = [
        key,
        replace(key, args=replace(args, grid=TokenGrid(2, 12, 8))),
        replace(key, args=replace(args, pattern=WindowPattern(Splits(2, 2, 3)))),
        replace(key, args=replace(args, prefix=1, suffix=2)),
        replace(key, args=replace(args, query_prefix=0)),
        replace(key, args=replace(args, query_suffix=0)),
        replace(key, args=replace(args, scale=0.3)),
        replace(key, batch=2),
        replace(key, heads=4, key_heads=4),
        replace(key, heads=4, key_heads=2),
        replace(key, head_dim=32),
        replace(key, value_dim=32),
        replace(key, dtype="float16"),
        replace(key, mask=MaskKey((1, 1, 1, 195), "bool")),
        replace(key, mask=MaskKey((1, 1, 195, 195), "bool")),
        replace(key, mask=MaskKey((1, 1, 1, 195), "float32")),
    ]
    tiles = (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 64, 4, 2))
    names = [entry_name(launch, tile) for one in keys for launch in window_launches(one) for tile in tiles]
    assert len(set(names)) == len(names) == 2 * len(keys) * len(tiles)


def test_launches_read_contiguous_tensors() -> None:
    """Strides are torch's own; a mask broadcasts by strides of 0."""
    args = WindowAttentionArgs(GRID, PATTERN, 2, 1, None, 0, 4)
    key = FunctionKey(args, 3, 6, 20, 12, "float16", "attention", MaskKey((6, 1, 195), "bool"), 2)
    for launch in window_launches(key):
        shapes = {"q": (6, 196, 20), "k": (2, 195, 20), "v": (2, 195, 12), "out": (6, 196, 12)}
        for name, shape in shapes.items():
            assert getattr(launch, name) == Layout(*torch.empty(3, *shape, device="meta").stride()[:3])
        mask = torch.empty(6, 1, 195, device="meta").expand(3, 6, 196, 195)
        assert launch.mask is not None
        assert (launch.mask.batch, launch.mask.head, launch.mask.query, launch.mask.key) == mask.stride()
        assert launch.inputs == 4 + launch.averages


# --- sources -------------------------------------------------------------------------------------


def test_presets_carry_their_models_heads() -> None:
    for preset, heads in zip(PRESETS, (12, 24), strict=True):
        keys = keys_of_preset(preset, GivenNumbers()).keys
        assert [key.args.pattern for key in keys] == list(preset.schedule.patterns)
        assert {(key.batch, key.heads, key.head_dim, key.dtype) for key in keys} == {(1, heads, 128, "bfloat16")}
    given = GivenNumbers("float16", 2, 40, 64)
    assert {(key.batch, key.heads, key.head_dim, key.dtype) for key in keys_of_preset(PRESETS[0], given).keys} == {
        (2, 40, 64, "float16")
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """A masked call as a program and as a file."""
    program = _case([CALLS["rows"]], torch.float16).program
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    write_onnx(LegalizeWindowAttention()(program).program, path)
    return program, path


def test_an_onnx_file_and_its_program_give_the_same_kernels(exported: tuple[Program, Path]) -> None:
    program, path = exported
    from_file, from_program = keys_of_onnx(path, GivenNumbers()), keys_of_program(program, "it", GivenNumbers())
    assert from_file.keys == from_program.keys
    (key,) = from_file.keys
    assert (key.args, key.dtype) == (CALLS["rows"][0], "float16")
    assert key.mask is not None


@pytest.mark.usefixtures("one_tile")
def test_kernels_of_an_onnx_file_name_its_functions(exported: tuple[Program, Path], tmp_path: Path) -> None:
    result = _invoke(exported[1], "-o", tmp_path / "out", "--arch", "80", "--json")
    assert result.exit_code == 0, result.output
    (function,) = json.loads(result.stdout)["functions"]
    assert function["function"] == next(iter(onnx.load(exported[1]).functions)).name
    second = function["launches"][1]
    assert [pointer["name"] for pointer in second["pointers"]] == ["q", "k", "v", "mask", "other", "out"]
    ptx = (tmp_path / "out" / second["tactics"][0]["file"]).read_text()
    assert len(entry_parameters(ptx)) == 6


@pytest.mark.usefixtures("one_tile")
def test_a_model_is_planned_and_rewritten(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    size = ("--frames", 9, "--height", 64, "--width", 96, "--text-tokens", 7, "--random-weights")
    options = ("--schedule", "3,1,1/1,2,3", "--dtype", "bfloat16", "--arch", 80, "--json")
    result = _invoke(folder, *size, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    functions = json.loads(result.stdout)["functions"]
    assert [function["launches"][0]["grid"] for function in functions] == [[3, 4, 6]] * 2
    assert [len(function["launches"]) for function in functions] == [1, 2]
    assert functions[0]["launches"][0]["pointers"][0]["shape"] == [1, 2, 72, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan.json", "the plan 'plan.json' tells no heads and head dim: give --heads and --head-dim"),
        ("plan.json --heads 2", "give --head-dim"),
        ("plan.json --heads 2 --head-dim 64 --frames 9", "'plan.json' is no model to load: leave out --frames"),
        ("t3-wan2.1-4k --schedule 1,2,3 --seed 3", "leave out --seed, --schedule"),
        ("t3-wan2.1-4k --min-tokens 0", "leave out --min-tokens"),
        ("t3-wan2.1-4k --schedule auto --seed 0 --plan plan.json", "leave out --seed, --schedule, --plan"),
        (
            "t3-wan2.1-4k --no-assemble --arch 90",
            "--arch says what ptxas assembles for: leave it out",
        ),
        (
            "t3-wan9",
            "give a preset (t3-wan2.1-4k, t3-wan2.2-4k), an exported .onnx, a plan's .json",
        ),
        ("full.json --heads 2 --head-dim 64", "leaves all sites full"),
        ("nowhere.json", "cannot read the plan 'nowhere.json'"),
        ("nowhere.onnx", "cannot read 'nowhere.onnx': No such file"),
        ("bad.onnx", "is no ONNX file"),
        ("empty.onnx", "holds no window attention function"),
        ("empty.onnx --heads 2 --dtype float16", "has its own shapes and dtypes: leave out --dtype, --heads"),
        ("plan.json --heads 2 --head-dim 64 --arch 81", "gate 'assembles' expected ptxas takes it for sm_81"),
    ],
)
@pytest.mark.usefixtures("plan", "one_tile")
def test_what_is_wrong_is_one_sentence(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plan(tmp_path / "full.json", None)
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "empty.onnx")
    monkeypatch.chdir(tmp_path)
    result = _invoke(*arguments.split(), "-o", "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.lower().count("error:") == 1
    assert not Path("out").exists()


def test_a_source_that_is_nothing_is_told_what_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no 't3-wan9'; give a preset \(t3-wan2.1-4k, .*\.onnx, .*\.json"):
        _build("t3-wan9", tmp_path / "out")


# --- what fails leaves nothing -------------------------------------------------------------------


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("one_tile")
def test_no_tile_left_is_an_error_that_names_all(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_ptx, "SHARED_BYTES_LIMIT", 1000)
    with pytest.raises(
        KernelError,
        match=r"pattern \(1,2,3\), local branch, on grid 2x8x12 .*no tile passes: tile 64x32, 4 warps, 2 stages: "
        r"gate 'shared memory' expected at most 1,000 bytes, found [\d,]+ bytes",
    ):
        _build(plan, tmp_path / "out")
    assert _files(tmp_path) == ["plan.json"]


@pytest.mark.usefixtures("one_tile")
def test_a_gate_that_no_tile_mends_ends_the_build(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_ptx, "MAX_PTX_VERSION", (7, 8))
    result = _invoke(plan, "-o", tmp_path / "out", "--heads", 2, "--head-dim", 64)
    assert result.exit_code == 2
    assert "pattern (1,2,3), local branch, on grid 2x8x12 (2 heads of 64, bfloat16), tile 64x32" in result.stderr
    assert "gate 'PTX version' expected .version at most 7.8, found 8.0" in result.stderr
    assert _files(tmp_path) == ["plan.json"]


def test_smaller_tiles_are_tried_where_none_passes(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = (TILE, Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
    monkeypatch.setattr(build_tactics, "portable_tiles", lambda *_: (TILE,))
    monkeypatch.setattr(build_tactics, "_SMALLER", {2: smaller})
    launch = window_launches(FunctionKey(WindowAttentionArgs(GRID, PATTERN), 1, 2, 64, 64, "bfloat16", "attention"))[1]
    monkeypatch.setattr(check_ptx, "SHARED_BYTES_LIMIT", compile_launch(launch, smaller[1]).shared_bytes)
    built = _build(plan, tmp_path / "out")
    assert {tactic.kernel.tile for tactic in built.tactics} == {Tile(32, 32, 4, 2)}
    assert [dropped.tile for _, dropped in built.dropped] == [TILE] * 2
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["functions"][0]["launches"][0]["dropped"][0]["gate"] == "shared memory"


@pytest.mark.usefixtures("one_tile")
def test_a_write_that_fails_leaves_nothing(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if path.name == MANIFEST_NAME:
            raise OSError(28, "No space left on device", str(path))
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        _build(plan, tmp_path / "out")
    assert _files(tmp_path) == ["plan.json"]


def test_a_stopped_build_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "t3compile", "kernels", "build", "t3-wan2.1-4k", "-o", str(tmp_path / "out")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "kernel 2 of" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "nothing unfinished was left behind" in said
    assert _files(tmp_path) == []


# --- what is missing -----------------------------------------------------------------------------


def test_without_triton_the_extra_is_named(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    result = _invoke(plan, "-o", tmp_path / "out", "--heads", 2, "--head-dim", 64)
    assert result.exit_code == 2
    assert "pip install 't3compile[kernels]'" in result.stderr


def test_without_ptxas_the_build_fails_and_says_the_way_out(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PTXAS_VARIABLE, "/nowhere/ptxas")
    with pytest.raises(KernelError, match="names '/nowhere/ptxas', which is no program"):
        find_ptxas()
    monkeypatch.delenv(PTXAS_VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("t3compile.export.assemble_ptx.find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"no ptxas: .*--no-assemble"):
        _build(plan, tmp_path / "out")
    assert _files(tmp_path) == ["plan.json"]


def test_another_ptxas_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    own = Path(triton.origin).parent / "backends/nvidia/bin/ptxas"
    assert find_ptxas() == own
    (tmp_path / "ptxas").symlink_to(own)
    monkeypatch.setenv(PTXAS_VARIABLE, str(tmp_path / "ptxas"))
    assert find_ptxas() == tmp_path / "ptxas"


@pytest.mark.usefixtures("one_tile")
def test_gates_that_did_not_run_are_said(plan: Path, tmp_path: Path) -> None:
    result = _invoke(plan, "-o", tmp_path / "out", "--heads", 2, "--head-dim", 64, "--no-assemble")
    assert result.exit_code == 0, result.output
    assert "warning: without ptxas these gates did not run: assembles, spills" in result.stderr
    assert "not assembled" in result.stdout
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["gates_not_run"] == ["assembles", "spills"]
    assert (manifest["ptxas"], manifest["architectures"]) == (None, [])
    assert manifest["functions"][0]["launches"][0]["tactics"][0]["registers"] == {}
