"""The gates of the ahead-of-time kernels: every pattern of both presets passes them, and each fires on doctored PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from t3compile.errors import KernelError
from t3compile.export import compile_kernel
from t3compile.export.assemble_ptx import ARCHITECTURES, Assembly, assemble, find_ptxas, read_assembly
from t3compile.export.build_tactics import DroppedTile, Tactic, offered_tiles, smaller_tiles, try_tile
from t3compile.export.check_ptx import (
    TEXT_GATES,
    check_assemblies,
    check_text,
    require_gates,
)
from t3compile.export.compile_kernel import CompiledKernel, compile_launch, entry_parameters, strip_parameters
from t3compile.export.function_launches import window_launches
from t3compile.export.kernel_sources import GivenNumbers, keys_of_preset
from t3compile.export.window_function import FunctionKey
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.ops.window_launch import MaskLayout, Tile, WindowLaunch
from t3compile.pattern import WindowPattern
from t3compile.presets import PRESETS

pytest.importorskip("triton", reason="needs triton: pip install 't3compile[kernels]'")

SMALL = WindowAttentionArgs(TokenGrid(2, 8, 12), WindowPattern(Splits(1, 2, 3)))
LARGE = WindowAttentionArgs(PRESETS[0].grid, PRESETS[0].schedule.patterns[3])
TILE = Tile(64, 32, 4, 2)


def launches_of(
    depth: int = 64, dtype: str = "bfloat16", args: WindowAttentionArgs = SMALL
) -> tuple[WindowLaunch, ...]:
    return window_launches(FunctionKey(args, 1, 2, depth, depth, dtype, "attention"))


@pytest.fixture(scope="module")
def kernel() -> CompiledKernel:
    """The second branch: four inputs."""
    return compile_launch(launches_of()[1], TILE)


def _preset_cases() -> list[object]:
    cases = []
    for preset in PRESETS:
        for depth in (64, 128):
            for key in keys_of_preset(preset, GivenNumbers(head_dim=depth)).keys:
                for launch in window_launches(key):
                    counts = "-".join(map(str, launch.args.pattern.splits.counts))
                    cases.append(pytest.param(launch, id=f"{preset.name}-{counts}-{launch.branch}-{depth}"))
    return cases


@pytest.mark.parametrize("launch", _preset_cases())
def test_every_preset_pattern_passes_every_gate(launch: WindowLaunch) -> None:
    made = try_tile(launch, offered_tiles(launch)[0], ARCHITECTURES, find_ptxas())
    assert isinstance(made, Tactic), made
    assert {result.verdict for result in made.gates} == {"passed"}
    assert [result.gate for result in made.gates] == [gate.name for gate in TEXT_GATES] + [
        "assembles",
        "spills",
    ] * len(ARCHITECTURES)
    assert [one.architecture for one in made.assemblies] == list(ARCHITECTURES)
    assert all(0 < one.registers <= 255 for one in made.assemblies)
    assert len(entry_parameters(made.kernel.ptx)) == 4 + launch.averages


DOCTORED: dict[str, list[tuple[Callable[[str], str], str]]] = {
    "entry": [
        (lambda ptx: ptx.replace("t3_window_attention_", "other_"), "other_"),
        (lambda ptx: ptx + "\n.visible .entry second(\n)\n{ ret; }\n", "second"),
    ],
    "parameters": [
        (
            lambda ptx: re.sub(r"(_param_4)\n\)", r"\1,\n\t.param .u32 extra\n)", ptx),
            "6 parameters, 5 of them pointers",
        ),
        (lambda ptx: re.sub(r",\n[^\n]*_param_4\n\)", "\n)", ptx), "4 parameters"),
        (lambda ptx: re.sub(r"\.u64 (\.ptr[^\n]*_param_4\n)", r".u32 \1", ptx), "5 parameters, 4 of them pointers"),
    ],
    "removed parameters": [
        (lambda ptx: ptx.replace("\tret;", "\tld.param.b64 %rd1, [K_param_5];\n\tret;"), "K_param_5"),
    ],
    "threads": [
        (lambda ptx: ptx.replace(".reqntid 128", ".reqntid 256"), "256"),
        (lambda ptx: ptx.replace(".reqntid 128", ".reqntid 128, 2"), "128,2"),
        (lambda ptx: ptx.replace(".reqntid 128", ""), "no .reqntid"),
    ],
    "PTX version": [
        (lambda ptx: ptx.replace(".version 8.0", ".version 8.1"), "8.1"),
        (lambda ptx: ptx.replace(".version 8.0", ".version 10.0"), "10.0"),
        (lambda ptx: ptx.replace(".version 8.0", ""), "no .version"),
    ],
    "target": [
        (lambda ptx: ptx.replace(".target sm_80", ".target sm_90a"), "sm_90a"),
        (lambda ptx: ptx.replace(".target sm_80", ".target sm_80, debug"), "sm_80, debug"),
    ],
    "shared memory": [
        (
            lambda ptx: ptx.replace(".visible", ".shared .align 16 .b8 more[49152];\n.visible", 1),
            " bytes",
        ),
    ],
    "source paths": [
        (lambda ptx: ptx + '\n\t.file\t1 "/home/someone/kernel.py"\n', "/home/someone/kernel.py"),
        (lambda ptx: ptx.replace("\tret;", "\t.loc\t1 7 3\n\tret;"), ".loc"),
        (lambda ptx: ptx + "\n.section .debug_info\n{\n}\n", ".section .debug_info"),
    ],
    "tensor cores": [
        (lambda ptx: ptx.replace("mma.sync", "fma.rn"), "0 of them"),
        (lambda ptx: ptx.replace(".bf16.bf16.", ".f16.f16."), "0 of them"),
    ],
    "16-byte loads": [
        (lambda ptx: ptx.replace("0x10", "0x4").replace(".v4.b32", ".b32"), "0 cp.async and 0 ld.global"),
    ],
}


def test_a_sound_kernel_passes(kernel: CompiledKernel) -> None:
    assert [result.verdict for result in check_text(kernel)] == ["passed"] * len(TEXT_GATES)
    assert set(DOCTORED) == {gate.name for gate in TEXT_GATES}


@pytest.mark.parametrize(
    ("gate", "doctor", "found"), [(name, *case) for name, cases in DOCTORED.items() for case in cases]
)
def test_a_gate_fires(kernel: CompiledKernel, gate: str, doctor: Callable[[str], str], found: str) -> None:
    doctored = replace(kernel, ptx=doctor(kernel.ptx))
    assert doctored.ptx != kernel.ptx
    failed = {result.gate: result for result in check_text(doctored) if result.verdict == "failed"}
    assert found in failed[gate].found
    with pytest.raises(KernelError) as raised:
        require_gates(doctored, [failed[gate]])
    message = str(raised.value)
    assert f"gate '{gate}' expected {failed[gate].expected}, found {failed[gate].found}" in message
    assert "pattern (1,2,3), dilated branch, on grid 2x8x12" in message
    assert "tile 64x32, 4 warps, 2 stages" in message


LOADS = "16-byte loads"


def _loads(kernel: CompiledKernel) -> tuple[str, str]:
    (result,) = [result for result in check_text(kernel) if result.gate == LOADS]
    return result.verdict, result.found


@pytest.fixture(scope="module")
def pipelined() -> CompiledKernel:
    """Many keys to a window, so that k and v are copied ahead."""
    return compile_launch(launches_of(args=LARGE)[1], TILE)


def test_narrow_copies_of_keys_and_values_are_found_out(pipelined: CompiledKernel) -> None:
    """Queries are still loaded wide."""
    assert _loads(pipelined) == ("passed", "8 cp.async and 8 ld.global of 16 bytes, 0 narrower")
    for count, found in ((0, "0 cp.async and 8 ld.global of 16 bytes, 8 n"), (1, "7 cp.async and 8 ld.global")):
        narrowed = re.sub(r"(cp\.async\.c)g([^;]*), 0x10", r"\1a\2, 0x4", pipelined.ptx, count=count)
        verdict, text = _loads(replace(pipelined, ptx=narrowed))
        assert verdict == "failed"
        assert found in text
    waiting = re.sub(r"cp\.async\.cg\.[^;]*;", "", pipelined.ptx)
    assert _loads(replace(pipelined, ptx=waiting)) == ("failed", "0 cp.async and 8 ld.global of 16 bytes, 0 narrower")
    assert _loads(replace(pipelined, ptx=waiting, tile=replace(TILE, stages=1)))[0] == "passed"


def test_a_mask_is_loaded_by_the_element_and_keys_are_not() -> None:
    launch = replace(launches_of(args=replace(LARGE, prefix=3))[1], mask=MaskLayout("float32", 0, 0, 0, 1))
    masked = compile_launch(launch, Tile(32, 32, 4, 2))
    verdict, found = _loads(masked)
    assert verdict == "passed"
    assert not found.endswith(" 0 narrower")
    assert _loads(replace(masked, ptx=masked.ptx.replace("0x10", "0x4")))[0] == "failed"


def test_tiles_with_little_for_each_thread_are_loaded_by_8_bytes() -> None:
    small = compile_launch(launches_of(depth=16, args=LARGE)[1], Tile(128, 64, 8, 3))
    verdict, found = _loads(small)
    assert verdict == "passed"
    assert found.endswith(" of 8 bytes, 0 narrower")
    assert _loads(replace(small, ptx=re.sub(r"(cp\.async[^;]*), 0x8", r"\1, 0x4", small.ptx)))[0] == "failed"


def test_dynamic_shared_memory_counts(kernel: CompiledKernel) -> None:
    for shared, verdict in ((49_152, "passed"), (49_153, "failed")):
        results = {result.gate: result for result in check_text(replace(kernel, shared_bytes=shared))}
        assert results["shared memory"].verdict == verdict


def test_gates_that_do_not_apply_say_why() -> None:
    results = {r.gate: r for r in check_text(compile_launch(launches_of(dtype="float32")[0], Tile(32, 16, 8, 1)))}
    assert results["tensor cores"].verdict == "not applicable"
    assert "float32 products are exact" in results["tensor cores"].found
    assert results["16-byte loads"].verdict == "passed"
    results = {r.gate: r for r in check_text(compile_launch(launches_of(depth=20)[0], TILE))}
    assert results["16-byte loads"].verdict == "not applicable"
    assert "rows of 40 and 40 bytes" in results["16-byte loads"].found
    assert results["tensor cores"].verdict == "passed"


def test_unaligned_pointers_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate over loads sees what a compiler makes of pointers that it knows nothing of."""
    import triton.compiler

    sound = triton.compiler.ASTSource
    monkeypatch.setattr(triton.compiler, "ASTSource", lambda *given: sound(*given[:3]))
    kernel = compile_launch.__wrapped__(launches_of()[0], TILE)
    assert [result.gate for result in check_text(kernel) if result.verdict == "failed"] == ["16-byte loads"]


