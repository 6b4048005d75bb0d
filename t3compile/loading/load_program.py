"""MODEL -> Program, whatever MODEL is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from t3compile.errors import ModelFileError
from t3compile.inputs import VideoSize, read_inputs
from t3compile.loading.load_archive import load_archive
from t3compile.loading.load_diffusers import load_diffusers
from t3compile.loading.load_factory import load_factory
from t3compile.loading.load_pickle import load_pickle
from t3compile.loading.recognize import Kind, recognize
from t3compile.program import Program

_KIND_TEXT: dict[Kind, str] = {
    "pt2": "a .pt2 archive",
    "pickle": "a pickled model",
    "factory": "a factory",
    "diffusers": "a diffusers folder",
}


def load_program(
    model: str | Path,
    *,
    trust_pickle: bool = False,
    inputs: str | Path | Mapping[str, Tensor] | None = None,
    weights: str | Path | Sequence[str | Path] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    size: VideoSize | None = None,
) -> Program:
    """Load MODEL: a ``.pt2``, a diffusers folder, a pickled ``.pt`` or ``package.module:factory``.

    inputs: a file (.pt, .npz, .safetensors) or tensors by name. weights: safetensors files for a diffusers
    folder, or the folder (or files) with the weights that a ``.pt2`` refers to. random_weights, seed,
    dtype ("float32", "float16", "bfloat16") and size (pixels) are for diffusers folders. What does not
    apply is an error.
    Raises ModelFileError, InputsError, WeightsError, TraceError or MissingExtraError.
    """
    recognized = recognize(model)
    if recognized.kind != "diffusers":
        _refuse_diffusers_options(
            recognized.name,
            recognized.kind,
            {
                "--weights": weights is not None and recognized.kind != "pt2",
                "--random-weights": random_weights,
                "--seed": seed != 0,
                "--dtype": dtype is not None,
                "--frames, --height, --width and --text-tokens": size is not None,
            },
        )
    files = [weights] if isinstance(weights, str | Path) else weights
    named = read_inputs(inputs) if isinstance(inputs, str | Path) else inputs
    match recognized.kind:
        case "pt2":
            given = [Path(file) for file in files or ()]
            return load_archive(recognized.path, trust_pickle=trust_pickle, inputs=named, weights=given)
        case "pickle":
            return load_pickle(recognized.path, trust_pickle=trust_pickle, inputs=named)
        case "factory":
            return load_factory(recognized.name, inputs=named)
        case "diffusers":
            return load_diffusers(
                recognized.path,
                inputs=named,
                weights=files,
                random_weights=random_weights,
                seed=seed,
                dtype=dtype,
                size=size,
            )


def _refuse_diffusers_options(name: str, kind: Kind, given: Mapping[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given:
            raise ModelFileError(
                f"'{name}' is {_KIND_TEXT[kind]}, to which {option} cannot be applied; "
                "leave it out, or give a diffusers folder as MODEL"
            )
