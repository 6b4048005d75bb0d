"""Example inputs: read from files, built from a diffusers configuration, or bound to a program's
signature.
"""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.utils import _pytree as pytree

from t3compile.errors import InputsError
from t3compile.program import Inputs, Program, user_input_names

DEFAULT_VAE_FACTORS = (4, 8, 8)
# CLIP image tokens of Wan's image-to-video models, unless the configuration says otherwise.
_IMAGE_TOKENS = 257
_TEXT_FIELDS = ("text_dim", "text_embed_dim", "cross_attention_dim", "caption_channels")
_SEED = 0


@dataclass(frozen=True)
class VideoSize:
    """A video in pixels, its text tokens and batch; ``vae_factors`` (time, height, width) override
    the VAE's.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    text_tokens: int = 512
    batch: int = 1
    vae_factors: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        counts = {
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "text tokens": self.text_tokens,
            "batch": self.batch,
        }
        for name, count in counts.items():
            if count < 1:
                raise InputsError(f"{name} {count} must be at least 1")
        if self.vae_factors is not None and min(self.vae_factors) < 1:
            raise InputsError(f"VAE factors {_sizes(self.vae_factors)} must each be at least 1")

    def latent_sizes(self, vae_factors: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """Latent (T, H, W) before patchify; InputsError with the nearest valid sizes when they do
        not divide.
        """
        frame_step = vae_factors[0] * patch[0]
        first_frames = vae_factors[0] * (patch[0] - 1) + 1
        axes = (
            ("frames", self.frames, frame_step, first_frames),
            ("height", self.height, vae_factors[1] * patch[1], vae_factors[1] * patch[1]),
            ("width", self.width, vae_factors[2] * patch[2], vae_factors[2] * patch[2]),
        )
        for name, given, step, first in axes:
            if given < first or (given - first) % step:
                rule = f"{step}*k + {first}" if name == "frames" else f"a multiple of {step}"
                raise InputsError(
                    f"{name} {given} must be {rule} for VAE factors {_sizes(vae_factors)} and "
                    f"patch "
                    f"{_sizes(patch)}: use {_nearest(given, step, first)}"
                )
        time, height, width = vae_factors
        return (self.frames - 1) // time + 1, self.height // height, self.width // width


def _nearest(given: int, step: int, first: int) -> str:
    below = first + (given - first) // step * step
    return str(first) if below < first else f"{below} or {below + step}"


def _sizes(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def read_inputs(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .pt (tensors only, no code run), .npz or .safetensors file, told by
    content.

    Positional inputs are named "0", "1", ...: a .pt file may hold a dict of tensors, a tuple or
    list of tensors, or ``{"args": (...), "kwargs": {...}}``. Raises InputsError.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise InputsError(f"cannot read the inputs '{path}': {error.strerror or error}") from None
    if head[8:] == b"{":
        content: object = _read_safetensors(path)
    elif head.startswith(b"PK") and _is_npz(path):
        content = _read_npz(path)
    else:
        content = _read_tensors(path)
    named = _name_tensors(content, path)
    if not named:
        raise InputsError(f"the inputs '{path}' hold no tensor")
    return named


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise InputsError(f"the inputs '{path}' are truncated or damaged; copy them again") from None
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputsError(
            f"cannot read the inputs '{path}' as safetensors ({error}); copy or save them again"
        ) from None
    return tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name: torch.from_numpy(np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape))
                for name in arrays.files
            }
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputsError(
            f"cannot read the inputs '{path}' as .npz ({error}); save plain numeric arrays with numpy.savez"
        ) from None


def _read_tensors(path: Path) -> object:
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputsError(
            f"the inputs '{path}' hold more than tensors, or are no inputs at all; "
            "save a dict of tensors with torch.save, numpy.savez or safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputsError(
            f"the inputs '{path}' are damaged or no .pt, .npz or .safetensors file "
            f"({type(error).__name__}); "
            "save them again"
        ) from None
    return content


def _name_tensors(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        content = (content,)
    if isinstance(content, dict) and content and set(content) <= {"args", "kwargs"}:
        parts = (content.get("args", ()), content.get("kwargs", {}))
        if isinstance(parts[0], tuple | list) and isinstance(parts[1], dict):
            content = {**{str(i): value for i, value in enumerate(parts[0])}, **parts[1]}
    if isinstance(content, tuple | list):
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, dict):
        raise InputsError(f"the inputs '{path}' hold {type(content).__name__}; save a dict of tensors by input name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputsError(
                f"the inputs '{path}' hold {type(value).__name__} at '{name}'; every input must be a tensor"
            )
    return dict(content)


def call_inputs(module: nn.Module, named: Mapping[str, Tensor], source: str) -> Inputs:
    """(args, kwargs) for a module's forward; InputsError lists what is missing or unknown.

    Names are those of forward's parameters, or "0", "1", ... for positional inputs.
    """
    numbered = sorted((name for name in named if name.isdecimal()), key=int)
    args = tuple(named[name] for name in numbered)
    kwargs = {name: tensor for name, tensor in named.items() if not name.isdecimal()}
    parameters = inspect.signature(module.forward).parameters.values()
    named_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_any = {parameter.kind for parameter in parameters} - set(named_kinds)
    accepted = [parameter.name for parameter in parameters if parameter.kind in named_kinds]
    given = {*accepted[: len(args)], *kwargs}
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.kind in named_kinds and parameter.default is parameter.empty and parameter.name not in given
    ]
    unknown = [] if takes_any else sorted(set(kwargs) - set(accepted))
    if not takes_any and len(args) > len(accepted):
        unknown = numbered[len(accepted) :]
    twice = sorted(set(kwargs) & set(accepted[: len(args)]))
    problems = [
        f"{kind} {', '.join(names)}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("given twice", twice))
        if names
    ]
    if problems:
        raise InputsError(
            f"the inputs do not fit {source}: {'; '.join(problems)}; forward takes "
            f"{', '.join(accepted) or 'no names'}; give them with --inputs FILE"
        )
    return args, kwargs


def diffusers_inputs(
    module: nn.Module,
    config: Mapping[str, Any],
    size: VideoSize | None,
    vae_config: Mapping[str, Any] | None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Seeded example inputs of a video DiT of Wan's calling convention, and notes on what was
    assumed.

    hidden_states [B, in_channels, T, H, W], timestep [B], encoder_hidden_states [B, text_tokens,
    text_dim]; told by forward's parameters and the configuration's fields, not by the model's name.
    Raises InputsError.
    """
    notes = []
    if size is None:
        size = VideoSize()
        notes.append(
            f"no size was given: using {size.frames} frames of {size.height}x{size.width} pixels "
            f"and "
            f"{size.text_tokens} text tokens (--frames, --height, --width, --text-tokens)"
        )
    patch_embedding = _find_patch_embedding(module, config)
    text_width: int | None = next((config[field] for field in _TEXT_FIELDS if _is_count(config.get(field))), None)
    patch = _patch_sizes(config)
    _check_calling_convention(
        module, config, patch_embedding is not None and patch is not None and text_width is not None
    )
    assert patch_embedding is not None
    assert patch is not None
    assert text_width is not None
    factors = size.vae_factors or vae_factors(vae_config)
    if factors is None:
        factors = DEFAULT_VAE_FACTORS
        notes.append(
            f"no VAE configuration was found beside the model: using VAE factors {_sizes(factors)} "
            "(time x height x width)"
        )
    dtype = patch_embedding.weight.dtype
    latent = size.latent_sizes(factors, patch)
    generator = torch.Generator().manual_seed(_SEED)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {
        "hidden_states": noise(size.batch, patch_embedding.in_channels, *latent),
        "timestep": torch.full((size.batch,), 500.0),
        "encoder_hidden_states": noise(size.batch, size.text_tokens, text_width),
    }
    image_width = config.get("image_dim") or 0
    if image_width and "encoder_hidden_states_image" in _parameters(module):
        tokens = config.get("pos_embed_seq_len") or _IMAGE_TOKENS
        inputs["encoder_hidden_states_image"] = noise(size.batch, tokens, image_width)
    return inputs, tuple(notes)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _find_patch_embedding(module: nn.Module, config: Mapping[str, Any]) -> nn.Conv3d | None:
    """The convolution over [B, in_channels, T, H, W] that makes tokens."""
    return next(
        (
            child
            for child in module.modules()
            if isinstance(child, nn.Conv3d) and child.in_channels == config.get("in_channels")
        ),
        None,
    )


