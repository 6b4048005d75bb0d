"""Inputs: files, sizes in pixels, and binding to a program's signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from t3compile.errors import InputsError
from t3compile.inputs import (
    VideoSize,
    bind_inputs,
    call_inputs,
    diffusers_inputs,
    named_inputs,
    read_inputs,
    vae_factors,
)
from t3compile.program import Program, trace
from tests.tiny_models import WAN_VAE_CONFIG, HandWrittenDiT, tiny_wan

TENSORS = {"x": torch.randn(2, 3), "t": torch.tensor([1, 2])}


@pytest.fixture(scope="module")
def program() -> Program:
    model = HandWrittenDiT(layers=1)
    x, t, text = model.example_inputs()
    return trace(model.eval(), (x, t), {"text": text})


def _same(named: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return named.keys() == expected.keys() and all(
        torch.equal(named[name], tensor) and named[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_every_file_kind_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.bin")
    np.savez(tmp_path / "b.npz", x=TENSORS["x"].numpy(), t=TENSORS["t"].numpy())
    (tmp_path / "b.npz").rename(tmp_path / "b.pt")
    save_file(TENSORS, tmp_path / "c.npz")
    for name in ("a.bin", "b.pt", "c.npz"):
        assert _same(read_inputs(tmp_path / name), TENSORS), name


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ((TENSORS["x"], TENSORS["t"]), {"0": "x", "1": "t"}),
        ([TENSORS["x"]], {"0": "x"}),
        (TENSORS["x"], {"0": "x"}),
        ({"args": (TENSORS["x"],), "kwargs": {"t": TENSORS["t"]}}, {"0": "x", "t": "t"}),
    ],
)
def test_positional_inputs_are_numbered(tmp_path: Path, content: Any, names: dict[str, str]) -> None:
    torch.save(content, tmp_path / "in.pt")
    expected = {name: TENSORS[source] for name, source in names.items()}
    assert _same(read_inputs(tmp_path / "in.pt"), expected)


def test_scalars_and_bfloat16_keep_shape_and_dtype(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", t=np.float32(3.5))
    assert read_inputs(tmp_path / "a.npz")["t"].shape == ()
    save_file({"x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "b")
    assert read_inputs(tmp_path / "b")["x"].dtype == torch.bfloat16


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"x": _Evil(marker)}, tmp_path / "evil.pt")
    evil: Any = np.array([_Evil(marker)], dtype=object)
    np.savez(tmp_path / "evil.npz", x=evil)
    torch.save({"x": 3}, tmp_path / "number.pt")
    torch.save({}, tmp_path / "none.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.npz").write_text("hello, this is text")
    torch.save(TENSORS, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-40])
    save_file(TENSORS, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-4])
    names = ["evil.pt", "evil.npz", "number.pt", "none.pt", "empty.pt", "text.npz", "cut.pt", "cut"]
    for name in [*names, "absent.pt"]:
        with pytest.raises(InputsError) as raised:
            read_inputs(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not marker.exists()


def test_latent_sizes_of_the_published_4k_size() -> None:
    size = VideoSize(81, 2176, 3840)
    assert size.latent_sizes((4, 8, 8), (1, 2, 2)) == (21, 272, 480)
    assert size.latent_sizes((4, 16, 16), (1, 2, 2)) == (21, 136, 240)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (VideoSize(80, 480, 832), "frames 80 must be 4*k + 1 .* use 77 or 81"),
        (VideoSize(81, 490, 832), "height 490 must be a multiple of 16 .* use 480 or 496"),
        (VideoSize(81, 480, 8), "width 8 must be a multiple of 16 .* use 16"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest(size: VideoSize, message: str) -> None:
    with pytest.raises(InputsError, match=message.replace("*k +", r"\*k \+")):
        size.latent_sizes((4, 8, 8), (1, 2, 2))


def test_video_size_must_be_positive() -> None:
    with pytest.raises(InputsError, match="height 0 must be at least 1"):
        VideoSize(height=0)
    with pytest.raises(InputsError, match="VAE factors 4x0x8"):
        VideoSize(vae_factors=(4, 0, 8))


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        (WAN_VAE_CONFIG, (4, 8, 8)),
        ({"scale_factor_temporal": 4, "scale_factor_spatial": 16, "patch_size": 2}, (4, 16, 16)),
        ({"temporal_compression_ratio": 8, "spatial_compression_ratio": 32}, (8, 32, 32)),
        ({"z_dim": 16}, None),
        (None, None),
    ],
)
def test_vae_factors_come_from_the_fields(config: Any, factors: Any) -> None:
    assert vae_factors(config) == factors


def _config(model: Any) -> dict[str, Any]:
    return dict(model.config)


def test_diffusers_inputs_follow_config_and_vae() -> None:
    model, _ = tiny_wan(layers=1)
    config = _config(model)
    size = VideoSize(9, 64, 96, text_tokens=3, batch=2)
    inputs, notes = diffusers_inputs(model, config, size, WAN_VAE_CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    assert shapes == {
        "hidden_states": (2, 4, 3, 8, 12),
        "timestep": (2,),
        "encoder_hidden_states": (2, 3, 16),
    }
    assert notes == ()
    again, _ = diffusers_inputs(model, config, size, WAN_VAE_CONFIG)
    assert _same(inputs, again)
    overridden = VideoSize(9, 64, 96, vae_factors=(2, 16, 16))
    inputs, notes = diffusers_inputs(model, config, overridden, WAN_VAE_CONFIG)
    assert inputs["hidden_states"].shape[2:] == (5, 4, 6)
    assert notes == ()


def test_assumed_sizes_and_factors_are_noted() -> None:
    model, _ = tiny_wan(layers=1)
    inputs, notes = diffusers_inputs(model, _config(model), None, None)
    assert inputs["hidden_states"].shape == (1, 4, 21, 60, 104)
    assert "81 frames of 480x832 pixels" in notes[0]
    assert "4x8x8" in notes[1]


def test_image_conditioned_models_get_image_tokens() -> None:
    model, _ = tiny_wan(layers=1, image_dim=8, added_kv_proj_dim=24)
    size = VideoSize(5, 32, 32)
    inputs, _ = diffusers_inputs(model, _config(model), size, WAN_VAE_CONFIG)
    assert inputs["encoder_hidden_states_image"].shape == (1, 257, 8)
    trace(model, (), inputs)


def test_another_calling_convention_is_refused_with_what_forward_needs() -> None:
    class Other(nn.Module):
        def forward(self, latents: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
            return latents * sigma

    with pytest.raises(InputsError, match=r"needs latents, sigma: .*--inputs FILE"):
        diffusers_inputs(Other(), {"_class_name": "Other"}, VideoSize(), None)


def test_call_inputs_fit_forward() -> None:
    model = HandWrittenDiT(layers=1)
    x, t, text = model.example_inputs()
    args, kwargs = call_inputs(model, {"1": t, "0": x, "text": text}, "it")
    assert args[0] is x
    assert args[1] is t
    assert kwargs == {"text": text}
    with pytest.raises(InputsError, match="missing t; unknown sigma; forward takes x, t, text"):
        call_inputs(model, {"0": x, "text": text, "sigma": t}, "it")
    with pytest.raises(InputsError, match="unknown 3"):
        call_inputs(model, {"0": x, "1": t, "2": text, "3": text}, "it")
    with pytest.raises(InputsError, match="given twice x"):
        call_inputs(model, {"0": x, "1": t, "x": x, "text": text}, "it")


@pytest.mark.parametrize("names", [("x", "t", "text"), ("0", "1", "text"), ("x", "1", "text")])
def test_bind_inputs_by_every_name(program: Program, names: tuple[str, str, str]) -> None:
    tensors = HandWrittenDiT(layers=1).example_inputs()
    args, kwargs = bind_inputs(program, dict(zip(names, tensors, strict=True)))
    assert args == tensors[:2]
    assert kwargs == {"text": tensors[2]}
    assert program.module()(*args, **kwargs).shape == tensors[0].shape


def test_named_inputs_round_trip(program: Program) -> None:
    named = named_inputs(program)
    assert list(named) == ["x", "t", "text"]
    args, kwargs = bind_inputs(program, named)
    assert args == program.example_inputs[0]
    assert kwargs == program.example_inputs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text": None},
            r"input 'text' is missing; .* x \[1, 4, 3, 8, 8\] float32, t \[1\] float32",
        ),
        ({"y": torch.ones(1)}, "unknown input 'y'"),
        ({"0": torch.ones(1, 4, 3, 8, 8)}, "input 'x' is given twice, as x and 0"),
        ({"t": torch.ones(2)}, r"input 't' has shape \[2\], expected \[1\]"),
        ({"t": torch.ones(1).double()}, "input 't' has dtype float64, expected float32"),
    ],
)
def test_bind_inputs_names_the_mistake(program: Program, change: dict[str, Any], message: str) -> None:
    named = {**named_inputs(program), **change}
    with pytest.raises(InputsError, match=message):
        bind_inputs(program, {name: value for name, value in named.items() if value is not None})


def test_constants_of_the_trace_are_filled_in() -> None:
    class Scaled(nn.Module):
        def forward(self, parts: list[Tensor], scale: float, *, b: Tensor, a: Tensor) -> Tensor:
            return parts[0] * scale + parts[1] - 2 * b + a

    parts, a, b = [torch.ones(2), torch.zeros(2)], torch.full((2,), 3.0), torch.ones(2)
    scaled = trace(Scaled(), (parts, 2.0), {"a": a, "b": b})
    named = named_inputs(scaled)
    args, kwargs = bind_inputs(scaled, named)
    assert args[1] == 2.0
    assert torch.equal(scaled.module()(*args, **kwargs), torch.full((2,), 3.0))
