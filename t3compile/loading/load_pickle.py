"""A ``.pt`` file written by torch.save -> Program."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import ModelFileError, first_line
from t3compile.loading.load_factory import current_folder_importable
from t3compile.loading.recognize import WEIGHTS_REMEDY
from t3compile.loading.trace_made import trace_made
from t3compile.program import Program

_STATE_KEYS = ("state_dict", "model", "module", "ema", "params")


def load_pickle(path: Path, *, trust_pickle: bool = False, inputs: Mapping[str, Tensor] | None = None) -> Program:
    """Unpickle an nn.Module, fx.GraphModule, or dict with module, args, kwargs, and trace it.

    Refused without ``trust_pickle``, since unpickling runs code; a file of bare weights is
    recognised first.
    """
    try:
        content = load_tensors_only(path)
    except pickle.UnpicklingError:
        pass
    else:
        raise ModelFileError(_refusal_of_data(path, content))
    if not trust_pickle:
        raise ModelFileError(
            f"'{path}' is a pickled model, and loading a pickle can run any code; "
            "if you trust where it comes from, add --trust-pickle"
        )
    with current_folder_importable():
        try:
            made = torch.load(path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            raise ModelFileError(
                f"'{path}' needs Python code that cannot be found ({first_line(error)}); "
                "run from the folder of that code, or install its package"
            ) from None
        except Exception as error:
            raise ModelFileError(
                f"'{path}' cannot be unpickled ({type(error).__name__}: {first_line(error)}); "
                "save it again with torch.save, or export it with torch.export"
            ) from error
        return trace_made(made, str(path), f"'{path}'", inputs)


def load_tensors_only(path: Path) -> object:
    """What a torch.save file holds, tensors mapped, no code run.

    Raises pickle.UnpicklingError when it holds more than tensors and plain containers,
    ModelFileError when damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if isinstance(error.__cause__, EOFError) or "truncated" in str(error):
            raise ModelFileError(f"'{path}' is truncated; copy it again") from None
        raise
    except Exception as error:
        raise ModelFileError(
            f"'{path}' is damaged or not a torch.save file ({first_line(error)}); copy it again"
        ) from None
    return content


def find_state_dict(content: object) -> dict[str, Tensor] | None:
    """The named tensors of a checkpoint, also one level down (``{"state_dict": {...}}``), or
    None.
    """
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return dict(content)
    nested: Any = next((content[key] for key in _STATE_KEYS if key in content), None)
    return find_state_dict(nested)


def _refusal_of_data(path: Path, content: object) -> str:
    if find_state_dict(content) is not None:
        return f"'{path}' is a bare state_dict and holds only weights; {WEIGHTS_REMEDY}"
    return (
        f"'{path}' holds {type(content).__name__} and no module; "
        "give it with --inputs if these are inputs, and as MODEL a file with the module"
    )
