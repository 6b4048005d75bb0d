"""What a MODEL argument is, told by content and never by suffix; what cannot be a model is refused
with a remedy.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t3compile.errors import ModelFileError

Kind = Literal["pt2", "pickle", "diffusers", "factory"]

MODEL_KINDS = (
    "a torch.export .pt2 archive, a diffusers folder, a pickled .pt file (with --trust-pickle), "
    "or package.module:factory"
)
WEIGHTS_REMEDY = "give the diffusers folder of the model (config.json) as MODEL and this file with --weights"

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_ZIP_MAGIC = b"PK\x03\x04"
_LFS_MAGIC = b"version https://git-lfs"
TENSORRT_MAGIC = (b"ftrt", b"ptrt")
# Where a .pt2 archive keeps compiled code, below its root.
AOTI_FOLDER = "data/aotinductor/"
# Keys of an ONNX ModelProto that follow its first field, ir_version.
_ONNX_SECOND_KEYS = b"\x12\x1a\x22\x28\x32\x3a\x42"
_LARGEST_SAFETENSORS_HEADER = 100_000_000


@dataclass(frozen=True)
class Recognized:
    """A loadable MODEL: its kind and, unless it is a factory, the file or folder to read."""

    kind: Kind
    name: str
    path: Path


def recognize(model: str | Path) -> Recognized:
    """The kind of MODEL; ModelFileError in one sentence when it cannot be loaded as a model."""
    name = str(model)
    path = Path(model)
    try:
        if path.is_dir():
            return Recognized("diffusers", name, find_transformer_folder(path))
        if path.is_file():
            return Recognized(_recognize_file(path), name, path)
        exists = path.exists()
    except OSError as error:
        raise ModelFileError(
            f"cannot read '{name}': {error.strerror or error}; give a readable file or folder"
        ) from None
    if exists:
        raise ModelFileError(f"'{name}' is neither a file nor a folder; MODEL is {MODEL_KINDS}")
    if _FACTORY.fullmatch(name):
        return Recognized("factory", name, path)
    raise ModelFileError(f"there is no file or folder '{name}'; MODEL is {MODEL_KINDS}")


def find_transformer_folder(folder: Path) -> Path:
    """`folder` itself, or the transformer of a diffusers pipeline folder."""
    if (folder / "config.json").is_file():
        config = read_config(folder)
        if not isinstance(config.get("_class_name"), str):
            raise ModelFileError(
                f"'{folder / 'config.json'}' names no diffusers class (_class_name); "
                "give the model's folder in diffusers format"
            )
        return folder
    if (folder / "model_index.json").is_file():
        if (folder / "transformer" / "config.json").is_file():
            return find_transformer_folder(folder / "transformer")
        raise ModelFileError(
            f"the pipeline folder '{folder}' has no transformer/config.json; "
            "give the folder of its diffusion transformer"
        )
    raise ModelFileError(
        f"the folder '{folder}' has no config.json; give a diffusers model folder, or MODEL as {MODEL_KINDS}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a mapping; ModelFileError when it is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot read '{path}' as JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ModelFileError(f"'{path}' is not a JSON object; copy it again")
    return config


def _recognize_file(path: Path) -> Kind:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ModelFileError(f"'{path}' is empty; copy it again")
    if head.startswith(_LFS_MAGIC):
        raise ModelFileError(f"'{path}' is a Git LFS pointer, not the file itself; run 'git lfs pull'")
    if head.startswith(_ZIP_MAGIC):
        return _recognize_zip(path)
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return "pickle"
    if is_safetensors(path):
        raise ModelFileError(f"'{path}' is a safetensors file and holds only weights; {WEIGHTS_REMEDY}")
    if head.startswith(TENSORRT_MAGIC):
        raise ModelFileError(
            f"'{path}' is a TensorRT engine, which cannot be rewritten; give the model that it was built from"
        )
    if looks_like_onnx(head):
        raise ModelFileError(f"'{path}' is an ONNX model, which can only be run; use 't3compile run'")
    raise ModelFileError(f"'{path}' is not a model file of a known kind; MODEL is {MODEL_KINDS}")


def _recognize_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise ModelFileError(f"'{path}' is a truncated or damaged archive; copy it again") from None
    inner = {name.partition("/")[2] for name in names}
    if _is_compiled(inner):
        raise ModelFileError(
            f"'{path}' is an AOTInductor package, compiled code without a graph to rewrite; run it with "
            "'t3compile run --trust-code', or give the .pt2 that it was compiled from"
        )
    if "archive_format" in inner:
        return "pt2"
    if "serialized_exported_program.json" in names:
        raise ModelFileError(
            f"'{path}' is a .pt2 of torch 2.7 or older; load and save it again there with torch 2.8 or newer"
        )
    if "constants.pkl" in inner and "data.pkl" in inner:
        raise ModelFileError(
            f"'{path}' is a TorchScript archive, which has no graph to rewrite; "
            "export the original module with torch.export instead"
        )
    if "data.pkl" in inner:
        return "pickle"
    if names and all(name.endswith(".npy") for name in names):
        raise ModelFileError(f"'{path}' is a NumPy archive of arrays; give it with --inputs, not as MODEL")
    raise ModelFileError(f"'{path}' is a zip archive that holds no model; MODEL is {MODEL_KINDS}")


def looks_like_onnx(head: bytes) -> bool:
    """Whether a file's first bytes are those of an ONNX ModelProto: ir_version, and a field that follows it."""
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in _ONNX_SECOND_KEYS


def is_aoti_package(path: Path) -> bool:
    """Whether the file is a .pt2 archive of compiled code (AOTInductor) without an exported program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _is_compiled({name.partition("/")[2] for name in archive.namelist()})
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False


def _is_compiled(inner: Collection[str]) -> bool:
    has_program = any(name.startswith("models/") for name in inner)
    has_code = any(name.startswith(AOTI_FOLDER) for name in inner)
    return "archive_format" in inner and has_code and not has_program


def is_safetensors(path: Path) -> bool:
    """Whether the file starts with a safetensors header."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and 2 <= length <= _LARGEST_SAFETENSORS_HEADER
