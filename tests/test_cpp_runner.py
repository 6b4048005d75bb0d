"""docs/cpp: the manifest reader against Python's json, the program against a fake of the runtime it calls, and its
sources against TensorRT's own headers where they are. No TensorRT and no GPU ran here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "docs" / "cpp"
FAKE = Path(__file__).parent / "fake_tensorrt_headers"
VERSION, CAPABILITY = "10.13.3.9", "9.0"
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or $CXX)")


def _compile(*arguments: str | Path) -> None:
    done = subprocess.run([str(COMPILER), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the manifest reader -------------------------------------------------------------------------

# Prints each line of stdin, a JSON document, as JsonReader understands it.
_ECHO = r"""
#include <iostream>
#include "manifest.h"
using t3compile::Json;

static void show_string(const std::string& text) {
    std::cout << '"';
    for (const char c : text) {
        char hex[3];
        std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        std::cout << hex;
    }
    std::cout << '"';
}

static void show(const Json& json) {
    const char* separator = "";
    switch (json.kind) {
        case Json::Kind::null: std::cout << "null"; break;
        case Json::Kind::boolean: case Json::Kind::number: std::cout << json.text; break;
        case Json::Kind::string: show_string(json.text); break;
        case Json::Kind::array:
            std::cout << '[';
            for (const Json& item : json.items) { std::cout << separator; show(item); separator = ","; }
            std::cout << ']';
            break;
        case Json::Kind::object:
            std::cout << '{';
            for (const auto& [key, value] : json.members) {
                std::cout << separator; show_string(key); std::cout << ':'; show(value); separator = ",";
            }
            std::cout << '}';
    }
}

int main() {
    std::string line;
    while (std::getline(std::cin, line)) {
        try { const Json json = t3compile::JsonReader::read(line); show(json); std::cout << "\n"; }
        catch (const t3compile::Error& error) { std::cout << "error: " << error.what() << "\n"; }
    }
}
"""


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "echo.cpp").write_text(_ECHO)
    _compile(*WARNINGS, f"-I{SOURCES}", folder / "echo.cpp", "-o", folder / "echo")
    return folder / "echo"


def _read(echo: Path, documents: Sequence[str | bytes]) -> list[str]:
    lines = b"\n".join(one if isinstance(one, bytes) else one.encode() for one in documents) + b"\n"
    done = subprocess.run([echo], input=lines, capture_output=True, check=True)
    answers = done.stdout.decode().splitlines()
    assert len(answers) == len(documents)
    return answers


def _hex(text: str) -> str:
    return f'"{text.encode().hex()}"'


def _canonical(value: Any) -> str:
    """What the echo program prints, from Python's reading."""
    match value:
        case dict():
            pairs = sorted((key.encode(), key) for key in value)
            return "{" + ",".join(f"{_hex(key)}:{_canonical(value[key])}" for _, key in pairs) + "}"
        case list():
            return "[" + ",".join(map(_canonical, value)) + "]"
        case str():
            return _hex(value)
        case None | True | False:
            return json.dumps(value)
        case _:
            return value.text


class _Number:
    """A number by its own text, as the reader keeps it."""

    def __init__(self, text: str) -> None:
        self.text = text


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


@needs_compiler
@settings(max_examples=25, deadline=None, derandomize=True)
@given(values=st.lists(_VALUES, min_size=40, max_size=60), ascii_only=st.booleans())
def test_json_is_read_as_python_reads_it(echo: Path, values: list[Any], ascii_only: bool) -> None:
    documents = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    expected = [_canonical(json.loads(text, parse_int=_Number, parse_float=_Number)) for text in documents]
    assert _read(echo, documents) == expected


@needs_compiler
def test_json_by_hand(echo: Path) -> None:
    documents = [
        r' { "a\/\b\f\n\r\t\"\\" : [ -0 , 1.50E+3 ] , "a" : null }' + "\t",
        r'"\ud83d\ude00é\u00e9"',
        '{"a":1,"a":2}',
    ]
    assert _read(echo, documents) == [
        "{" + _hex("a") + ":null," + _hex('a/\b\f\n\r\t"\\') + ":[-0,1.50E+3]}",
        _hex("\U0001f600éé"),
        "{" + _hex("a") + ":2}",
    ]


@needs_compiler
def test_what_is_not_json_is_refused(echo: Path) -> None:
    documents = (
        *(
            "",
            "{",
            "[1,]",
            '{"a":1,}',
            '{"a" 1}',
            "{a:1}",
            "[1 2]",
            "01",
            "1.",
            ".5",
            "1e",
            "+1",
            "-",
            "NaN",
            "nul",
            "tru",
        ),
        *(
            '"',
            '"\t"',
            r'"\x"',
            r'"\u12"',
            r'"\u12g4"',
            r'"\ud800"',
            r'"\ud800A"',
            r'"\udc00"',
            "[]]",
            "1 1",
            "'a'",
            "[" * 200,
        ),
        *("{}x", '{"a":}', "[,]", "{,}", "Infinity"),
    )
    for document, answer in zip(documents, _read(echo, documents), strict=True):
        assert answer.startswith("error: the manifest is not JSON: "), (document, answer)
        assert " at byte " in answer