def test_ptxas_gates_fire_on_its_words(kernel: CompiledKernel) -> None:
    ptxas = find_ptxas()
    refused = assemble(kernel.ptx.replace("mma.sync", "mma.sunk"), 80, ptxas)
    assert "Unknown modifier '.sunk'" in refused.error
    (result,) = check_assemblies([refused])
    assert (result.gate, result.verdict) == ("assembles", "failed")
    with pytest.raises(KernelError, match=r"gate 'assembles' expected ptxas takes it for sm_80, found .*sunk"):
        require_gates(kernel, [result])
    assert "sm_33" in assemble(kernel.ptx, 33, ptxas).error
    assert read_assembly(80, 0, "").error == "ptxas said nothing of registers and spills"
    results = check_assemblies([Assembly(90, 255, 8, 0, 4)])
    assert [(r.gate, r.verdict, r.found) for r in results][1] == ("spills", "failed", "0 bytes stored, 4 loaded")


def test_a_tile_that_spills_is_dropped() -> None:
    """Real spills: float32 in a tile of 64 x 32 with 4 warps."""
    dropped = try_tile(launches_of(64, "float32", LARGE)[1], Tile(64, 32, 4, 1), (90,), find_ptxas())
    assert isinstance(dropped, DroppedTile)
    assert dropped.result.gate == "spills"
    assert "gate 'spills' expected none on sm_90, found" in str(dropped)


