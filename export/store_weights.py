"""Where an ONNX file's weights go: into a file beside it, streamed, or they stay in the files they were loaded from.

onnxruntime follows external data only inside the model's folder, symbolic links resolved. So a shared file is used in
place where it lies there, else it gets a second name there (a hard link), and is copied where the file system
cannot do that.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from t3compile.errors import WeightsError
from t3compile.export.graph_values import permutation_of
from t3compile.files import scratch_folder
from t3compile.mapped_files import Extent, MappedFile, byte_chunks, byte_view
from t3compile.program import Program
from t3compile.progress import SILENT, Advance, Progress
from t3compile.streamed_file import is_too_large_to_cache, one_ahead, open_new

# Smaller tensors stay inside the ONNX file: onnxruntime reads shapes and scalars from there.
INLINE_BYTES = 1024
# Runtimes that map single tensors do so at multiples of a page.
_PAGE_BYTES = 4096
_NOT_IN_A_FILE = "converted when read, or in no safetensors file"
_CHANGED = "made or changed by the exporter"
_MISALIGNED = "not at a multiple of its element's size"

Sharing = Literal["in place", "hard link", "copy"]


@dataclass(frozen=True)
class SharedFile:
    """A file of weights that an ONNX file points into: its path from there, where it came from, and how."""

    location: str
    source: str
    how: Sharing


@dataclass(frozen=True)
class WeightStorage:
    """Bytes and numbers of tensors written beside the ONNX file, and of those shared with the files they come from.

    ``not_shared`` says for each reason how many bytes were written although sharing was asked for.
    """

    written_bytes: int = 0
    written_tensors: int = 0
    shared_bytes: int = 0
    shared_tensors: int = 0
    shared_files: tuple[SharedFile, ...] = ()
    not_shared: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self) -> tuple[str, ...]:
        """What a user must know about shared files, one sentence each."""
        notes = []
        if self.shared_files:
            notes.append(
                "the ONNX file needs the shared files as they are: changing the checkpoint in place changes the model"
            )
        if any(file.how == "hard link" for file in self.shared_files):
            notes.append(
                "onnxruntime reads hard-linked weights, onnx.load and onnx.checker refuse them; written into the "
                "checkpoint's own folder, the ONNX file needs no links"
            )
        copied = [file for file in self.shared_files if file.how == "copy"]
        if copied:
            notes.append(f"{len(copied)} files could not be linked beside the ONNX file and were copied")
        return tuple(notes)


class _ReusedMemory:
    """Named blocks that every weight uses again: the system clears fresh pages, which takes longer than the copy."""

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}

    def hold(self, name: str, nbytes: int) -> Tensor:
        """Bytes of the block, uint8 [nbytes]; what they held is lost."""
        block = self._blocks.get(name)
        if block is None or block.numel() < nbytes:
            block = self._blocks[name] = torch.empty(nbytes, dtype=torch.uint8)
        return block[:nbytes]


class LazyWeight(ir.LazyTensor):
    """A program's weight, read when its values are asked for; ``permutation`` transposes it."""

    __slots__ = ("permutation", "program", "stored_shape", "weight")

    def __init__(self, program: Program, weight: str, form: Tensor, permutation: tuple[int, ...] | None = None) -> None:
        self.program, self.weight, self.permutation = program, weight, permutation
        self.stored_shape = tuple(form.shape)
        shape = form.shape if permutation is None else [form.shape[axis] for axis in permutation]
        super().__init__(self._read, TorchTensor(form).dtype, ir.Shape(list(shape)), name=weight)

    def __repr__(self) -> str:
        # The base class shows the function, which shows this.
        return f"{self._repr_base()}(weight={self.weight!r})"

    def _read(self) -> ir.TensorProtocol:
        return TorchTensor(self.value(), name=self.name)

    def value(self) -> Tensor:
        """The row-major tensor, complex numbers as pairs."""
        tensor = self.program.weights.load(self.weight).detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        return (tensor if self.permutation is None else tensor.permute(self.permutation)).contiguous()

    def locate(self) -> Extent | None:
        """Where these very bytes are in a file."""
        return None if self.permutation is not None else self.stored()

    def read_stored(self, memory: _ReusedMemory, number: int) -> Tensor | None:
        """Its bytes before they are transposed, in a numbered block; None where they are read another way."""
        extent = self.stored()
        if extent is None or self.permutation is None:
            return None
        block = memory.hold(f"stored {number}", extent.nbytes)
        extent.file.read_into(byte_view(block), extent.offset)
        return block

    def transpose_stored(self, stored: Tensor, memory: _ReusedMemory, number: int) -> Tensor:
        """The row-major tensor, in a numbered block, from what read_stored gave."""
        assert self.permutation is not None
        dtype = to_torch_dtype(self.dtype)
        moved = stored.view(dtype).view(self.stored_shape).permute(self.permutation)
        return memory.hold(f"transposed {number}", stored.numel()).view(dtype).view(moved.shape).copy_(moved)

    def stored(self) -> Extent | None:
        """Where its bytes are in a file, before they are transposed."""
        extent = self.program.weights.locate(self.weight)
        return extent if extent is not None and extent.nbytes == self.nbytes else None

    def transposed(self, permutation: tuple[int, ...]) -> LazyWeight:
        form = torch.empty([int(str(size)) for size in self.shape], dtype=to_torch_dtype(self.dtype), device="meta")
        return LazyWeight(self.program, self.weight, form, permutation)


