"""Files of tensors, mapped: which tensor lies where, and how its bytes are read without keeping them.

A mapped page counts as memory of the process once it was touched. So tensors are mapped to know their form and to run
whole models that are larger than memory; whatever reads one tensor after another reads the file instead.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from t3compile.errors import WeightsError
from t3compile.streamed_file import forget

# Linux only; the mmap module names it from Python 3.13 on. Without it a file larger than memory is refused.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_LARGEST_HEADER = 100_000_000
_CHUNK_BYTES = 1 << 24
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class MappedFile:
    """A file mapped into memory: copied on writing, and open, so that renaming over its path changes nothing."""

    path: Path
    nbytes: int
    address: int
    opened: BinaryIO = field(repr=False, compare=False)
    pages: mmap.mmap = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file that is not empty; OSError when it cannot be read, WeightsError when too many are open."""
        # The working directory may change while it is open.
        path = path.absolute()
        try:
            opened = path.open("rb")
            pages = mmap.mmap(
                opened.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise WeightsError(
                f"cannot map '{path}': too many files are open, and every file of weights takes two; raise the limit, "
                "with 'ulimit -n' in the shell"
            ) from None
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        return cls(path, len(pages), address, opened, pages)

    def tensor(self, offset: int, shape: Collection[int], dtype: torch.dtype) -> Tensor:
        """The row-major tensor at a byte; ValueError where the file ends before it does."""
        count = math.prod(shape)
        if offset < 0 or offset + count * dtype.itemsize > self.nbytes:
            raise ValueError(f"a tensor ends at byte {offset + count * dtype.itemsize} of {self.nbytes}")
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self.pages, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def locate(self, tensor: Tensor) -> Extent | None:
        """Where the tensor's bytes are in this file, if it is a row-major view of it that nobody has written to."""
        nbytes = tensor.numel() * tensor.element_size()
        if not nbytes or tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor._version:
            return None
        offset = tensor.data_ptr() - self.address
        return Extent(self, offset, nbytes) if 0 <= offset <= self.nbytes - nbytes else None

    def is_in_place(self) -> bool:
        """Whether the path still names the file that was opened, with the size that it had."""
        try:
            now, then = self.path.stat(), os.fstat(self.opened.fileno())
        except OSError:
            return False
        return os.path.samestat(now, then) and now.st_size == self.nbytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a byte on; WeightsError when the file became shorter."""
        while buffer:
            count = os.preadv(self.opened.fileno(), [buffer], offset)
            if not count:
                raise WeightsError(f"'{self.path}' was cut off at byte {offset} while it was read; copy it again")
            buffer, offset = buffer[count:], offset + count


@dataclass(frozen=True)
class Extent:
    """Some bytes of a file."""

    file: MappedFile
    offset: int
    nbytes: int

    def read(self, shape: Collection[int], dtype: torch.dtype) -> Tensor:
        """The bytes as a row-major tensor in memory of its own."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self.file.read_into(byte_view(tensor), self.offset)
        return tensor

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order, through one buffer that is used again: a chunk holds until the next is asked for."""
        buffer = memoryview(bytearray(min(self.nbytes, _CHUNK_BYTES)))
        for begin in range(0, self.nbytes, _CHUNK_BYTES):
            part = buffer[: min(_CHUNK_BYTES, self.nbytes - begin)]
            self.file.read_into(part, self.offset + begin)
            yield part

    def forget(self) -> None:
        """Take the bytes out of the system's cache; nothing where a process has them mapped and read."""
        forget(self.file.opened.fileno(), self.offset, self.nbytes)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a row-major tensor on the CPU; writing to them writes to it."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data if flat.numel() else memoryview(b"")


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a row-major tensor on the CPU in order, some MiB at a time, none copied."""
    view = byte_view(tensor)
    for begin in range(0, len(view), _CHUNK_BYTES):
        yield view[begin : begin + _CHUNK_BYTES]


@dataclass(frozen=True)
class MappedTensors:
    """Named tensors and the files that they lie in."""

    tensors: Mapping[str, Tensor]
    files: tuple[MappedFile, ...] = ()


def map_safetensors(files: Collection[Path]) -> MappedTensors:
    """All tensors of safetensors files, mapped: no byte is read before it is used, writing copies the page.

    WeightsError when a file is truncated or malformed.
    """
    tensors: dict[str, Tensor] = {}
    opened: list[MappedFile] = []
    for path in files:
        try:
            file, mapped = _map_safetensors(path)
        except OSError as error:
            raise WeightsError(f"cannot map '{path}': {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise WeightsError(f"cannot read '{path}' as safetensors ({error}); copy it again") from None
        for name, tensor in mapped.items():
            if name in tensors:
                raise WeightsError(f"tensor '{name}' is in more than one file, last in '{path}'")
            tensors[name] = tensor
        opened.append(file)
    return MappedTensors(tensors, tuple(opened))


def _map_safetensors(path: Path) -> tuple[MappedFile, dict[str, Tensor]]:
    # Not safetensors.safe_open: it reserves memory for the whole file, which fails for files larger than it.
    header = read_header(path)
    start = header.data_begin
    file = MappedFile.open(path)
    tensors = {}
    for name, entry in header.entries.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"tensor '{name}' has dtype {entry['dtype']}, which torch cannot map")
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"tensor '{name}' has {end - begin} bytes for shape {shape}")
        if start + end > file.nbytes:
            raise ValueError(f"it is truncated: tensor '{name}' ends at byte {start + end} of {file.nbytes}")
        tensors[name] = file.tensor(start + begin, shape, dtype)
    return file, tensors


@dataclass(frozen=True)
class SafetensorsHeader:
    """The tensors that a safetensors file names, and the byte at which their data begins."""

    entries: Mapping[str, Any]
    data_begin: int


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file; ValueError when it is none, OSError when it cannot be read."""
    with path.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        if not 2 <= header_bytes <= min(_LARGEST_HEADER, os.fstat(opened.fileno()).st_size - 8):
            raise ValueError("its header is cut off")
        try:
            header = json.loads(opened.read(header_bytes))
        except RecursionError:
            header = None
    if not isinstance(header, dict):
        raise ValueError("its header is malformed")
    header.pop("__metadata__", None)
    return SafetensorsHeader(header, 8 + header_bytes)


# (offset, bytes) -> the dtype of the one tensor that they are of, if any.
TensorAt = Callable[[int, int], "torch.dtype | None"]


def tensor_at(path: Path) -> TensorAt:
    """Which tensor of a safetensors file some bytes are of. OSError, ValueError."""
    header = read_header(path)
    try:
        ranges = sorted(
            (header.data_begin + begin, header.data_begin + end, str(entry["dtype"]))
            for entry in header.entries.values()
            for begin, end in [entry["data_offsets"]]
        )
    except (KeyError, TypeError):
        raise ValueError("its header is malformed") from None
    begins = [begin for begin, _, _ in ranges]

    def find(offset: int, nbytes: int) -> torch.dtype | None:
        number = bisect.bisect_right(begins, offset) - 1
        if number < 0 or offset + nbytes > ranges[number][1]:
            return None
        return _SAFETENSORS_DTYPES.get(ranges[number][2])

    return find


def sample_fingerprint(path: Path) -> str:
    """sha256 of a safetensors file's size, header and 64 samples spread over its data; OSError, ValueError.

    Reads at most some hundred KiB besides the header: a checkpoint of the same form that was trained on differs.
    """
    begin = read_header(path).data_begin
    with path.open("rb") as opened:
        nbytes = os.fstat(opened.fileno()).st_size
        digest = hashlib.sha256(f"{nbytes} ".encode() + opened.read(begin))
        for i in range(_SAMPLES):
            opened.seek(begin + (nbytes - begin) * i // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
