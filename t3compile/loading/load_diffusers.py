"""A diffusers folder -> Program, traced with fake parameters; weights stay on disk until they are
needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t3compile.errors import InputsError, MissingExtraError, ModelFileError, WeightsError, first_line
from t3compile.inputs import VideoSize, call_inputs, diffusers_inputs
from t3compile.loading.find_weights import find_weight_files, map_weight_files
from t3compile.loading.recognize import read_config
from t3compile.mapped_files import MappedTensors
from t3compile.program import Program, default_dtype
from t3compile.tracing import trace
from t3compile.weights import (
    NoWeights,
    OverlaidWeights,
    RandomWeights,
    TensorWeights,
    Weights,
    check_weights,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_diffusers(
    folder: Path,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    weights: Sequence[str | Path] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    size: VideoSize | None = None,
) -> Program:
    """Trace the model of a diffusers folder (config.json) in eval mode, with ``return_dict=False``.

    Weights come from ``weights`` (diffusers' or the original naming), else from the folder, else
    the program has none. dtype None: the one most values in the files have; float32 without files.
    """
    _check_options(weights, random_weights, seed, dtype, inputs, size)
    config = read_config(folder)
    cls = _find_class(folder, config)
    files = [] if random_weights else [Path(file) for file in weights or find_weight_files(folder)]
    given = map_weight_files(files)
    chosen = _DTYPES[dtype] if dtype else _most_common_dtype(given.tensors)
    module = _build(folder, cls, config, chosen)
    if "return_dict" in inspect.signature(module.forward).parameters:
        module.forward = functools.partial(module.forward, return_dict=False)
    notes: tuple[str, ...] = ()
    if inputs is not None:
        args, kwargs = call_inputs(module, inputs, str(folder))
    else:
        args = ()
        # The built module's own configuration has the defaults that the file leaves out.
        complete = {**config, **getattr(module, "config", {})}
        kwargs, notes = diffusers_inputs(module, complete, size, _vae_config(folder))
    source = _weights_for(module, cls, folder, given, bool(files), seed if random_weights else None)
    program = trace(module, args, kwargs, weights=source, source=str(folder))
    return replace(program, notes=(*_folder_notes(folder), *notes, *program.notes))


def _check_options(
    weights: Sequence[str | Path] | None,
    random_weights: bool,
    seed: int,
    dtype: str | None,
    inputs: Mapping[str, Tensor] | None,
    size: VideoSize | None,
) -> None:
    if weights is not None and random_weights:
        raise WeightsError("--weights and --random-weights exclude each other; give one of them")
    if seed and not random_weights:
        raise WeightsError(f"--seed {seed} is for --random-weights; add it, or leave the seed out")
    if inputs is not None and size is not None:
        raise InputsError(
            "--inputs and sizes in pixels (--frames, --height, --width, --text-tokens) exclude "
            "each other; "
            "give one of them"
        )
    if dtype is not None and dtype not in _DTYPES:
        raise ModelFileError(f"dtype '{dtype}' is not one of {', '.join(_DTYPES)}")


def _find_class(folder: Path, config: Mapping[str, Any]) -> Any:
    """The diffusers model class that config.json names."""
    for package in ("diffusers", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "diffusers", f"loading the diffusers folder '{folder}'")
    import diffusers

    name = config["_class_name"]
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelFileError(
            f"'{folder / 'config.json'}' names the class {name!r}, which is no model of diffusers "
            f"{diffusers.__version__}; give the model in diffusers format (weights in the "
            f"original naming go to "
            "--weights)"
        )
    return cls


def _build(folder: Path, cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The module with fake parameters of their final dtypes; buffers are real."""
    import accelerate

    try:
        with accelerate.init_empty_weights(include_buffers=False), default_dtype(dtype):
            module: nn.Module = cls.from_config(copy.deepcopy(dict(config)))
    except Exception as error:
        raise ModelFileError(
            f"diffusers cannot build {cls.__name__} from '{folder / 'config.json'}' "
            f"({type(error).__name__}: {first_line(error)}); mend the configuration"
        ) from error
    kept = cls._keep_in_fp32_modules or []
    kept = [kept] if isinstance(kept, str) else kept
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for owner_name, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            path = f"{owner_name}.{name}".split(".")
            is_float = parameter.is_floating_point()
            final = torch.float32 if any(part in kept for part in path) else dtype
            with mode:
                fake = torch.empty(parameter.shape, dtype=final if is_float else parameter.dtype)
            owner._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return module.eval()


def _most_common_dtype(given: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most values have; float32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for tensor in given.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    if most not in _DTYPES.values():
        raise WeightsError(
            f"most weights are {str(most).removeprefix('torch.')}, which models are not run in; "
            f"give --dtype, one of {', '.join(_DTYPES)}"
        )
    return most


def _weights_for(
    module: nn.Module,
    cls: Any,
    folder: Path,
    given: MappedTensors,
    has_files: bool,
    seed: int | None,
) -> Weights:
    parameters = dict(module.named_parameters())
    # Persistent buffers that a checkpoint lacks keep the values that the module computed.
    buffers = {name: t for name, t in module.state_dict().items() if name not in parameters}
    if seed is not None:
        found: Weights = RandomWeights({name: (tuple(t.shape), t.dtype) for name, t in parameters.items()}, seed)
    elif not has_files:
        found = NoWeights(
            tuple(parameters),
            f"'{folder}' has no *.safetensors; download them, or give --weights FILE or --random-weights",
        )
    else:
        renamed = _in_diffusers_naming(cls, module, given.tensors, {*parameters, *buffers})
        ignored = cls._keys_to_ignore_on_load_unexpected or []
        known = {
            name: tensor
            for name, tensor in renamed.items()
            if name in parameters or name in buffers or not any(key in name for key in ignored)
        }
        expected = {**parameters, **{name: t for name, t in buffers.items() if name in known}}
        check_weights({name: tuple(t.shape) for name, t in expected.items()}, known)
        dtypes = {name: t.dtype for name, t in expected.items() if t.is_floating_point()}
        found = TensorWeights(known, dtypes, given.files)
    return OverlaidWeights(found, TensorWeights(buffers)) if buffers else found


def _in_diffusers_naming(
    cls: Any, module: nn.Module, given: Mapping[str, Tensor], names: set[str]
) -> Mapping[str, Tensor]:
    """`given`, renamed by diffusers' single-file conversion when more names fit that way; nothing
    is read.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    matching = len(names & given.keys())
    classes: dict[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
    entry = classes.get(cls.__name__)
    if matching == len(names) or entry is None:
        return given
    config = dict(getattr(module, "config", {}))
    try:
        renamed: dict[str, Tensor] = entry["checkpoint_mapping_fn"](checkpoint=dict(given), config=config)
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError):
        # Not in the original naming either: the caller lists what is missing.
        return given
    return renamed if len(names & renamed.keys()) > matching else given


def _vae_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the VAE in the same pipeline folder."""
    beside = folder.resolve().parent / "vae"
    return read_config(beside) if (beside / "config.json").is_file() else None


def _folder_notes(folder: Path) -> tuple[str, ...]:
    second = folder.parent / "transformer_2"
    if folder.name == "transformer" and (second / "config.json").is_file():
        return (f"this pipeline has a second transformer, which is compiled on its own: '{second}'",)
    return ()
