"""A .pt2 that refers to its weights: it finds them where it may look, and is led nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from t3compile.archive import REFERENCES_ENTRY
from t3compile.cli import main
from t3compile.errors import ModelFileError, T3CompileError, WeightsError
from t3compile.inputs import named_inputs
from t3compile.mapped_files import map_safetensors, sample_fingerprint
from t3compile.pipeline import load_program
from t3compile.program import trace
from t3compile.verification import check_weights
from tests.sharded import SIZE, shard, write_folder
from tests.tiny_models import tiny_wan

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return tiny_wan(layers=1)[0]


@pytest.fixture(scope="module")
def made(wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint wan/, beside.pt2 next to it, and away/model.pt2 in a folder of its own."""
    folder = tmp_path_factory.mktemp("made")
    program = load_program(write_folder(folder / "wan", wan), size=SIZE)
    program.save(folder / "beside.pt2", external=True)
    (folder / "away").mkdir()
    program.save(folder / "away" / "model.pt2", external=True)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


_TABLE = f"archive/extra/{REFERENCES_ENTRY}"


def _references(path: Path, entry: str = _TABLE) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        content: dict[str, Any] = json.loads(archive.read(entry))
        return content


def _change(path: Path, change: Callable[[dict[str, Any]], None], entry: str = _TABLE) -> None:
    """Rewrite the table of references, or another, inside the archive."""
    content = _references(path, entry)
    change(content)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records[entry] = json.dumps(content).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def _refused(path: Path, text: str, error: type[T3CompileError] = WeightsError, **options: Any) -> None:
    with pytest.raises(error, match=text) as caught:
        load_program(path, **options)
    assert "\n" not in str(caught.value)


def test_it_holds_no_weights_and_loads_all(wan: nn.Module, made: Path) -> None:
    program = load_program(made / "beside.pt2")
    assert set(_references(made / "beside.pt2")["tensors"]) == set(wan.state_dict())
    for name, tensor in wan.state_dict().items():
        extent = program.weights.locate(name)
        assert extent is not None
        assert extent.file.path.parent == made / "wan"
        assert torch.equal(program.weights.load(name), tensor)
    args, kwargs = program.example_inputs
    original = load_program(made / "wan", size=SIZE)
    with torch.no_grad():
        assert torch.equal(program.module()(*args, **kwargs)[0], original.module()(*args, **kwargs)[0])


def test_a_file_inside_the_folder_is_named_by_its_path_and_another_by_its_name(made: Path) -> None:
    names = {file["name"] for file in _references(made / "beside.pt2")["files"]}
    assert names == {f"wan/{shard(made / 'wan', i).name}" for i in (1, 2, 3)}
    names = {file["name"] for file in _references(made / "away" / "model.pt2")["files"]}
    assert names == {shard(made / "wan", i).name for i in (1, 2, 3)}
    assert str(made).encode() not in (made / "away" / "model.pt2").read_bytes()


def test_files_elsewhere_are_read_only_where_the_user_names_them(made: Path) -> None:
    away = made / "away" / "model.pt2"
    _refused(away, r"by reference to 3 files.*--weights")
    _refused(away, "is not in", weights=made)
    assert len(load_program(away, weights=made / "wan").weights.names()) > 20
    shards = [shard(made / "wan", i) for i in (1, 2, 3)]
    assert len(load_program(away, weights=shards).weights.names()) > 20
    _refused(away, shards[2].name, weights=shards[:2])


