"""Where a program's weights are: in memory, mapped from safetensors files, or generated from a seed.

Tensors are read one by one when they are needed, so that tracing and planning never touch them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from t3compile.errors import WeightsError

# Linux only; the mmap module names it from Python 3.13 on. Without it a file larger than memory is refused.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_LARGEST_HEADER = 100_000_000
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


class Weights(Protocol):
    """Named tensors that are read on demand."""

    def names(self) -> Collection[str]: ...

    def load(self, name: str) -> Tensor:
        """The real tensor of that name; WeightsError when it cannot be had."""
        ...


@dataclass(frozen=True)
class TensorWeights:
    """Tensors in memory, or mapped from a file; `dtypes` names those that are converted when read."""

    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def load(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to(self.dtypes.get(name, tensor.dtype))


@dataclass(frozen=True)
class RandomWeights:
    """Seeded random tensors: matrices scaled by fan-in, so that activations keep their size through depth."""

    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    seed: int = 0

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def load(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name]
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        if len(shape) <= 1:
            offset = 1.0 if name.endswith("weight") else 0.0
            return (offset + 0.02 * noise).to(dtype)
        return (noise / math.sqrt(math.prod(shape[1:]))).to(dtype)


@dataclass(frozen=True)
class NoWeights:
    """A model whose weights were not given: everything works up to the first need of a value."""

    missing: tuple[str, ...]
    remedy: str

    def names(self) -> Collection[str]:
        return self.missing

    def load(self, name: str) -> Tensor:
        raise WeightsError(f"the model has no weights ('{name}' is needed first): {self.remedy}")


@dataclass(frozen=True)
class OverlaidWeights:
    """`over` where it has the name, else `under`."""

    over: Weights
    under: Weights

    def names(self) -> Collection[str]:
        return {*self.over.names(), *self.under.names()}

    def load(self, name: str) -> Tensor:
        source = self.over if name in self.over.names() else self.under
        return source.load(name)


@dataclass(frozen=True)
class CastWeights:
    """Another source's tensors, some of them converted when read."""

    source: Weights
    dtypes: Mapping[str, torch.dtype]

    def names(self) -> Collection[str]:
        return self.source.names()

    def load(self, name: str) -> Tensor:
        tensor = self.source.load(name)
        return tensor.to(self.dtypes.get(name, tensor.dtype))


def map_safetensors(files: Collection[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, mapped: no byte is read before it is used, writing copies the page.

    WeightsError when a file is truncated or malformed.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            mapped = _map_file(file)
        except OSError as error:
            raise WeightsError(f"cannot map '{file}': {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise WeightsError(f"cannot read '{file}' as safetensors ({error}); copy it again") from None
        for name, tensor in mapped.items():
            if name in tensors:
                raise WeightsError(f"tensor '{name}' is in more than one file, last in '{file}'")
            tensors[name] = tensor
    return tensors


def _map_file(file: Path) -> dict[str, Tensor]:
    # Not safetensors.safe_open: it reserves memory for the whole file, which fails for files larger than it.
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        start = 8 + header_bytes
        file_bytes = file.stat().st_size
        if not 2 <= header_bytes <= min(_LARGEST_HEADER, file_bytes - 8):
            raise ValueError("its header is cut off")
        header = json.loads(opened.read(header_bytes))
        pages = mmap.mmap(
            opened.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"tensor '{name}' has dtype {entry['dtype']}, which torch cannot map")
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if begin < 0 or end - begin != count * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"tensor '{name}' has {end - begin} bytes for shape {shape}")
        if start + end > file_bytes:
            raise ValueError(f"it is truncated: tensor '{name}' ends at byte {start + end} of {file_bytes}")
        flat = (
            torch.frombuffer(pages, dtype=dtype, count=count, offset=start + begin)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    return tensors


def check_weights(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    """Raise WeightsError listing missing, unexpected and misshapen tensors."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"the weights do not fit the configuration; {'; '.join(problems)}")