def test_a_tile_with_too_much_shared_memory_is_dropped() -> None:
    dropped = try_tile(launches_of(128, args=LARGE)[1], Tile(64, 64, 4, 2), (90,), find_ptxas())
    assert isinstance(dropped, DroppedTile)
    assert dropped.result.gate == "shared memory"


@pytest.mark.parametrize(("depth", "dtype"), [(32, "float16"), (128, "float32"), (256, "bfloat16"), (256, "float32")])
def test_other_depths_and_dtypes_have_a_tile(depth: int, dtype: str) -> None:
    """On uneven windows with tokens outside the grid, the largest kernel."""
    uneven = WindowAttentionArgs(TokenGrid(3, 8, 13), WindowPattern(Splits(2, 3, 4)), 2, 5)
    launch = launches_of(depth, dtype, uneven)[1]
    tiles = offered_tiles(launch) + smaller_tiles(launch)
    tried = (try_tile(launch, tile, (80, 120), find_ptxas()) for tile in tiles)
    assert any(isinstance(one, Tactic) for one in tried)


@pytest.mark.parametrize(("depth", "dtype"), [(257, "float16"), (64, "float64")])
def test_what_has_no_tile_is_named(depth: int, dtype: str) -> None:
    with pytest.raises(KernelError, match=rf"pattern \(1,2,3\).*2 heads of {depth}, {dtype}.*head dims up to 256"):
        offered_tiles(launches_of(depth, dtype)[0])