# --- the program, on a fake runtime --------------------------------------------------------------

TENSORS = {
    "inputs": [
        {"name": "latents", "shape": [1, 3, 4], "dtype": "float32"},
        {"name": "timestep", "shape": [2], "dtype": "int64"},
    ],
    "outputs": [
        {"name": "output_0", "shape": [4, 3], "dtype": "float32"},
        {"name": "output_1", "shape": [8], "dtype": "bfloat16"},
    ],
}
PLAN = "input latents 0 1 3 4\ninput timestep 8 2\noutput output_0 0 4 3\noutput output_1 7 8\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "run_engine"
    _compile(*WARNINGS, "-fsanitize=address,undefined", f"-I{FAKE}", SOURCES / "run_engine.cpp", "-o", path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_text(PLAN)
    _write_manifest(path)
    generator = np.random.default_rng(0)
    generator.standard_normal((1, 3, 4), dtype=np.float32).tofile(tmp_path / "latents.bin")
    np.array([2**40, -7], dtype=np.int64).tofile(tmp_path / "timestep.bin")
    return path


def _write_manifest(engine: Path, **changes: Any) -> None:
    manifest = {
        "format": 1,
        "tensorrt_version": VERSION,
        "compute_capability": CAPABILITY,
        "engine_bytes": engine.stat().st_size,
        "stripped": False,
        "plan": {"sites": [{"é": None}]},
        **TENSORS,
        **changes,
    }
    text = json.dumps({key: value for key, value in manifest.items() if value is not None})
    engine.with_name(engine.name + ".manifest.json").write_text(text)


def _run(
    program: Path, engine: Path, *arguments: str, tensorrt: str = VERSION, capability: str | None = CAPABILITY
) -> subprocess.CompletedProcess[str]:
    environment = {"FAKE_TENSORRT": tensorrt, "ASAN_OPTIONS": "detect_leaks=0"}
    if capability is not None:
        environment["FAKE_CAPABILITY"] = capability
    given = arguments or ("latents=latents.bin", "timestep=timestep.bin")
    command = [str(program), engine.name, *given]
    return subprocess.run(command, cwd=engine.parent, env=environment, capture_output=True, text=True, check=False)


def _refusal(*arguments: Any, **options: Any) -> str:
    done = _run(*arguments, **options)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@needs_compiler
def test_inputs_go_in_and_outputs_come_out_by_name(program: Path, engine: Path) -> None:
    (engine.parent / "out").mkdir()
    # In another order than the engine's.
    given = ("--repeat", "3", "timestep=timestep.bin", "--output", "out", "latents=latents.bin")
    done = _run(program, engine, *given)
    assert done.returncode == 0, done.stderr
    folder = engine.parent / "out"
    assert sorted(file.name for file in folder.iterdir()) == ["output_0.bin", "output_1.bin"]
    assert (folder / "output_0.bin").read_bytes() == (engine.parent / "latents.bin").read_bytes()[::-1]
    assert (folder / "output_1.bin").read_bytes() == (engine.parent / "timestep.bin").read_bytes()[::-1]
    assert done.stdout.splitlines() == [
        "out/output_0.bin: float32 [4, 3]",
        "out/output_1.bin: bfloat16 [8]",
        "median 1.5 ms, fastest 1.5 ms over 3 calls",
    ]


@needs_compiler
def test_a_version_of_three_numbers_is_enough(program: Path, engine: Path) -> None:
    _write_manifest(engine, tensorrt_version="10.13.3")
    assert _run(program, engine).returncode == 0
    _write_manifest(engine, tensorrt_version="10.13.30")
    assert "TensorRT 10.13.30 and this is TensorRT 10.13.3.9" in _refusal(program, engine)


@needs_compiler
def test_an_engine_built_elsewhere_is_refused_with_both_values(program: Path, engine: Path) -> None:
    refusal = _refusal(program, engine, tensorrt="10.16.1.2")
    assert "TensorRT 10.13.3.9 and this is TensorRT 10.16.1.2" in refusal
    assert "this is TensorRT 10.13.3.90" in _refusal(program, engine, tensorrt="10.13.3.90")
    refusal = _refusal(program, engine, capability="12.0")
    assert "compute capability 9.0 and this GPU has 12.0" in refusal
    assert "no CUDA-capable device" in _refusal(program, engine, capability=None)


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": None}, "the manifest has no 'inputs'"),
        ({"format": 2}, "the manifest has format 2, this program reads 1"),
        ({"stripped": True}, "the engine has no weights"),
        ({"stripped": "no"}, "'stripped' of the manifest is neither true nor false"),
        ({"engine_bytes": 7}, f"has {len(PLAN)} bytes and its manifest describes 7"),
        ({"tensorrt_version": 10}, "'tensorrt_version' of the manifest is not a string"),
        ({"outputs": [{**TENSORS["outputs"][0], "shape": [4, -3]}]}, "'output_0' has dimension -3"),
        ({"outputs": [{**TENSORS["outputs"][0], "shape": [2**62, 2**62]}]}, "larger than memory"),
        ({"outputs": [{**TENSORS["outputs"][0], "shape": [1.5]}]}, "not a 64-bit integer"),
        ({"outputs": [{**TENSORS["outputs"][0], "dtype": "complex64"}]}, "dtype 'complex64' is unknown"),
        ({"outputs": [{**TENSORS["outputs"][0], "name": "../../x"}]}, "'../../x' cannot be a tensor's name"),
        ({"outputs": TENSORS["outputs"][:1]}, "the engine has 4 inputs and outputs, the manifest 3"),
        (
            {"outputs": [{**TENSORS["outputs"][0], "shape": [3, 4]}, TENSORS["outputs"][1]]},
            "float32 [4, 3] in the engine and float32 [3, 4] in the manifest",
        ),
        (
            {"outputs": [TENSORS["outputs"][0], {**TENSORS["outputs"][1], "dtype": "float16"}]},
            "bfloat16 [8] in the engine and float16 [8] in the manifest",
        ),
        (
            {"outputs": [TENSORS["outputs"][0], {**TENSORS["outputs"][1], "name": "other"}]},
            "no such input or output as the manifest's 'other'",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, program: Path, engine: Path
) -> None:
    _write_manifest(engine, **changes)
    assert reason in _refusal(program, engine)
    assert not list(engine.parent.glob("output*"))


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("latents=latents.bin",), "input 'timestep' is missing: int64 [2]"),
        (
            ("latents=latents.bin", "timestep=latents.bin"),
            "'latents.bin' has 48 bytes, and the input 'timestep' needs 16",
        ),
        (("latents=nothing.bin", "timestep=timestep.bin"), "cannot read 'nothing.bin'"),
        (("latents=latents.bin", "timestep=timestep.bin", "mask=x"), "the engine has no input 'mask'"),
        (
            ("latents=latents.bin", "timestep=timestep.bin", "--output", "no/where"),
            "cannot write 'no/where/output_0.bin'",
        ),
        (("latents=latents.bin", "timestep=timestep.bin", "--repeat", "0"), "--repeat is '0', expected 1 or more"),
        (("latents=latents.bin", "--repeat"), "--repeat needs a value"),
        (("latents",), "'latents' is not NAME=FILE"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[str, ...], reason: str, program: Path, engine: Path
) -> None:
    assert reason in _refusal(program, engine, *arguments)