def _patch_sizes(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    patch, patch_t = config.get("patch_size"), config.get("patch_size_t")
    if isinstance(patch, list | tuple) and len(patch) == 3 and all(map(_is_count, patch)):
        return patch[0], patch[1], patch[2]
    if isinstance(patch, int) and _is_count(patch) and isinstance(patch_t, int) and _is_count(patch_t):
        return patch_t, patch, patch
    return None


def _check_calling_convention(module: nn.Module, config: Mapping[str, Any], has_fields: bool) -> None:
    known = {"hidden_states", "timestep", "encoder_hidden_states"}
    parameters = _parameters(module)
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if has_fields and known <= set(parameters) and set(required) <= known:
        return
    raise InputsError(
        f"no example inputs can be made for {config.get('_class_name', type(module).__name__)}, "
        f"whose forward needs "
        f"{', '.join(required)}: inputs are only made from sizes for models with a Conv3d patch "
        f"embedding, "
        f"the fields in_channels, patch_size and a text width, and "
        f"forward({', '.join(sorted(known))}); "
        "give them with --inputs FILE"
    )


def vae_factors(config: Mapping[str, Any] | None) -> tuple[int, int, int] | None:
    """How much a VAE shrinks (time, height, width), from the fields of its config.json; None when
    it does not say.
    """
    if config is None:
        return None
    time = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio")
    space = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio")
    # Wan's VAE spells it wrongly.
    downsample = config.get("temperal_downsample") or config.get("temporal_downsample")
    if isinstance(downsample, list | tuple):
        time = time or 2 ** sum(map(bool, downsample))
        space = space or 2 ** len(downsample) * (config.get("patch_size") or 1)
    if not isinstance(time, int | float) or not isinstance(space, int | float):
        return None
    return int(time), int(space), int(space)


@dataclass(frozen=True)
class _Leaf:
    """One position of a program's call: its placeholder, the names it goes by, and what it
    takes.
    """

    name: str
    aliases: tuple[str, ...]
    constant: object = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


def _leaves(program: Program) -> list[_Leaf]:
    """The program's inputs in call order, tensors (with a dtype) and constants."""
    exported = program.exported
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    positions = pytree.tree_unflatten(list(range(len(specs))), in_spec)
    args, kwargs = positions
    aliases: dict[int, list[str]] = {i: [] for i in range(len(specs))}
    signature = exported.module_call_graph[0].signature
    forward_names = (signature.forward_arg_names if signature else None) or []
    for number, position in enumerate(args):
        if isinstance(position, int):
            aliases[position].append(str(number))
            aliases[position].extend(forward_names[number : number + 1])
    for name, position in kwargs.items():
        if isinstance(position, int):
            aliases[position].append(name)
    leaves = []
    for i, spec in enumerate(specs):
        if isinstance(spec.arg, TensorArgument):
            value = values[spec.arg.name]
            assert isinstance(value, Tensor)
            names = tuple(dict.fromkeys([spec.arg.name, *aliases[i]]))
            leaves.append(_Leaf(spec.arg.name, names, None, tuple(value.shape), value.dtype))
        else:
            constant = spec.arg.value if isinstance(spec.arg, ConstantArgument) else None
            leaves.append(_Leaf(spec.arg.name, (), constant))
    return leaves


def bind_inputs(program: Program, named: Mapping[str, Tensor]) -> Inputs:
    """(args, kwargs) of the program's call from tensors by name; constants of the trace are filled
    in.

    An input goes by its placeholder's name, by forward's own name for it, or, if positional, by
    "0", "1", ...
    Raises InputsError naming the input, what came and what is expected.
    """
    leaves = _leaves(program)
    in_spec = program.exported.call_spec.in_spec
    assert in_spec is not None
    tensors = [leaf for leaf in leaves if leaf.dtype is not None]
    expected = ", ".join(f"{leaf.name} {list(leaf.shape)} {_dtype(leaf.dtype)}" for leaf in tensors)
    known = {alias for leaf in tensors for alias in leaf.aliases}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise InputsError(f"unknown input '{unknown[0]}'; the program's inputs are {expected}")
    values: list[object] = []
    for leaf in leaves:
        if leaf.dtype is None:
            values.append(leaf.constant)
            continue
        given = [name for name in leaf.aliases if name in named]
        if len(given) != 1:
            problem = f"is given twice, as {' and '.join(given)}" if given else "is missing"
            raise InputsError(f"input '{leaf.name}' {problem}; the program's inputs are {expected}")
        values.append(_checked(leaf, named[given[0]]))
    args, kwargs = pytree.tree_unflatten(values, in_spec)
    return tuple(args), dict(kwargs)


def frozen_arguments(program: Program) -> dict[str, object]:
    """The arguments that are constants of the trace (bools, numbers, text, None), by forward's names."""
    return {leaf.name: leaf.constant for leaf in _leaves(program) if leaf.dtype is None}


def _checked(leaf: _Leaf, tensor: Tensor) -> Tensor:
    if tuple(tensor.shape) != leaf.shape:
        raise InputsError(
            f"input '{leaf.name}' has shape {list(tensor.shape)}, expected {list(leaf.shape)}; "
            "the program has static shapes"
        )
    if tensor.dtype != leaf.dtype:
        raise InputsError(
            f"input '{leaf.name}' has dtype {_dtype(tensor.dtype)}, expected {_dtype(leaf.dtype)}; convert it"
        )
    return tensor


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def named_inputs(program: Program) -> dict[str, Tensor]:
    """The example inputs by placeholder name; InputsError when the program has none."""
    names = user_input_names(program.exported)
    args, kwargs = program.example_inputs
    in_spec = program.exported.call_spec.in_spec
    assert in_spec is not None
    if names and not args and not kwargs:
        raise InputsError(f"{program.source} has no example inputs; give them with --inputs FILE")
    order = in_spec.child(1).context
    ordered = {name: kwargs[name] for name in order}
    values = pytree.tree_leaves((args, ordered))
    return {
        leaf.name: value
        for leaf, value in zip(_leaves(program), values, strict=True)
        if isinstance(value, Tensor) and leaf.dtype is not None
    }


def substitute_inputs(program: Program, named: Mapping[str, Tensor]) -> Inputs:
    """(args, kwargs) like the program's call with these tensors by placeholder name, of whatever
    shape.
    """
    in_spec = program.exported.call_spec.in_spec
    assert in_spec is not None
    values = [leaf.constant if leaf.dtype is None else named[leaf.name] for leaf in _leaves(program)]
    args, kwargs = pytree.tree_unflatten(values, in_spec)
    return tuple(args), dict(kwargs)