def fold_transposes(model: ir.Model, shared: Collection[str] = ()) -> None:
    """Store a weight that only one Transpose reads transposed, unless it is one of the shared."""
    graph = model.graph
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        lazy = None if value is None else value.const_value
        if value is None or not isinstance(lazy, LazyWeight) or lazy.permutation is not None:
            continue
        assert value.name is not None
        is_alone = len(value.uses()) == 1 and not value.is_graph_output() and not node.outputs[0].is_graph_output()
        if not is_alone or value.name not in graph.initializers or lazy.weight in shared:
            continue
        folded = lazy.transposed(permutation_of(node, len(lazy.shape)))
        folded.name = f"{lazy.weight}.transposed"
        if folded.name in graph.initializers:
            continue
        made = ir.Value(name=folded.name, type=ir.TensorType(folded.dtype), shape=folded.shape, const_value=folded)
        node.outputs[0].replace_all_uses_with(made)
        graph.remove(node, safe=True)
        del graph.initializers[value.name]
        graph.initializers[folded.name] = made


def store_weights(
    model: ir.Model,
    path: Path,
    stage: Path,
    extents: Mapping[str, Extent] | None = None,
    progress: Progress = SILENT,
) -> WeightStorage:
    """Write the data of the initializers to ``path``.data in the stage, or point them into files that have it.

    Every initializer of at least 1 KiB becomes external; ``path`` is where the ONNX file will be. ``extents`` are the
    weights to share; None where sharing was not asked for. No more than six weights are held at a time.
    """
    values = [value for value in model.graph.initializers.values() if _nbytes(value) >= INLINE_BYTES]
    shared = dict(_shared(values, extents or {}))
    opened = {extent.file.address: extent.file for extent in shared.values()}
    files = dict(zip(opened, _share_files(list(opened.values()), path, stage), strict=True))
    for value in values:
        if value in shared:
            extent = shared[value]
            _point(value, files[extent.file.address].location, extent.offset, extent.nbytes, path.parent)
    written = [value for value in values if value not in shared]
    not_shared = {} if extents is None else _reasons(written, extents)
    copied = [file for address, file in opened.items() if files[address].how == "copy"]
    total = sum(map(_nbytes, written)) + sum(file.nbytes for file in copied)
    is_large = is_too_large_to_cache(total)
    with progress.measure(total, "bytes") as advance:
        for file in copied:
            with open_new(stage / files[file.address].location, total) as data:
                extent = Extent(file, 0, file.nbytes)
                for chunk in extent.chunks():
                    advance(data.write(chunk))
            if is_large:
                extent.forget()
        if written:
            location = data_path(path).name
            with open_new(stage / location, total) as data:
                for value, content in zip(written, _contents(written), strict=True):
                    offset = _write(data, value, content, advance)
                    if is_large:
                        _forget(value)
                    _point(value, location, offset, _nbytes(value), stage)
    return WeightStorage(
        sum(map(_nbytes, written)),
        len(written),
        sum(extent.nbytes for extent in shared.values()),
        len(shared),
        tuple(files.values()),
        not_shared,
    )


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _shared(values: Iterable[ir.Value], extents: Mapping[str, Extent]) -> Iterable[tuple[ir.Value, Extent]]:
    for value in values:
        lazy = value.const_value
        if not isinstance(lazy, LazyWeight) or lazy.weight not in extents or lazy.locate() is None:
            continue
        # Runtimes use the bytes where they are mapped.
        if extents[lazy.weight].offset * 8 % lazy.dtype.bitwidth == 0:
            yield value, extents[lazy.weight]