@needs_compiler
def test_files_that_are_no_engine_are_refused(program: Path, engine: Path) -> None:
    engine.write_text("damaged\n")
    _write_manifest(engine)
    done = _run(program, engine)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "TensorRT: this is no engine",
        "error: TensorRT cannot load 'model.engine'; its messages are above",
    ]
    engine.write_text(PLAN.replace("input timestep", "host timestep"))
    _write_manifest(engine)
    assert "'timestep' is a shape tensor on the host" in _refusal(program, engine)
    engine.with_name("model.engine.manifest.json").unlink()
    assert "cannot read 'model.engine.manifest.json'" in _refusal(program, engine)


# --- against the real headers --------------------------------------------------------------------


def _folder_of(header: str, *candidates: str | None) -> Path | None:
    return next((Path(one) for one in candidates if one and (Path(one) / header).is_file()), None)


@needs_compiler
def test_the_program_compiles_against_tensorrt(tmp_path: Path) -> None:
    """Types and signatures only: it is not linked and not run."""
    cuda = _folder_of("cuda_runtime_api.h", os.environ.get("CUDA_INCLUDE"), "/usr/local/cuda/include", "/usr/include")
    tensorrt = _folder_of(
        "NvInferRuntime.h",
        os.environ.get("TENSORRT_INCLUDE"),
        "/usr/include/x86_64-linux-gnu",
        "/usr/include/aarch64-linux-gnu",
        "/usr/local/tensorrt/include",
        "/usr/local/TensorRT/include",
        "/usr/include",
    )
    if tensorrt is None:
        pytest.skip("TensorRT's headers are not here: set TENSORRT_INCLUDE to the folder of NvInferRuntime.h")
    if cuda is None:
        pytest.skip("the CUDA runtime's headers are not here: set CUDA_INCLUDE to the folder of cuda_runtime_api.h")
    includes = ("-isystem", tensorrt, "-isystem", cuda)
    _compile(*WARNINGS, *includes, "-c", SOURCES / "run_engine.cpp", "-o", tmp_path / "run_engine.o")
    assert (tmp_path / "run_engine.o").stat().st_size > 0
