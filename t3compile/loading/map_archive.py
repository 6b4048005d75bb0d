"""A ``.pt2`` without its weights for torch to load, and the weights mapped in the file, or in those it refers to."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t3compile.archive import EXTERNAL_PAYLOAD, REFERENCES_ENTRY, WEIGHTS_CONFIG, WEIGHTS_FOLDER, row_major_strides
from t3compile.errors import ModelFileError, WeightsError
from t3compile.mapped_files import MappedFile, MappedTensors, tensor_at
from t3compile.weight_references import WeightReferences, open_references

_COMPILED = "data/aotinductor/"


@dataclass(frozen=True)
class ArchivedWeight:
    """Where a weight begins, and how it lies there, in elements."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    file: int = 0


@dataclass(frozen=True)
class SplitArchive:
    """``skeleton``: the archive with weights on the meta device. ``weights`` by name; ``files`` that they lie in."""

    skeleton: io.BytesIO
    weights: Mapping[str, ArchivedWeight]
    files: tuple[MappedFile, ...]

    def map_weights(self, forms: Mapping[str, Tensor]) -> MappedTensors:
        """The weights with the dtypes of ``forms``, those that the skeleton loaded.

        ValueError where one is cut off, WeightsError where one by reference is not of one tensor of the file.
        """
        mapped = {name: self._map(place, forms[name]) for name, place in self.weights.items()}
        finders = {number: tensor_at(file.path) for number, file in enumerate(self.files) if number}
        for name, place in self.weights.items():
            if place.file and finders[place.file](place.offset, mapped[name].nbytes) != mapped[name].dtype:
                raise WeightsError(
                    f"'{self.files[0].path}' refers to bytes of '{self.files[place.file].path}' for '{name}' that are "
                    f"no {mapped[name].dtype} tensor of it; rewrite the model again"
                )
        return MappedTensors(mapped, self.files)

    def _map(self, place: ArchivedWeight, form: Tensor) -> Tensor:
        file = self.files[place.file]
        steps = [(size - 1) * stride for size, stride in zip(place.sizes, place.strides, strict=True)]
        count = 0 if 0 in place.sizes else 1 + sum(steps)
        flat = file.tensor(place.offset, (count,), form.dtype)
        tensor = flat.as_strided(place.sizes, place.strides) if count else flat.reshape(place.sizes)
        return nn.Parameter(tensor, form.requires_grad) if isinstance(form, nn.Parameter) else tensor


def split_archive(path: Path, named: Sequence[Path] = ()) -> SplitArchive:
    """Take a checked archive apart, weights not read; ``named`` are folders or files for weights by reference.

    ModelFileError where it is damaged, WeightsError where referenced files cannot be had.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    records = list(reader.get_all_records())
    references = _read_references(path, reader)
    if references is None and named:
        raise ModelFileError(
            f"'{path}' holds its weights inside, and --weights cannot be applied to it; leave it out, or give a "
            "diffusers folder as MODEL"
        )
    config = json.loads(reader.get_record(WEIGHTS_CONFIG)) if WEIGHTS_CONFIG in records else {"config": {}}
    external = () if references is None else open_references(references, path, named)
    weights: dict[str, ArchivedWeight] = {}
    skeleton = io.BytesIO()
    with zipfile.ZipFile(skeleton, "w") as archive:
        for number, (name, entry) in enumerate(config["config"].items()):
            if entry["use_pickle"] is not False:
                continue
            weights[name] = _place(path, reader, name, entry, references)
            entry["path_name"] = f"weight_{number}"
            _put_on_meta(entry["tensor_meta"], weights[name].sizes)
            archive.writestr(f"archive/{WEIGHTS_FOLDER}weight_{number}", b"")
        pickled = {entry["path_name"] for entry in config["config"].values() if entry["use_pickle"] is not False}
        for record in records:
            is_payload = record.startswith(WEIGHTS_FOLDER) and record.removeprefix(WEIGHTS_FOLDER) not in pickled
            if record == WEIGHTS_CONFIG:
                archive.writestr(f"archive/{record}", json.dumps(config))
            elif record == f"{WEIGHTS_FOLDER}model.pt" or not (is_payload or record.startswith(_COMPILED)):
                archive.writestr(f"archive/{record}", reader.get_record(record))
    skeleton.seek(0)
    return SplitArchive(skeleton, weights, (MappedFile.open(path), *external))


def refers_to_weights(path: Path) -> bool:
    """Whether a ``.pt2`` holds weights by reference; False for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == f"extra/{REFERENCES_ENTRY}" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _read_references(path: Path, reader: Any) -> WeightReferences | None:
    record = f"extra/{REFERENCES_ENTRY}"
    if not reader.has_record(record):
        return None
    try:
        return WeightReferences.loads(reader.get_record(record).decode("utf-8"))
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"'{path}' refers to its weights in a way that is not followed: {error}") from None


def _place(
    path: Path, reader: Any, name: str, entry: Mapping[str, Any], references: WeightReferences | None
) -> ArchivedWeight:
    damaged = ModelFileError(f"'{path}' describes its weight '{name[:80]}' in a way that cannot be read; save it again")
    try:
        meta = entry["tensor_meta"]
        sizes = tuple(size["as_int"] for size in meta["sizes"])
        strides = tuple(stride["as_int"] for stride in meta["strides"])
        start = meta["storage_offset"]["as_int"]
        item_bytes = _item_bytes(meta["dtype"])
        numbers = (*sizes, *strides, start)
        if len(sizes) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
            raise damaged
        if entry["path_name"] == EXTERNAL_PAYLOAD:
            if references is None or name not in references.tensors or strides != row_major_strides(sizes):
                raise damaged
            number, offset = references.tensors[name]
            return ArchivedWeight(offset, sizes, strides, number + 1)
        record = WEIGHTS_FOLDER + entry["path_name"]
        offset = reader.get_record_offset(record) + start * item_bytes
        span = 0 if 0 in sizes else 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if (start + span) * item_bytes > reader.get_record_size(record):
            raise damaged
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise damaged from None
    return ArchivedWeight(offset, sizes, strides)


def _item_bytes(serialized_dtype: Any) -> int:
    from torch._export.serde.serialize import deserialize_scalar_type

    dtype: torch.dtype = deserialize_scalar_type(serialized_dtype)
    return dtype.itemsize


def _put_on_meta(meta: dict[str, Any], sizes: tuple[int, ...]) -> None:
    meta["device"] = {"type": "meta", "index": None}
    meta["storage_offset"] = {"as_int": 0}
    meta["strides"] = [{"as_int": stride} for stride in row_major_strides(sizes)]