def _reasons(values: Iterable[ir.Value], extents: Mapping[str, Extent]) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for value in values:
        lazy = value.const_value
        if not isinstance(lazy, LazyWeight):
            reason = _CHANGED
        else:
            reason = _MISALIGNED if lazy.weight in extents and lazy.permutation is None else _NOT_IN_A_FILE
        reasons[reason] = reasons.get(reason, 0) + _nbytes(value)
    return reasons


def _point(value: ir.Value, location: str, offset: int, length: int, folder: Path) -> None:
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    assert isinstance(tensor.shape, ir.Shape)
    value.const_value = ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
    )


def _contents(values: Sequence[ir.Value]) -> Iterator[Iterable[Any]]:
    """The bytes of each tensor; while one is written the next is transposed, and the one after that is read."""
    memory = _ReusedMemory()
    # When a block is read into again, the weight that it held is transposed; when written to again, it is written.
    stored = one_ahead(partial(_read, value, memory, i % 3) for i, value in enumerate(values))
    return one_ahead(
        partial(_content, value, block, memory, i % 2)
        for i, (value, block) in enumerate(zip(values, stored, strict=True))
    )


def _read(value: ir.Value, memory: _ReusedMemory, number: int) -> Tensor | None:
    tensor = value.const_value
    return tensor.read_stored(memory, number) if isinstance(tensor, LazyWeight) else None


def _content(value: ir.Value, stored: Tensor | None, memory: _ReusedMemory, number: int) -> Iterable[Any]:
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, LazyWeight):
        return [tensor.tobytes()]
    if stored is not None:
        return byte_chunks(tensor.transpose_stored(stored, memory, number))
    extent = tensor.locate()
    return extent.chunks() if extent is not None else byte_chunks(tensor.value())


def _write(data: BinaryIO, value: ir.Value, content: Iterable[Any], advance: Advance) -> int:
    """Append one tensor; the byte at which it begins."""
    alignment = _PAGE_BYTES if _nbytes(value) >= _PAGE_BYTES else 64
    data.write(b"\0" * (-data.tell() % alignment))
    offset = data.tell()
    for chunk in content:
        advance(data.write(chunk))
    return offset


def _forget(value: ir.Value) -> None:
    tensor = value.const_value
    extent = tensor.stored() if isinstance(tensor, LazyWeight) else None
    if extent is not None:
        extent.forget()


def _share_files(files: list[MappedFile], path: Path, stage: Path) -> list[SharedFile]:
    folder = path.parent.resolve()
    sources = [file.path.resolve() for file in files]
    in_place = {source: source.relative_to(folder).as_posix() for source in sources if source.is_relative_to(folder)}
    # Whatever is written under one of these names would be written into the checkpoint itself, or over it.
    taken = {path.name, data_path(path).name, *in_place.values()}
    shared = []
    for file, source in zip(files, sources, strict=True):
        if not file.is_in_place():
            raise WeightsError(f"'{file.path}' was changed while it was used; load the model again")
        if source in in_place:
            shared.append(SharedFile(in_place[source], str(file.path), "in place"))
            continue
        name, number = f"{path.name}.{file.path.name}", 0
        while name in taken:
            number += 1
            name = f"{path.name}.{number}.{file.path.name}"
        taken.add(name)
        shared.append(SharedFile(name, str(file.path), "hard link" if _link(source, stage / name) else "copy"))
    return shared


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def data_path(path: Path) -> Path:
    """Where the tensors go that an ONNX file at ``path`` shares with no other."""
    return path.with_name(f"{path.name}.data")


def check_sources_stay(program: Program, path: Path, *, share: bool) -> None:
    """Raise OutputError where an export to ``path`` would replace a file that the weights are read from.

    The ONNX file itself may replace one, as a file written over its source does, unless it is to point there.
    """
    written = [data_path(path), *([path] if share else [])]
    program.check_kept([target.resolve() for target in written])


def needed_bytes(program: Program, path: Path, *, share: bool) -> int:
    """Bytes that an export will write to the disk of ``path``, as far as known before it."""
    shared = list(program.external_weights().values()) if share else []
    files = {extent.file.address: extent.file for extent in shared}
    copied = sum(file.nbytes for file in files.values() if not _can_link(file.path.resolve(), path))
    return program.weight_bytes - sum(extent.nbytes for extent in shared) + copied


def _can_link(source: Path, path: Path) -> bool:
    """Whether a file is in an output's folder or can be linked there: tried, as links over mounts may be forbidden."""
    if source.is_relative_to(path.parent.resolve()):
        return True
    with scratch_folder(path.parent, path.name) as scratch:
        return _link(source, scratch / source.name)