def test_a_cache_of_links_is_said_to_be_outside(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for file in list((copied / "wan").glob("*.safetensors")):
        file.symlink_to(file.rename(tmp_path / "blobs" / file.name[-24:]))
    size = ["--frames", "5", "--height", "64", "--width", "64", "--text-tokens", "5", "--no-verify"]
    output = copied / "wan" / "windows.pt2"
    options = ["-o", str(output), "--schedule", "1,2,2", "--store-weights", "external"]
    done = CliRunner().invoke(main, ["rewrite", str(copied / "wan"), *size, *options])
    assert done.exit_code == 0, done.stderr
    assert f"give --weights {copied / 'wan'} with it" in done.stderr
    _refused(output, "leads out of its folder")
    load_program(output, weights=copied / "wan")


def test_moving_both_together_keeps_them(copied: Path, tmp_path: Path) -> None:
    moved = copied.rename(tmp_path / "moved")
    load_program(moved / "beside.pt2")


def test_weights_that_were_converted_are_inside(wan: nn.Module, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wan", wan, dtype=torch.bfloat16)
    path = load_program(folder, size=SIZE).save(tmp_path / "model.pt2", external=True)
    references = _references(path)["tensors"]
    program = load_program(path)
    dtypes = {name: tensor.dtype for name, tensor in program.exported.state_dict.items()}
    # diffusers keeps norms and time embeddings in float32.
    assert {dtype for name, dtype in dtypes.items() if name in references} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if name not in references} == {torch.float32}
    again = load_program(program.save(tmp_path / "again.pt2", external=True))
    for name in dtypes:
        assert torch.equal(again.weights.load(name), program.weights.load(name))


def test_torch_alone_says_why_it_cannot_load_it(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Zeros in place of weights would be the worst that can happen."""
    with pytest.raises(RuntimeError):
        torch.export.load(made / "beside.pt2")
    assert "weights_are_in_safetensors_files__load_this_with_t3compile" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "wan/../../secret.safetensors",
        "wan/./x.safetensors",
        "wan//x.safetensors",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "C:secret.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "passwd",
        "model.pt",
        "",
        ".safetensors/..",
        3,
    ],
)
def test_names_that_are_no_plain_path_are_refused(copied: Path, name: object) -> None:
    secret = shard(copied / "wan")
    shutil.copy(secret, copied.parent / "secret.safetensors")
    _change(copied / "beside.pt2", lambda content: content["files"][0].update(name=name))
    _refused(copied / "beside.pt2", "no plain path inside its folder")
    _refused(copied / "beside.pt2", "no plain path inside its folder", weights=copied / "wan")


@pytest.mark.parametrize("of_folder", [False, True])
def test_links_out_of_the_folder_are_not_followed(copied: Path, tmp_path: Path, of_folder: bool) -> None:
    outside = tmp_path / "outside"
    if of_folder:
        (copied / "wan").rename(outside)
        (copied / "wan").symlink_to(outside)
    else:
        shutil.copytree(copied / "wan", outside)
        target = shard(copied / "wan", 2)
        target.unlink()
        target.symlink_to(outside / target.name)
    _refused(copied / "beside.pt2", "leads out of its folder")
    # What the user names may be links: caches of downloads are made of them.
    load_program(copied / "beside.pt2", weights=copied / "wan")


def _retrain(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3000:] = bytes(byte ^ 1 for byte in content[-3000:])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "is not in"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "size or content has changed"),
        (_retrain, "size or content has changed"),
        (lambda path: path.write_bytes(b""), "cannot read|cannot mmap|changed"),
        (lambda path: path.write_bytes(b"root:x:0:0:" + bytes(path.stat().st_size - 11)), "its header is cut off"),
    ],
    ids=["missing", "truncated", "trained on", "empty", "no safetensors"],
)
def test_another_file_than_was_referred_to_is_one_error(
    copied: Path, damage: Callable[[Path], None], text: str
) -> None:
    damaged = shard(copied / "wan", 2)
    damage(damaged)
    _refused(copied / "beside.pt2", f"{damaged.name}.*({text})")


def _table(path: Path, name: str, place: Any) -> None:
    _change(path, lambda content: content["tensors"].update({name: place}))


@pytest.mark.parametrize(
    ("place", "text", "error"),
    [
        ([0, 1 << 40], "weights of .* are damaged", ModelFileError),
        ([0, -8], "a file that it does not list", WeightsError),
        ([7, 8], "a file that it does not list", WeightsError),
        ([-1, 8], "a file that it does not list", WeightsError),
        ([True, 8], "a file that it does not list", WeightsError),
        ("x", "no table of references|refers to", WeightsError),
    ],
)
def test_places_outside_the_file_are_refused(copied: Path, place: Any, text: str, error: type[T3CompileError]) -> None:
    _table(copied / "beside.pt2", "proj_out.bias", place)
    _refused(copied / "beside.pt2", text, error)


@pytest.mark.parametrize("place", ["header", "between tensors", "another dtype"])
def test_only_a_tensor_of_the_file_is_read(copied: Path, place: str) -> None:
    """Not its header, not two halves of neighbours, and not one tensor's bytes as numbers of another kind."""
    name = "proj_out.bias"
    number, begin = _references(copied / "beside.pt2")["tensors"][name]
    if place == "another dtype":
        path = shard(copied / "wan", number + 1)
        path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
        _change(copied / "beside.pt2", lambda content: content["files"][number].update(sha256=sample_fingerprint(path)))
    else:
        _table(copied / "beside.pt2", name, [number, 0 if place == "header" else begin - 4])
    _refused(copied / "beside.pt2", "refers to bytes of .* for '.*' that are no torch.float32 tensor of it")


def test_verification_sees_another_shape_of_the_same_bytes(copied: Path) -> None:
    original = load_program(copied / "wan", size=SIZE)
    assert check_weights(original, load_program(copied / "beside.pt2")).passed
    entry = "archive/data/weights/model_weights_config.json"

    def widen(content: dict[str, Any]) -> None:
        meta = content["config"]["proj_out.bias"]["tensor_meta"]
        meta.update(sizes=[{"as_int": 16}, {"as_int": 1}], strides=[{"as_int": 1}, {"as_int": 1}])

    _change(copied / "beside.pt2", widen, entry)
    check = check_weights(original, load_program(copied / "beside.pt2"))
    assert not check.passed
    assert "'proj_out.bias' has another shape" in check.name


@pytest.mark.parametrize("header", [b"[1,  2]", b"[" * 2_000 + b"]" * 2_000, b'{"x": {"data_offsets": 3}}', b"{{{{"])
def test_a_header_that_is_no_table_is_one_error(copied: Path, header: bytes) -> None:
    path = shard(copied / "wan", 2)
    padding = bytes(path.stat().st_size - 8 - len(header))
    path.write_bytes(len(header).to_bytes(8, "little") + header + padding)
    _refused(copied / "beside.pt2", f"{path.name}.*(copy it again|has changed)")
    with pytest.raises(WeightsError, match="cannot read"):
        map_safetensors([path])


def test_a_weight_that_the_table_lacks_is_refused(copied: Path) -> None:
    _change(copied / "beside.pt2", lambda content: content["tensors"].pop("proj_out.bias"))
    _refused(copied / "beside.pt2", "'proj_out.bias'", ModelFileError)


def test_options_that_do_not_apply_are_errors(made: Path, tmp_path: Path) -> None:
    program = load_program(made / "beside.pt2")
    inside = program.save(tmp_path / "inside.pt2")
    _refused(inside, "--weights cannot be applied", ModelFileError, weights=made / "wan")
    with pytest.raises(WeightsError, match="none can be referred to"):
        load_program(inside).save(tmp_path / "x.pt2", external=True)
    with pytest.raises(WeightsError, match="none can be referred to"):
        trace(nn.Linear(3, 4), (torch.ones(2, 3),)).save(tmp_path / "x.pt2", external=True)


def test_the_command_line_writes_verifies_and_exports_it(made: Path, tmp_path: Path) -> None:
    size = ["--frames", "5", "--height", "64", "--width", "64", "--text-tokens", "5"]
    output = str(tmp_path / "windows.pt2")
    rewrite = ["rewrite", str(made / "wan"), *size, "-o", output, "--schedule", "1,2,2", "--store-weights", "external"]
    done = CliRunner().invoke(main, [*rewrite, "--portable"])
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr
    done = CliRunner().invoke(main, [*rewrite, "--no-verify"])
    assert done.exit_code == 0, done.stderr
    assert f"give --weights {made / 'wan'} with it" in done.stderr
    # MODEL names the folder, so that REWRITTEN may be read from it.
    done = CliRunner().invoke(main, ["verify", str(made / "wan"), output, *size, "--json"])
    assert done.exit_code == 0, done.stderr
    inputs = tmp_path / "inputs.safetensors"
    save_file(named_inputs(load_program(made / "wan", size=SIZE)), inputs)
    done = CliRunner().invoke(main, ["run", output, "--inputs", str(inputs), "--weights", str(made / "wan")])
    assert done.exit_code == 0, done.stderr
    done = CliRunner().invoke(main, ["inspect", output])
    assert done.exit_code == 2
    assert "name the folder that has it with --weights" in done.stderr
