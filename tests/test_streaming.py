"""Weights are streamed: files hold the same bytes as torch's own, and no process holds a model's weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import t3compile
from t3compile.errors import T3CompileError, WeightsError
from t3compile.loading import load_diffusers as load_diffusers_module
from t3compile.mapped_files import map_safetensors
from t3compile.pipeline import load_program
from t3compile.program import trace
from tests.sharded import SIZE, shard, write_folder
from tests.tiny_models import tiny_wan

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return tiny_wan(layers=1)[0]


@pytest.fixture(scope="module")
def folder(wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("wan"), wan)


class Odd(nn.Module):
    """Weights of every form: tied, transposed in memory, a slice, scalar, empty, whole numbers, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, 6))
        self.tied = self.a
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.sliced = nn.Parameter(torch.randn(4, 12)[:, ::2])
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.narrow = nn.Parameter(torch.randn(4, 6).bfloat16())
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("counts", torch.arange(6))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.a + self.tied + self.transposed + self.sliced + self.narrow.float()
        return x @ weights.t() * self.scalar + self.counts.sum() + self.none.sum()  # type: ignore[operator]


def _records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_an_archive_is_what_torch_writes(tmp_path: Path) -> None:
    program = trace(Odd(), (torch.randn(2, 6),))
    ours = program.save(tmp_path / "ours.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the slice
        torch.export.save(program.with_weights(), tmp_path / "torchs.pt2")
    assert set(_records(tmp_path / "torchs.pt2")) == set(_records(ours))
    expected = torch.export.load(tmp_path / "torchs.pt2")
    for loaded in (torch.export.load(ours), load_program(ours).exported):
        assert list(loaded.state_dict) == list(program.exported.state_dict)
        for name, tensor in expected.state_dict.items():
            assert torch.equal(loaded.state_dict[name], tensor), name
            assert type(loaded.state_dict[name]) is type(tensor)
            assert loaded.state_dict[name].requires_grad == tensor.requires_grad
        x = torch.randn(2, 6)
        assert torch.equal(loaded.module()(x), expected.module()(x))
    config = json.loads(_records(ours)["data/weights/model_weights_config.json"])["config"]
    assert config["a"]["path_name"] == config["tied"]["path_name"]


def test_every_weight_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    path = trace(Odd(), (torch.randn(2, 6),)).save(tmp_path / "odd.pt2")
    reader = torch._C.PyTorchFileReader(str(path))
    offsets = [reader.get_record_offset(name) for name in reader.get_all_records() if "weight_" in name]
    assert len(offsets) == 7
    assert all(offset % 64 == 0 for offset in offsets)


def test_a_sharded_model_is_saved_bit_for_bit(wan: nn.Module, folder: Path, tmp_path: Path) -> None:
    path = load_program(folder, size=SIZE).save(tmp_path / "wan.pt2")
    again = load_program(path).save(tmp_path / "again.pt2")
    for loaded in (torch.export.load(path), torch.export.load(again)):
        for name, tensor in wan.state_dict().items():
            assert torch.equal(loaded.state_dict[name], tensor), name


def test_weights_that_were_written_to_are_not_read_from_the_file(folder: Path) -> None:
    program = load_program(folder, size=SIZE)
    name = "proj_out.bias"
    extent = program.weights.locate(name)
    assert extent is not None
    assert torch.equal(extent.read((16,), torch.float32), program.weights.load(name))
    with torch.no_grad():
        program.weights.view(name).add_(1)
    assert program.weights.locate(name) is None
    assert torch.equal(program.weights.load(name), extent.read((16,), torch.float32) + 1)


def test_a_file_that_was_replaced_is_read_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Rewriting a model onto itself must not change what is being read."""
    path = load_program(folder, size=SIZE).save(tmp_path / "model.pt2")
    program = load_program(path)
    before = program.weights.load("proj_out.bias")
    extent = program.weights.locate("proj_out.bias")
    assert extent is not None
    assert extent.file.is_in_place()
    path.with_name("other").write_bytes(b"other")
    path.with_name("other").rename(path)
    assert not extent.file.is_in_place()
    assert torch.equal(program.weights.load("proj_out.bias"), before)


def _must_not_trace(*_: Any, **__: Any) -> Any:
    raise AssertionError("traced although the weights are incomplete")


@pytest.mark.parametrize("damage", ["missing", "truncated", "cut in the header", "empty"])
def test_a_bad_shard_is_named_before_tracing(
    wan: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = write_folder(tmp_path / "wan", wan)
    bad = shard(folder, 2)
    content = bad.read_bytes()
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(content[: {"truncated": -4, "cut in the header": 40, "empty": 0}[damage]])
    monkeypatch.setattr(load_diffusers_module, "trace", _must_not_trace)
    monkeypatch.setattr(load_diffusers_module, "_build", _must_not_trace)
    with pytest.raises(WeightsError, match=bad.name) as caught:
        load_program(folder, size=SIZE)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_while_it_is_read_is_one_error(wan: nn.Module, tmp_path: Path) -> None:
    program = load_program(write_folder(tmp_path / "wan", wan), size=SIZE)
    os.truncate(shard(tmp_path / "wan"), 9000)
    with pytest.raises(WeightsError, match="was cut off at byte"):
        program.save(tmp_path / "out.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan"]


def test_mapped_tensors_of_the_header_size(tmp_path: Path) -> None:
    """A header may not claim more than the file has."""
    (tmp_path / "x.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="its header is cut off"):
        map_safetensors([tmp_path / "x.safetensors"])


_FEW_FILES = """
import resource, sys
from pathlib import Path
from t3compile.mapped_files import map_safetensors
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
map_safetensors([Path(sys.argv[1]) / f"{i}.safetensors" for i in range(20)])
"""


def test_too_many_files_are_one_error(tmp_path: Path) -> None:
    for i in range(20):
        save_file({f"x{i}": torch.ones(3)}, tmp_path / f"{i}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _FEW_FILES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert re.search(r"WeightsError: cannot map '.*\d.safetensors': too many files are open.*ulimit", done.stderr)


# The peak is read before and after each step; what is imported late is imported before.
_MEASURED = """
import json, resource, sys
from pathlib import Path
import diffusers, onnx, onnxscript.optimizer, onnxscript.rewriter.onnx_fusions, torch, torch.onnx
import torch.onnx._internal.exporter._core, torch.onnx._internal.exporter._torchlib.ops
from t3compile.pipeline import export_onnx_report, load_program
from tests.sharded import SIZE

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = Path(sys.argv[1])
program = load_program(folder / "large", size=SIZE)
before = peak()
program.save(folder / "large.pt2")
saved = peak()
export_onnx_report(load_program(folder / "large.pt2"), folder / "large.onnx", check=False)
print(json.dumps([program.weight_bytes, saved - before, peak() - saved]))
"""


def test_memory_stays_below_the_weights(tmp_path: Path) -> None:
    large, _ = tiny_wan(layers=2, heads=12, head_dim=64, ffn_dim=20480)
    write_folder(tmp_path / "large", large)
    del large
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weight_bytes, grown_saving, grown_exporting = json.loads(done.stdout.splitlines()[-1])
    assert weight_bytes > 280e6
    # Of the largest weight, 63 MB, export holds two copies: as stored and transposed.
    assert grown_saving < 0.3 * weight_bytes, grown_saving
    assert grown_exporting < 0.7 * weight_bytes, grown_exporting
    written = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()}
    assert min(written["large.pt2"], written["large.onnx.data"]) > 0.999 * weight_bytes


def test_no_weights_are_missed_before_the_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    program = load_program(tmp_path, size=SIZE)
    with pytest.raises(T3CompileError, match="has no weights"):
        program.check_savable(tmp_path / "out.pt2")
    with pytest.raises(T3CompileError, match="has no weights"):
        t3compile.export_onnx(program, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
