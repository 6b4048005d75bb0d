"""Call an AOTInductor package like the model. Loading one runs the compiled code inside."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import EngineError, first_line
from t3compile.export.engine_inputs import EngineInput, bind_engine_inputs, check_tensor
from t3compile.export.processor import instruction_sets
from t3compile.export.write_aoti import AOTI_PROPERTY
from t3compile.loading.recognize import AOTI_FOLDER
from t3compile.program import quiet_torch

_REMEDY = "export it again with 't3compile export --target aoti'"


class AotiEngine:
    """A package that write_aoti wrote, called with tensors (of any device) or arrays, by position or by input name.

    The compiled code checks nothing, so shapes and dtypes are checked here, and inputs are brought to the strides that
    it was compiled for. Returns torch tensors on the CPU: the only output, or a tuple of them. ``trust_code`` says that
    the file's compiled code may run; without it EngineError, and nothing of the file has run.
    """

    runtime = "aoti"

    def __init__(self, path: str | Path, trust_code: bool = False) -> None:
        path = Path(path)
        if not trust_code:
            raise EngineError(
                f"'{path}' is an AOTInductor package, compiled code that runs when it is loaded: if you trust where it "
                "comes from, add --trust-code (trust_code=True)"
            )
        described = _read_metadata(path)
        try:
            about = json.loads(described[AOTI_PROPERTY])
            self.inputs = tuple(
                EngineInput(str(one["name"]), tuple(map(int, one["shape"])), str(one["dtype"]))
                for one in about["inputs"]
            )
            self._strides = {str(one["name"]): tuple(map(int, one["strides"])) for one in about["inputs"]}
            self.output_names = tuple(map(str, about["outputs"]))
            self.frozen: dict[str, object] | None = dict(about["frozen"])
            written_by = str(about["torch"])
            built_for = tuple(map(str, about["processor"]))
        except (KeyError, TypeError, ValueError):
            raise EngineError(
                f"'{path}' does not tell the names, shapes and dtypes of its inputs, and compiled code checks none of "
                f"them: {_REMEDY}, or load it with torch._inductor.aoti_load_package"
            ) from None
        _check_machine(path, str(described.get("AOTI_DEVICE_KEY", "cpu")), built_for)
        self.notes = _version_notes(written_by)
        self._path = path
        self._loader = _load(path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = bind_engine_inputs(self.inputs, args, kwargs)
        tensors = [self._laid_out(spec, check_tensor(spec, given[spec.name]).cpu()) for spec in self.inputs]
        try:
            with torch.no_grad():
                outputs = list(self._loader.run(tensors))
        except Exception as error:
            raise EngineError(f"the package '{self._path}' cannot run: {first_line(error)}") from error
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _laid_out(self, spec: EngineInput, tensor: Tensor) -> Tensor:
        strides = self._strides[spec.name]
        if tensor.stride() == strides:
            return tensor
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _read_metadata(path: Path) -> dict[str, Any]:
    """The package's own description, read without loading it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inner = name.partition("/")[2]
                if inner.startswith(f"{AOTI_FOLDER}model/") and inner.endswith("_metadata.json"):
                    described = json.loads(archive.read(name))
                    if isinstance(described, dict):
                        return described
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise EngineError(f"'{path}' is a damaged AOTInductor package; copy it again, or {_REMEDY}") from None
    return {}


def _check_machine(path: Path, device: str, built_for: Collection[str]) -> None:
    """Refuse a package for another processor: its instructions would end the process."""
    if device != "cpu":
        raise EngineError(
            f"'{path}' was compiled for {device}, and runtime 'aoti' runs packages for the CPU; {_REMEDY}"
        )
    missing = sorted(set(built_for) - set(instruction_sets()))
    if missing:
        raise EngineError(
            f"'{path}' was compiled for a processor with {', '.join(missing)}, which this one does not have; export it "
            "on a machine like this one"
        )


def _version_notes(written_by: str) -> tuple[str, ...]:
    ours, theirs = (version.partition("+")[0] for version in (torch.__version__, written_by))
    if ours == theirs:
        return ()
    return (f"the package was compiled with torch {theirs} and runs in torch {ours}; export it again if it misbehaves",)


def _load(path: Path) -> Any:
    from torch._inductor import aoti_load_package

    try:
        # quiet: torch remarks on a file name that does not end in .pt2.
        with quiet_torch():
            return aoti_load_package(str(path)).loader
    except Exception as error:
        raise EngineError(
            f"torch {torch.__version__} cannot load the package '{path}' ({first_line(error)}); {_REMEDY}"
        ) from error
