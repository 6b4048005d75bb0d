"""Where a program's weights are: in memory, mapped from safetensors files, or generated from a seed.

Tensors are read one by one when they are needed, so that tracing and planning never touch them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from t3compile.errors import WeightsError
from t3compile.mapped_files import Extent, MappedFile


class Weights(Protocol):
    """Named tensors that are read on demand."""

    def names(self) -> Collection[str]: ...

    def load(self, name: str) -> Tensor:
        """The real tensor of that name, read where it lies in a file; WeightsError when it cannot be had."""
        ...

    def view(self, name: str) -> Tensor:
        """The same tensor, mapped where it lies in a file: for whole models, which may be larger than memory."""
        ...

    def locate(self, name: str) -> Extent | None:
        """Where its very bytes are in a file, row-major; None where they are in none, or are converted when read."""
        ...


@dataclass(frozen=True)
class TensorWeights:
    """Tensors in memory, or mapped from ``files``; `dtypes` names those that are converted when read."""

    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    files: tuple[MappedFile, ...] = ()

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def load(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        extent = self._extent(tensor)
        if extent is not None:
            tensor = extent.read(tensor.shape, tensor.dtype)
        return tensor.to(self.dtypes.get(name, tensor.dtype))

    def view(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor if self._is_as_stored(name) else self.load(name)

    def locate(self, name: str) -> Extent | None:
        return self._extent(self.tensors[name]) if self._is_as_stored(name) else None

    def _is_as_stored(self, name: str) -> bool:
        dtype = self.tensors[name].dtype
        return self.dtypes.get(name, dtype) == dtype

    def _extent(self, tensor: Tensor) -> Extent | None:
        located = (file.locate(tensor) for file in self.files)
        return next((extent for extent in located if extent is not None), None)


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

    def view(self, name: str) -> Tensor:
        return self.load(name)

    def locate(self, name: str) -> Extent | None:
        return None


@dataclass(frozen=True)
class NoWeights:
    """A model whose weights were not given: everything works up to the first need of a value."""

    missing: tuple[str, ...]
    remedy: str

    def names(self) -> Collection[str]:
        return self.missing

    def load(self, name: str) -> Tensor:
        raise WeightsError(f"the model has no weights ('{name}' is needed first): {self.remedy}")

    def view(self, name: str) -> Tensor:
        return self.load(name)

    def locate(self, name: str) -> Extent | None:
        return None


@dataclass(frozen=True)
class OverlaidWeights:
    """`over` where it has the name, else `under`."""

    over: Weights
    under: Weights

    def names(self) -> Collection[str]:
        return {*self.over.names(), *self.under.names()}

    def load(self, name: str) -> Tensor:
        return self._source(name).load(name)

    def view(self, name: str) -> Tensor:
        return self._source(name).view(name)

    def locate(self, name: str) -> Extent | None:
        return self._source(name).locate(name)

    def _source(self, name: str) -> Weights:
        return self.over if name in self.over.names() else self.under


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

    def view(self, name: str) -> Tensor:
        tensor = self.source.view(name)
        return tensor if self.dtypes.get(name, tensor.dtype) == tensor.dtype else self.load(name)

    def locate(self, name: str) -> Extent | None:
        extent = self.source.locate(name)
        if extent is None or name not in self.dtypes:
            return extent
        return extent if self.source.view(name).dtype == self.dtypes[name] else None


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
