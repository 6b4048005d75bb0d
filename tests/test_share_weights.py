"""An ONNX file that shares its weights: it points at the checkpoint's own bytes, and runs as if they were its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import save_file
from torch import Tensor, nn

import t3compile
from t3compile import files
from t3compile.errors import OutputError, WeightsError
from t3compile.export import store_weights
from t3compile.inputs import named_inputs
from t3compile.pipeline import ExportReport, export_onnx_report, load_engine, load_program
from t3compile.program import Program
from t3compile.weights import CastWeights, Weights
from tests.sharded import SIZE, shard, write_folder
from tests.tiny_models import tiny_wan

pytest.importorskip("diffusers")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return tiny_wan(layers=1, heads=2, head_dim=24, ffn_dim=64)[0]


@pytest.fixture(scope="module")
def folder(wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("disk") / "wan", wan)


@pytest.fixture(scope="module")
def rewritten(folder: Path) -> Program:
    program = load_program(folder, size=SIZE)
    return t3compile.rewrite(program, t3compile.make_plan(t3compile.detect(program), [(1, 2, 2)]))


@pytest.fixture(scope="module")
def written(rewritten: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t3compile.export_onnx(rewritten, tmp_path_factory.mktemp("own") / "model.onnx", check=False)


def _external(path: Path) -> dict[str, ExternalDataInfo]:
    model = onnx.load(path, load_external_data=False)
    return {x.name: ExternalDataInfo(x) for x in model.graph.initializer if x.external_data}


def _bytes(path: Path, info: ExternalDataInfo) -> bytes:
    with (path.parent / info.location).open("rb") as file:
        file.seek(int(info.offset or 0))
        return file.read(int(info.length or 0))


def _run(path: Path, inputs: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output: np.ndarray[Any, Any] = session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]
    return output


def _assert_shared(report: ExportReport, path: Path, wan: nn.Module, rewritten: Program, written: Path) -> None:
    storage = report.storage
    assert storage is not None
    state = wan.state_dict()
    at_checkpoint = {name: info for name, info in _external(path).items() if not info.location.endswith(".data")}
    assert storage.shared_tensors == len(at_checkpoint) > 10
    assert storage.shared_bytes == sum(int(info.length) for info in at_checkpoint.values())
    for name, info in at_checkpoint.items():
        assert _bytes(path, info) == state[name].numpy().tobytes(), name
    # Everything of at least 1 KiB that is stored as it was.
    large = {name for name, x in state.items() if x.numel() * 4 >= 1024}
    assert large - set(at_checkpoint) <= {"rope.freqs_cos", "rope.freqs_sin"}
    inputs = {name: torch.randn_like(x) for name, x in named_inputs(rewritten).items()}
    assert np.array_equal(_run(path, inputs), _run(written, inputs))


def test_links_beside_the_file_serve_a_checkpoint_elsewhere(
    wan: nn.Module, folder: Path, rewritten: Program, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx_report(rewritten, path, share_weights=True, check=True)
    assert report.passed
    assert report.storage is not None
    assert {file.how for file in report.storage.shared_files} == {"hard link"}
    assert any("onnx.checker refuse" in note for note in report.notes)
    for number in (1, 2, 3):
        assert os.path.samefile(shard(folder, number), path.parent / f"model.onnx.{shard(folder, number).name}")
    _assert_shared(report, path, wan, rewritten, written)
    # Written again over itself, and read by the engine that follows data only inside the folder.
    export_onnx_report(rewritten, path, share_weights=True, check=False)
    load_engine(path)
    assert sorted(x.name for x in tmp_path.iterdir() if x.name.startswith(".")) == []


def test_a_checkpoint_in_the_folder_is_used_in_place(
    wan: nn.Module, rewritten: Program, written: Path, tmp_path: Path
) -> None:
    program = load_program(write_folder(tmp_path / "wan", wan), size=SIZE)
    rewritten = t3compile.rewrite(program, rewritten.plan or pytest.fail("no plan"))
    path = tmp_path / "model.onnx"
    report = export_onnx_report(rewritten, path, share_weights=True, check=False)
    assert report.storage is not None
    assert {file.how for file in report.storage.shared_files} == {"in place"}
    in_place = {f"wan/{shard(tmp_path / 'wan', i).name}" for i in (1, 2, 3)}
    assert {file.location for file in report.storage.shared_files} == in_place
    assert sum(x.stat().st_size for x in tmp_path.iterdir() if x.is_file()) < 0.5 * rewritten.weight_bytes + 300_000
    _assert_shared(report, path, wan, rewritten, written)
    onnx.checker.check_model(str(path), full_check=True)
    onnx.load(path)


def test_where_links_are_impossible_files_are_copied_and_that_is_said(
    wan: nn.Module, folder: Path, rewritten: Program, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(store_weights.os, "link", refuse)
    path = tmp_path / "model.onnx"
    report = export_onnx_report(rewritten, path, share_weights=True, check=False)
    assert report.storage is not None
    assert {file.how for file in report.storage.shared_files} == {"copy"}
    assert any("were copied" in note for note in report.notes)
    _assert_shared(report, path, wan, rewritten, written)
    needed = store_weights.needed_bytes(rewritten, path, share=True)
    assert needed >= sum(shard(folder, i).stat().st_size for i in (1, 2, 3))


def _one_file(wan: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in wan.state_dict().items()}, path)
    return path


def test_written_data_never_goes_into_a_checkpoint(
    wan: nn.Module, folder: Path, rewritten: Program, written: Path, tmp_path: Path
) -> None:
    """A file called 'data' would be linked under the very name that the other weights are written to."""
    weights = _one_file(wan, tmp_path / "data")
    before = weights.read_bytes()
    program = load_program(folder, size=SIZE, weights=weights)
    path = tmp_path / "out" / "model.onnx"
    path.parent.mkdir()
    report = export_onnx_report(replace(rewritten, weights=program.weights), path, share_weights=True, check=False)
    assert weights.read_bytes() == before
    assert report.storage is not None
    assert report.storage.shared_tensors > 10
    inputs = named_inputs(rewritten)
    assert np.array_equal(_run(path, inputs), _run(written, inputs))


@pytest.mark.parametrize("share", [True, False])
def test_a_checkpoint_in_the_place_of_the_data_is_kept(
    wan: nn.Module, folder: Path, tmp_path: Path, share: bool
) -> None:
    weights = _one_file(wan, tmp_path / "model.onnx.data")
    before = weights.read_bytes()
    program = load_program(folder, size=SIZE, weights=weights)
    with pytest.raises(OutputError, match=r"cannot write '.*model.onnx.data': the model's weights are read from it"):
        t3compile.export_onnx(program, tmp_path / "model.onnx", share_weights=share, check=False)
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx.data"]
    assert weights.read_bytes() == before


def test_what_is_to_be_pointed_into_is_not_replaced(wan: nn.Module, tmp_path: Path) -> None:
    program = load_program(write_folder(tmp_path / "wan", wan), size=SIZE)
    path = shard(tmp_path / "wan", 2)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="weights are read from it"):
        t3compile.export_onnx(program, path, share_weights=True, check=False)
    with pytest.raises(OutputError, match="weights are read from it"):
        program.check_savable(path, external=True)
    with pytest.raises(OutputError, match="weights are read from it"):
        program.save(path, external=True)
    assert path.read_bytes() == before


def test_two_files_of_one_name_get_two_links(wan: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Also where the name of the second link is a checkpoint's of that folder."""
    state = {name: x.contiguous() for name, x in wan.state_dict().items()}
    out = tmp_path / "out"
    files = [tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors", out / "model.onnx.1.x.safetensors"]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: state[name] for name in list(state)[number::3]}, file)
    before = [file.read_bytes() for file in files]
    program = load_program(folder, size=SIZE, weights=files)
    report = export_onnx_report(program, out / "model.onnx", share_weights=True, check=True)
    assert report.storage is not None
    assert len({file.location for file in report.storage.shared_files}) == 3
    assert report.passed
    assert [file.read_bytes() for file in files] == before


def test_files_are_found_again_from_another_working_folder(
    wan: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "wan", wan)
    monkeypatch.chdir(tmp_path)
    program = load_program("wan", size=SIZE)
    monkeypatch.chdir("/")
    program.save(tmp_path / "model.pt2", external=True)
    report = export_onnx_report(program, tmp_path / "model.onnx", share_weights=True, check=False)
    assert report.storage is not None
    assert report.storage.shared_tensors > 10


def test_tensors_between_elements_are_written(wan: nn.Module, folder: Path, tmp_path: Path) -> None:
    """safetensors allows any beginning; runtimes read whole elements where they are mapped."""
    path = _one_file(wan, tmp_path / "odd.safetensors")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    program = load_program(folder, size=SIZE, weights=path)
    report = export_onnx_report(program, tmp_path / "model.onnx", share_weights=True, check=True)
    assert report.passed
    assert report.storage is not None
    assert report.storage.shared_tensors == 0
    assert report.storage.not_shared["not at a multiple of its element's size"] > 100_000


@pytest.mark.parametrize("end", [9000, 100])
def test_a_checkpoint_cut_off_after_loading_is_one_error(wan: nn.Module, tmp_path: Path, end: int) -> None:
    """Whether a large weight is read, or a small one in the midst of onnx_ir's work."""
    program = load_program(write_folder(tmp_path / "wan", wan, shards=1), size=SIZE)
    os.truncate(shard(tmp_path / "wan"), end)
    with pytest.raises(WeightsError, match="was cut off at byte"):
        t3compile.export_onnx(program, tmp_path / "model.onnx", check=False)
    assert [x.name for x in tmp_path.iterdir()] == ["wan"]


def test_a_small_weight_that_cannot_be_read_is_one_error(wan: nn.Module, tmp_path: Path) -> None:
    program = load_program(write_folder(tmp_path / "wan", wan, shards=1), size=SIZE)
    # The exporter asks for it while it writes the graph.
    weights = _Unreadable(program.weights, "condition_embedder.time_embedder.linear_1.bias")
    with pytest.raises(WeightsError, match="cut off"):
        t3compile.export_onnx(replace(program, weights=weights), tmp_path / "model.onnx", check=False)


class _Unreadable(CastWeights):
    def __init__(self, source: Weights, name: str) -> None:
        super().__init__(source, {})
        object.__setattr__(self, "name", name)

    def load(self, name: str) -> Tensor:
        if name == self.name:  # type: ignore[attr-defined]
            raise WeightsError("it was cut off")
        return super().load(name)


def test_what_is_converted_is_written_and_counted(rewritten: Program, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    report = export_onnx_report(rewritten, path, share_weights=True, precision="float16", check=False)
    storage = report.storage
    assert storage is not None
    assert storage.written_bytes == sum(storage.not_shared.values()) > 0
    assert storage.not_shared["converted when read, or in no safetensors file"] > 10_000
    infos = _external(path)
    assert storage.written_tensors == sum(info.location == "half.onnx.data" for info in infos.values())
    assert storage.shared_tensors + storage.written_tensors == len(infos)


def test_a_checkpoint_that_was_replaced_is_not_shared(wan: nn.Module, tmp_path: Path) -> None:
    program = load_program(write_folder(tmp_path / "wan", wan), size=SIZE)
    path = shard(tmp_path / "wan")
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)
    with pytest.raises(WeightsError, match="was changed while it was used"):
        t3compile.export_onnx(program, tmp_path / "model.onnx", share_weights=True, check=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["wan"]


def test_written_weights_are_stored_transposed_and_named(wan: nn.Module, written: Path) -> None:
    """Runtimes that fold nothing must not transpose at every call."""
    model = onnx.load(written)
    state = wan.state_dict()
    transposed = [x for x in model.graph.initializer if x.name.endswith(".transposed")]
    assert len(transposed) > 8
    for x in transposed:
        assert np.array_equal(onnx.numpy_helper.to_array(x), state[x.name.removesuffix(".transposed")].numpy().T)
    names = {x.name for x in model.graph.initializer}
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in names]


# -- room, and what is left behind --


def _full(path: Path, **_: Any) -> Any:
    return os.statvfs(path) and type("Usage", (), {"free": 1000})()


@pytest.mark.parametrize("external", [False, True])
def test_room_is_checked_before_the_work(
    rewritten: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", _full)
    monkeypatch.setattr("t3compile.pipeline.ONNX_LEGALIZATION", _AnyWork())
    if external:
        rewritten.check_savable(tmp_path / "out.pt2", external=True)
    else:
        with pytest.raises(OutputError, match=r"it needs .* free; make room"):
            rewritten.check_savable(tmp_path / "out.pt2")
        with pytest.raises(OutputError, match=r"it needs .* free; make room"):
            t3compile.export_onnx(rewritten, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


class _AnyWork:
    def __iter__(self) -> Any:
        raise AssertionError("worked before looking for room")


_LIMITED = """
import resource, sys
from t3compile.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["t3compile", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("command", ["rewrite", "export"])
def test_a_write_that_fails_leaves_nothing(folder: Path, written: Path, tmp_path: Path, command: str) -> None:
    """A limit on the size of files stands in for a disk that fills up."""
    size = ["--frames", "5", "--height", "64", "--width", "64", "--text-tokens", "5"]
    options = ["--no-verify", "--schedule", "1,2,2"] if command == "rewrite" else ["--no-check"]
    output = tmp_path / "out"
    arguments = [command, str(folder), *size, "-o", str(output), *options]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, "60000", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "File too large" in error
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_json(rewritten: Program, tmp_path: Path) -> None:
    report = export_onnx_report(rewritten, tmp_path / "model.onnx", share_weights=True, check=False)
    weights = json.loads(json.dumps(report.to_json()))["weights"]
    assert weights["shared_bytes"] > weights["written_bytes"]
    assert len(weights["shared_files"]) == 3
