"""Write a torch.export .pt2 weight by weight, so that it may be larger than memory.

torch writes everything but the weights; they go into the same zip layout one after another, each stored, aligned and
described as torch does it, or are left out in favour of references.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram

from t3compile.mapped_files import Extent, byte_chunks
from t3compile.progress import Advance, unmeasured
from t3compile.streamed_file import is_too_large_to_cache, open_new
from t3compile.weight_references import WeightReferences
from t3compile.weights import Weights

REFERENCES_ENTRY = "t3compile_weights.json"
# Where torch alone looks for a weight that is held by reference: its error shows this name.
EXTERNAL_PAYLOAD = "weights_are_in_safetensors_files__load_this_with_t3compile"
WEIGHTS_FOLDER = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS_FOLDER}model_weights_config.json"
_ALIGNMENT = 64
_PADDING_ID = b"FB"


@dataclass(frozen=True)
class _Payload:
    """One file of the archive: the weights of these names share its bytes."""

    names: tuple[str, ...]
    path_name: str
    extent: Extent | None


def write_archive(
    path: Path,
    exported: ExportedProgram,
    weights: Weights,
    extra: Mapping[str, str],
    references: WeightReferences | None = None,
    advance: Advance = unmeasured,
) -> None:
    """Write a .pt2 that torch.export.load reads, holding no more than one weight at a time.

    ``exported`` has fake tensors in its state_dict (see without_values); the values come from ``weights``. With
    ``references`` the weights in them are not written. ``advance`` is told the bytes of weights. OSError, WeightsError.
    """
    referenced = {} if references is None else references.tensors
    if references is not None:
        extra = {**extra, REFERENCES_ENTRY: references.dumps()}
    stored_bytes = sum(tensor.nbytes for name, tensor in exported.state_dict.items() if name not in referenced)
    is_large = is_too_large_to_cache(stored_bytes)
    payloads = list(_payloads(exported.state_dict, weights, frozenset(referenced)))
    with (
        zipfile.ZipFile(_without_weights(exported, extra)) as skeleton,
        open_new(path, stored_bytes) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        root = skeleton.namelist()[0].partition("/")[0]
        config_name = f"{root}/{WEIGHTS_CONFIG}"
        for name in skeleton.namelist():
            if not name.startswith(f"{root}/{WEIGHTS_FOLDER}"):
                _store(archive, name, [skeleton.read(name)])
        config = json.loads(skeleton.read(config_name))
        for payload in payloads:
            tensor = exported.state_dict[payload.names[0]]
            chunks, is_row_major = _content(payload, tensor, weights)
            _store(archive, f"{root}/{WEIGHTS_FOLDER}{payload.path_name}", chunks, advance)
            if payload.extent is not None and is_large:
                payload.extent.forget()
            # Names that share a payload count, as in the total, each.
            for name in payload.names[1:]:
                advance(exported.state_dict[name].nbytes)
            for name in payload.names:
                _describe(config["config"][name], payload.path_name, tensor, is_row_major)
        for name in referenced:
            _describe(config["config"][name], EXTERNAL_PAYLOAD, exported.state_dict[name], True)
        # torch lists them by dtype; models are loaded in the order of this list.
        config["config"] = {name: config["config"][name] for name in exported.state_dict}
        _store(archive, config_name, [json.dumps(config).encode()])


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is an ordinary tensor, and not of a class that torch pickles."""
    return type(tensor.data) is Tensor or isinstance(tensor.data, FakeTensor)


def _payloads(state: Mapping[str, Tensor], weights: Weights, referenced: frozenset[str]) -> Iterator[_Payload]:
    """Weights that are one tensor, or the same bytes of a file, stay one."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        if name not in referenced:
            groups.setdefault(_identity(tensor, weights.locate(name)), []).append(name)
    for i, names in enumerate(groups.values()):
        yield _Payload(tuple(names), f"weight_{i}", weights.locate(names[0]))


def _identity(tensor: Tensor, extent: Extent | None) -> object:
    form = (tensor.dtype, tensor.shape, tensor.stride())
    return (id(tensor), *form) if extent is None else (extent.file.address, extent.offset, *form)


def _content(payload: _Payload, form: Tensor, weights: Weights) -> tuple[Iterable[Any], bool]:
    """The bytes in the order of the strides of ``form``, and whether they are row-major instead."""
    if payload.extent is not None and form.is_contiguous():
        return payload.extent.chunks(), False
    value = weights.load(payload.names[0]).detach()
    if _is_dense(form):
        dense = torch.empty_strided(form.shape, form.stride(), dtype=value.dtype).copy_(value)
        return byte_chunks(dense.as_strided((dense.numel(),), (1,))), False
    return byte_chunks(value.contiguous()), True


def _is_dense(form: Tensor) -> bool:
    """Whether its strides order the axes of one gapless stretch of elements."""
    step = 1
    for stride, size in sorted(zip(form.stride(), form.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _describe(entry: dict[str, Any], path_name: str, form: Tensor, is_row_major: bool) -> None:
    entry["path_name"] = path_name
    entry["use_pickle"] = False
    meta = entry["tensor_meta"]
    meta["storage_offset"] = {"as_int": 0}
    if is_row_major:
        meta["strides"] = [{"as_int": stride} for stride in row_major_strides(tuple(form.shape))]


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours on each axis of a row-major tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def without_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fake tensors of the same forms; names that share a tensor share its stand-in."""
    mode = FakeTensorMode()
    made: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) in made:
            continue
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        trains = tensor.is_floating_point() if isinstance(tensor.data, FakeTensor) else tensor.requires_grad
        made[id(tensor)] = nn.Parameter(fake, trains) if isinstance(tensor, nn.Parameter) else fake
    return {name: made[id(tensor)] for name, tensor in state.items()}


def _without_weights(exported: ExportedProgram, extra: Mapping[str, str]) -> io.BytesIO:
    written = io.BytesIO()
    torch.export.save(exported, written, extra_files=dict(extra))
    return written


def _store(archive: zipfile.ZipFile, name: str, chunks: Iterable[Any], advance: Advance = unmeasured) -> None:
    """Add an uncompressed file whose bytes begin at a multiple of 64, as torch maps them."""
    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    # Local header, name, this padding's own head, and the sizes in 64 bits.
    begin = archive.fp.tell() + 30 + len(name.encode()) + 4 + 20
    padding = -begin % _ALIGNMENT
    entry.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        for chunk in chunks:
            advance(file.write(chunk))
