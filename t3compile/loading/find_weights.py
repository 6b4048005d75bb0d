"""Which files hold a diffusers model's weights, and their tensors, mapped."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from t3compile.errors import ModelFileError, WeightsError
from t3compile.loading.load_pickle import find_state_dict, load_tensors_only
from t3compile.loading.recognize import is_safetensors
from t3compile.mapped_files import MappedFile, MappedTensors, map_safetensors

_STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)\.safetensors")


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers folder, all of them or none; WeightsError names a
    missing shard.
    """
    index = folder / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        return _indexed_shards(index)
    single = folder / f"{_STEM}.safetensors"
    if single.is_file():
        return [single]
    files = sorted(folder.glob(f"{_STEM}*.safetensors"))
    if not files:
        return []
    shards = [_SHARD.fullmatch(file.name) for file in files]
    first = shards[0]
    if first is None or any(shard is None or shard["rest"] != first["rest"] for shard in shards):
        if len(files) == 1:
            return files
        raise WeightsError(
            f"'{folder}' has several sets of weights ({', '.join(file.name for file in files)}); "
            "name one with --weights"
        )
    names = [
        f"{first['stem']}-{number:05d}-of-{first['count']}{first['rest']}.safetensors"
        for number in range(1, int(first["count"]) + 1)
    ]
    return _existing(folder, names)


def _indexed_shards(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = list(dict.fromkeys(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"'{index}' is not an index of weights; copy it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(
                f"'{index}' names the shard {name!r}, which is not a file of its own folder; copy it again"
            )
    return _existing(index.parent, names)


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"'{folder}' lacks {len(missing)} of {len(names)} weight files, first '{missing[0]}'; download it again"
        )
    return [folder / name for name in names]


def map_weight_files(files: Sequence[Path]) -> MappedTensors:
    """All tensors of safetensors files or torch.save files of tensors, mapped and not read."""
    tensors: dict[str, Tensor] = {}
    opened: list[MappedFile] = []
    for path in files:
        mapped = _map_file(path)
        for name, tensor in mapped.tensors.items():
            if name in tensors:
                raise WeightsError(f"tensor '{name}' is in more than one file, last in '{path}'")
            tensors[name] = tensor
        opened += mapped.files
    return MappedTensors(tensors, tuple(opened))


def _map_file(file: Path) -> MappedTensors:
    if not file.is_file():
        raise WeightsError(f"there is no weights file '{file}'")
    if is_safetensors(file):
        return map_safetensors([file])
    try:
        tensors = find_state_dict(load_tensors_only(file))
    except (ModelFileError, pickle.UnpicklingError):
        tensors = None
    if tensors is None:
        raise WeightsError(
            f"'{file}' is neither a safetensors file nor a state_dict of tensors only; "
            "give the file with the weights, copied again if it was cut off"
        )
    return MappedTensors(tensors)
