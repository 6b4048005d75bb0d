"""Weights by reference: which bytes of which safetensors files a .pt2 means, and where these files may be.

A .pt2 comes from anywhere, so what it names is followed by one rule: a plain relative path, to a safetensors file
inside the .pt2's own folder, or inside a folder (or to a file) that the user names. The file must be the one that was
referred to: same size, same header, same samples of its data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from t3compile.errors import WeightsError, first_line
from t3compile.mapped_files import Extent, MappedFile, TensorAt, sample_fingerprint, tensor_at

if TYPE_CHECKING:
    import torch

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class ReferencedFile:
    """A safetensors file as a .pt2 names it: relative to the .pt2's folder, with '/' between parts."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class WeightReferences:
    """Files, and for each weight the file's number and the byte at which it begins."""

    files: tuple[ReferencedFile, ...]
    tensors: Mapping[str, tuple[int, int]]

    def dumps(self) -> str:
        files = [{"name": file.name, "bytes": file.nbytes, "sha256": file.sha256} for file in self.files]
        return json.dumps({"files": files, "tensors": self.tensors})

    @classmethod
    def loads(cls, text: str) -> WeightReferences:
        """Raises ValueError with the reason where the text is no such thing, or names a file it must not."""
        try:
            content = json.loads(text)
            files = tuple(_read_file(entry) for entry in content["files"])
            tensors = {str(name): _read_place(place, len(files)) for name, place in content["tensors"].items()}
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no table of references ({type(error).__name__})") from None
        return cls(files, tensors)


def _read_file(entry: Mapping[str, Any]) -> ReferencedFile:
    name, nbytes, sha256 = entry["name"], entry["bytes"], entry["sha256"]
    if not isinstance(name, str) or not _is_plain(name):
        raise ValueError(f"it refers to {str(name)[:80]!r}, which is no plain path inside its folder")
    if type(nbytes) is not int or not isinstance(sha256, str) or len(sha256) != 64 or not set(sha256) <= _HEX:
        raise ValueError(f"its reference to '{name}' has no size or fingerprint")
    return ReferencedFile(name, nbytes, sha256)


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    is_printable = name.isprintable() and not set(name) & set('\\:*?"<>|')
    return is_printable and name.endswith(".safetensors") and not {"", ".", ".."} & set(parts)


def _read_place(place: Any, files: int) -> tuple[int, int]:
    number, begin = place
    if type(number) is not int or type(begin) is not int or not 0 <= number < files or begin < 0:
        raise ValueError("it refers to a file that it does not list")
    return number, begin


def refer(extents: Mapping[str, Extent], folder: Path) -> WeightReferences:
    """References to weights in safetensors files from a .pt2 in ``folder``.

    A file inside the folder is named by its path from there, another by its name alone. WeightsError where a file was
    replaced, or two have one name.
    """
    opened = list({extent.file.address: extent.file for extent in extents.values()}.values())
    files = tuple(_referenced(file, folder) for file in opened)
    for i, file in enumerate(files):
        if file.name in (other.name for other in files[:i]):
            raise WeightsError(
                f"two files of weights are called '{file.name}' and cannot both be referred to; rename one, or store "
                "the weights inside"
            )
    numbers = {file.address: i for i, file in enumerate(opened)}
    return WeightReferences(files, {name: (numbers[e.file.address], e.offset) for name, e in extents.items()})


def _referenced(file: MappedFile, folder: Path) -> ReferencedFile:
    if not file.is_in_place():
        raise WeightsError(f"'{file.path}' was changed while it was used; load the model again")
    if not _is_plain(file.path.name):
        raise WeightsError(f"'{file.path}' cannot be referred to: its name must be plain and end in '.safetensors'")
    parent = file.path.parent.resolve()
    inside = parent.is_relative_to(folder.resolve())
    relative = (parent / file.path.name).relative_to(folder.resolve()) if inside else Path(file.path.name)
    name = relative.as_posix() if _is_plain(relative.as_posix()) else file.path.name
    return ReferencedFile(name, file.nbytes, sample_fingerprint(file.path))


def whole_tensors(extents: Mapping[str, Extent], dtypes: Mapping[str, torch.dtype]) -> dict[str, Extent]:
    """Those extents that are one tensor of a safetensors file, or part of one, with these dtypes."""
    files = {extent.file.address: extent.file for extent in extents.values()}
    finders = {address: _tensor_at(file) for address, file in files.items()}
    return {
        name: extent
        for name, extent in extents.items()
        if (find := finders[extent.file.address]) and find(extent.offset, extent.nbytes) == dtypes[name]
    }


def _tensor_at(file: MappedFile) -> TensorAt | None:
    """See tensor_at; None for what is no safetensors file."""
    try:
        return tensor_at(file.path)
    except (OSError, ValueError):
        return None


def open_references(references: WeightReferences, archive: Path, named: Sequence[Path] = ()) -> tuple[MappedFile, ...]:
    """The referenced files, mapped. ``named`` are folders or files that the user gave.

    WeightsError, naming the file, where one is missing, lies outside, or is another than was referred to.
    """
    return tuple(_open(file, references.files, archive, named) for file in references.files)


def _open(wanted: ReferencedFile, files: Sequence[ReferencedFile], archive: Path, named: Sequence[Path]) -> MappedFile:
    path = next((path for path in _candidates(wanted, archive, named) if path.is_file()), None)
    if path is None:
        looked = ", ".join(f"'{folder}'" for folder in named or (archive.resolve().parent,))
        raise WeightsError(
            f"'{archive}' holds its weights by reference to {len(files)} files, and '{wanted.name}' is not in "
            f"{looked}; name the folder that has it with --weights"
        )
    if not named and not path.resolve().is_relative_to(archive.resolve().parent):
        raise WeightsError(
            f"'{archive}' refers to '{wanted.name}', which leads out of its folder: such a file is read only from a "
            "folder that you name with --weights"
        )
    try:
        file = MappedFile.open(path)
        is_same = file.nbytes == wanted.nbytes and sample_fingerprint(path) == wanted.sha256
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read '{path}' as safetensors ({first_line(error)}); copy it again") from None
    if not is_same:
        raise WeightsError(
            f"'{path}' is not the file that '{archive}' refers to: its size or content has changed; name the folder of "
            "the one that the model was rewritten from with --weights, or rewrite again"
        )
    return file


def _candidates(wanted: ReferencedFile, archive: Path, named: Sequence[Path]) -> list[Path]:
    relative = PurePosixPath(wanted.name)
    if not named:
        return [archive.resolve().parent / relative]
    folders = [path for path in named if path.is_dir()]
    given = [path for path in named if path.name == relative.name]
    return [*given, *(folder / relative for folder in folders), *(folder / relative.name for folder in folders)]