@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_masked_launches_take_one_more_pointer(dtype: str) -> None:
    args = replace(SMALL, prefix=3, query_prefix=3)
    launch = replace(launches_of(args=args)[1], mask=MaskLayout(dtype, 0, 0, 0, 1))
    made = try_tile(launch, Tile(32, 32, 4, 2), (80,), find_ptxas())
    assert isinstance(made, Tactic), made
    assert len(entry_parameters(made.kernel.ptx)) == 6


HEADER = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1,\n\t.param .u64 k_param_10\n)\n"
BODY = "{ ld.param.b64 %rd1, [k_param_0]; ret; }"


def test_scratch_parameters_go() -> None:
    stripped = strip_parameters(HEADER + BODY, 1)
    assert entry_parameters(stripped) == (".param .u64 k_param_0",)
    assert stripped.endswith(BODY)
    assert strip_parameters(HEADER + BODY, 3).count(".param") == (HEADER + BODY).count(".param")


@pytest.mark.parametrize(
    ("ptx", "keep", "message"),
    [
        (HEADER + BODY.replace("k_param_0", "k_param_1"), 1, "scratch parameter k_param_1 never to be read, found 1"),
        (HEADER + BODY.replace("k_param_0", "k_param_10"), 2, "scratch parameter k_param_10 never to be read"),
        (HEADER.replace(".u64 k_param_10", ".u32 k_param_10") + BODY, 1, "expected pointers behind the 1 parameters"),
        (HEADER + BODY, 4, "expected 4 entry parameters, found 3"),
        (BODY, 1, "expected one entry in the PTX, found 0"),
    ],
)
def test_parameters_that_are_used_stay_loudly(ptx: str, keep: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        strip_parameters(ptx, keep)


@pytest.mark.parametrize("name", ["global_scratch_size", "profile_scratch_size"])
def test_scratch_memory_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compile_kernel._compile

    def greedy(*given: object) -> object:
        compiled = real(*given)
        compiled.metadata = compiled.metadata._replace(**{name: 128})
        return compiled

    monkeypatch.setattr(compile_kernel, "_compile", greedy)
    with pytest.raises(KernelError, match=f"pattern .* tile 64x32.*: expected {name} 0, found 128 bytes"):
        compile_launch.__wrapped__(launches_of()[0], TILE)
