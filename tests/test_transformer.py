"""An engine in the place of a pipeline's transformer: the pipeline runs unchanged and gives the same video."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import t3compile
from t3compile.errors import InputsError
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.torch_engine import TorchEngine

# --- a whole pipeline ----------------------------------------------------------------------------

PIXELS: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
TEXT = (7, 16)


def _pipeline() -> Any:
    pytest.importorskip("transformers", reason="diffusers' pipelines are importable with transformers only")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT[1],
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return _pipeline()


def _with(pipeline: Any, transformer: nn.Module) -> Any:
    """The pipeline with another transformer; all else is shared."""
    other = copy.copy(pipeline)
    other.transformer = transformer
    return other


def _generate(pipeline: Any, *, batch: int = 1, guidance: float = 4.0, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(2, batch, *TEXT, generator=generator)
    with torch.no_grad():
        frames: Tensor = pipeline(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            **{**PIXELS, **changes},
        ).frames
    return frames


@dataclass
class _Traced:
    """Programs of the call that the pipeline really makes: as it is, by splits (1,1,1), and by windows."""

    full: t3compile.Program
    identity: t3compile.Program
    windowed: t3compile.Program


def _traced(pipeline: Any, **options: Any) -> _Traced:
    with t3compile.capture(pipeline) as record:
        _generate(pipeline, **options)
    program = record.trace()
    survey = t3compile.detect(program)
    assert len(survey.found) == 2

    def rewritten(splits: list[tuple[int, int, int]]) -> t3compile.Program:
        return t3compile.rewrite(program, t3compile.make_plan(survey, splits, min_tokens=0))

    return _Traced(program, rewritten([(1, 1, 1)]), rewritten([(3, 1, 1), (1, 2, 2)]))


@pytest.fixture(scope="module")
def traced(pipeline: Any) -> _Traced:
    return _traced(pipeline)


def _onnx(program: t3compile.Program, path: Path) -> Any:
    return t3compile.load_engine(t3compile.export_onnx(program, path, check=False))


def _count_calls(monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    original = type(engine).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(engine), "__call__", counted)
    return calls


# Three steps of float32 rounding, guidance and a decoder: pixels in [0, 1].
PIXEL_TOLERANCE = 1e-5


def test_a_pipeline_runs_an_engine_of_the_identical_model_to_the_same_video(
    pipeline: Any, traced: _Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _generate(pipeline)
    engine = _onnx(traced.identity, tmp_path / "identity.onnx")
    assert engine.frozen == {"attention_kwargs": None, "return_dict": False}
    calls = _count_calls(monkeypatch, engine)
    swapped = _with(pipeline, t3compile.as_transformer(engine, pipeline.transformer))
    # The transformer of the pipeline itself must not be called.
    monkeypatch.setattr(type(pipeline.transformer), "forward", _fail)
    video = _generate(swapped)
    assert len(calls) == 6, "three steps, each with and without the prompt"
    assert video.shape == expected.shape
    assert float(expected.std()) > 0.01
    assert float((video - expected).abs().max()) < PIXEL_TOLERANCE


def _fail(*_: Any, **__: Any) -> None:
    pytest.fail("the original transformer was called")


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_pipeline_runs_a_windowed_engine_like_the_windowed_module(
    form: str, pipeline: Any, traced: _Traced, tmp_path: Path
) -> None:
    module = _ModuleOf(traced.windowed.module(), pipeline.transformer)
    expected = _generate(_with(pipeline, module))
    if form == "onnx":
        engine = _onnx(traced.windowed, tmp_path / "windowed.onnx")
    else:
        engine = t3compile.load_engine(traced.windowed.save(tmp_path / "windowed.pt2"))
    video = _generate(_with(pipeline, t3compile.as_transformer(engine, pipeline.transformer)))
    assert float((video - expected).abs().max()) < PIXEL_TOLERANCE
    full = _generate(pipeline)
    assert float((video - full).abs().max()) > 10 * PIXEL_TOLERANCE, "windows change the video"


class _ModuleOf(nn.Module):
    """A rewritten program's module with the attributes that the pipeline reads, written out for this pipeline."""

    def __init__(self, module: nn.Module, original: Any) -> None:
        super().__init__()
        self.module = module
        self.config, self.dtype, self.device = original.config, original.dtype, original.device
        self.cache_context = original.cache_context

    def forward(self, **kwargs: Any) -> Any:
        return self.module(**kwargs)


def test_a_batch_of_videos_runs_in_an_engine_of_that_batch(pipeline: Any) -> None:
    engine = TorchEngine(_traced(pipeline, batch=2).identity)
    assert [spec.shape[0] for spec in engine.inputs] == [2, 2, 2]
    expected = _generate(pipeline, batch=2)
    assert expected.shape[0] == 2
    swapped = _with(pipeline, t3compile.as_transformer(engine, pipeline.transformer))
    assert float((_generate(swapped, batch=2) - expected).abs().max()) < PIXEL_TOLERANCE
    with pytest.raises(InputsError, match=r"input 'hidden_states' has shape \[1, .*expected \[2, .*batch"):
        _generate(swapped, batch=1)


def test_another_video_size_is_refused_in_words(pipeline: Any, traced: _Traced) -> None:
    swapped = _with(pipeline, t3compile.as_transformer(TorchEngine(traced.identity), pipeline.transformer))
    with pytest.raises(InputsError, match=r"has shape \[1, 4, 2, 8, 8\], expected \[1, 4, 3, 8, 8\]; run the pipeline"):
        _generate(swapped, num_frames=5)


def test_a_pipeline_in_half_precision_runs_a_float32_engine(pipeline: Any, traced: _Traced) -> None:
    half = copy.deepcopy(pipeline.transformer).half()
    swapped = _with(pipeline, t3compile.as_transformer(TorchEngine(traced.identity), half))
    assert swapped.transformer.dtype == torch.float16
    seen: list[Tensor] = []
    swapped.transformer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    video = _generate(swapped)
    assert {x.dtype for x in seen} == {torch.float16}
    # Latents are rounded to half at every step, values of size one.
    assert 0 < float((video - _generate(pipeline)).abs().max()) < 0.05


# --- calls, in the small -------------------------------------------------------------------------


@dataclass
class TinyOutput:
    sample: Tensor


class Tiny(nn.Module):
    """A model with the call of diffusers' transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.config = {"in_channels": 4}

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        scale: float = 1.0,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TinyOutput | tuple[Tensor]:
        strength = (attention_kwargs or {}).get("strength", 1.0)
        sample = self.inner(hidden_states) * scale * strength + timestep
        return TinyOutput(sample=sample) if return_dict else (sample,)

    def enable_cache(self) -> None:
        raise AssertionError("reached the model")

    def rescale(self, x: float) -> float:
        return 2 * x


X, T = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0])
CALL: dict[str, Any] = {"hidden_states": X, "timestep": T, "return_dict": False}


def tiny(**changes: Any) -> tuple[Tiny, nn.Module]:
    """The model, and an engine of it, traced with these changes of its call, in its place."""
    torch.manual_seed(0)
    model = Tiny().eval()
    program = t3compile.trace(model, kwargs={**CALL, **changes})
    return model, t3compile.as_transformer(TorchEngine(program), model)


def test_outputs_are_a_tuple_or_the_models_own_class() -> None:
    model, swapped = tiny()
    (expected,) = model(**CALL)
    for result in (swapped(**CALL), swapped(X, T, return_dict=False), swapped(X, timestep=T, return_dict=False)):
        assert isinstance(result, tuple)
        assert torch.equal(result[0], expected)
    for output in (swapped(X, T), swapped(X, T, return_dict=True)):
        assert type(output) is TinyOutput
        assert torch.equal(output.sample, expected)


def test_a_model_that_names_no_output_class_needs_one() -> None:
    class Bare(Tiny):
        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:  # type: ignore[override]
            return (self.inner(hidden_states) + timestep,)

    model = Bare().eval()
    engine = TorchEngine(t3compile.trace(model, kwargs=CALL))
    with pytest.raises(InputsError, match=r"which class Bare.forward returns cannot be told.*output_class"):
        t3compile.as_transformer(engine, model)(X, T)
    given = t3compile.as_transformer(engine, model, output_class=TinyOutput)
    assert torch.equal(given(X, T).sample, model(X, T)[0])


def test_a_model_without_return_dict_returns_what_the_engine_does() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    swapped = t3compile.as_transformer(TorchEngine(t3compile.trace(Plain(), (X,))), Plain())
    assert torch.equal(swapped(X), X + 1)


def test_attributes_are_the_models_and_weights_are_not_held() -> None:
    model, swapped = tiny()
    assert swapped.config is model.config
    assert swapped.rescale(3.0) == 6.0
    assert swapped.dtype == torch.float32
    assert swapped.device == torch.device("cpu")
    assert swapped.half().dtype == torch.float16
    assert sum(parameter.numel() for parameter in swapped.parameters()) == 0
    assert next(swapped.parameters()).dtype == torch.float16
    assert list(swapped.modules()) == [swapped]
    assert model.inner.weight.dtype == torch.float32
    with pytest.raises(AttributeError, match="no_such"):
        _ = swapped.no_such
    assert "torch" in repr(swapped)
    assert "Tiny" in repr(swapped)


def test_the_original_may_be_on_the_meta_device() -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    engine = TorchEngine(t3compile.trace(model, kwargs=CALL))
    expected = model(**CALL)[0]
    swapped = t3compile.as_transformer(engine, copy.deepcopy(model).to("meta"))
    assert swapped.device == torch.device("cpu")
    assert torch.equal(swapped(**CALL)[0], expected)


def test_what_would_change_the_model_is_refused() -> None:
    _, swapped = tiny()
    assert hasattr(swapped, "enable_cache")
    assert not hasattr(swapped, "load_lora_adapter")
    with pytest.raises(InputsError, match="'enable_cache' changes Tiny, and an engine stays as it was exported"):
        swapped.enable_cache()


Change = Mapping[str, Any]
FROZEN: list[tuple[str, Change, Change, str]] = [
    ("default", {}, {"scale": 2.0}, r"argument 'scale' is 2.0, and the engine was traced with 1.0"),
    ("given", {"scale": 2.0}, {"scale": 3.0}, r"argument 'scale' is 3.0, and the engine was traced with 2.0"),
    ("left out", {"scale": 2.0}, {}, r"argument 'scale' is 1.0, and the engine was traced with 2.0"),
    (
        "nested",
        {"attention_kwargs": {"strength": 0.5}},
        {"attention_kwargs": {"strength": 0.7}},
        r"argument 'attention_kwargs_strength' is 0.7, and the engine was traced with 0.5",
    ),
    ("nested, new", {}, {"attention_kwargs": {"strength": 0.7}}, r"'attention_kwargs_strength' is 0.7.*with None"),
    (
        "nested, left out",
        {"attention_kwargs": {"strength": 0.5}},
        {},
        r"'attention_kwargs_strength' is not given, and the engine was traced with 0.5",
    ),
    ("tensor", {}, {"attention_kwargs": {"mask": X}}, r"the engine has no input 'attention_kwargs_mask'"),
    ("missing", {}, {"timestep": None}, r"the engine's input 'timestep' is missing; it expects timestep \[1\] float32"),
    ("number", {}, {"timestep": 5.0}, r"the engine's input 'timestep' is float, not a tensor"),
    ("shape", {}, {"hidden_states": X[:, :2]}, r"'hidden_states' has shape \[1, 2, 4\], expected \[1, 3, 4\]"),
    ("unknown", {}, {"guidance": 3.0}, r"the call does not fit Tiny.forward: .*guidance"),
]


@pytest.mark.parametrize(("trace_changes", "call_changes", "text"), [pytest.param(*c[1:], id=c[0]) for c in FROZEN])
def test_a_call_that_the_engine_cannot_follow_is_refused(
    trace_changes: Change, call_changes: Change, text: str
) -> None:
    _, swapped = tiny(**trace_changes)
    with pytest.raises(InputsError, match=text) as raised:
        swapped(**{**CALL, **call_changes})
    assert "\n" not in str(raised.value)


def test_arguments_as_traced_are_accepted() -> None:
    model, swapped = tiny(scale=2.0, attention_kwargs={"strength": 0.5})
    call = {**CALL, "scale": 2.0, "attention_kwargs": {"strength": 0.5}}
    assert torch.equal(swapped(**call)[0], model(**call)[0])


class _Foreign:
    """An engine whose file does not tell what the trace fixed."""

    runtime, notes, output_names, frozen = "foreign", (), ("output",), None
    inputs = (EngineInput("hidden_states", (1, 3, 4), "float32"), EngineInput("timestep", (1,), "int64"))

    def __call__(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        assert timestep.dtype == torch.int64
        return (hidden_states + timestep).numpy()


def test_an_engine_that_does_not_tell_warns_once_of_what_is_ignored() -> None:
    swapped = t3compile.as_transformer(_Foreign(), Tiny())
    with pytest.warns(UserWarning, match=r"argument 'scale' = 2.0 has no effect"):
        (result,) = swapped(**CALL, scale=2.0)
    assert torch.equal(result, X + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swapped(**CALL, scale=2.0)
        swapped(**CALL, attention_kwargs=None)


def test_dtypes_are_cast_and_never_to_another_whole_number() -> None:
    swapped = t3compile.as_transformer(_Foreign(), Tiny().half())
    (result,) = swapped(**{**CALL, "hidden_states": X.half()})
    assert result.dtype == torch.float16
    assert torch.equal(result, (X.half().float() + 5).half())
    with pytest.raises(InputsError, match="input 'timestep' holds float32 values that the engine's int64 cannot"):
        swapped(**{**CALL, "timestep": torch.tensor([5.5])})


CASTS: list[tuple[str, Tensor, bool]] = [
    ("bfloat16", torch.tensor([999]), False),
    ("bfloat16", torch.tensor([992]), True),
    ("float16", torch.tensor([1_000_000]), False),
    ("float32", torch.tensor([2**24 + 1]), False),
    ("float32", torch.tensor([2**24]), True),
    ("float32", torch.tensor([True]), True),
    ("float16", torch.tensor([1e6]), False),
    ("float16", torch.tensor([0.1]), True),
    ("float16", torch.tensor([float("inf")]), True),
    ("float32", torch.tensor([1e300], dtype=torch.float64), False),
    ("bfloat16", torch.tensor([1e6], dtype=torch.float32), True),
]


@pytest.mark.parametrize(("dtype", "value", "fits"), CASTS)
def test_whole_numbers_stay_and_finite_ones_stay_finite(dtype: str, value: Tensor, fits: bool) -> None:
    class Taking(_Foreign):
        inputs = (_Foreign.inputs[0], EngineInput("timestep", (1,), dtype))

        def __call__(self, hidden_states: Tensor, timestep: Tensor) -> Any:
            assert torch.equal(timestep, value.to(getattr(torch, dtype)))
            return hidden_states

    swapped = t3compile.as_transformer(Taking(), Tiny())
    if fits:
        swapped(**{**CALL, "timestep": value})
        return
    given = str(value.dtype).removeprefix("torch.")
    with pytest.raises(InputsError, match=f"input 'timestep' holds {given} values that the engine's {dtype} cannot"):
        swapped(**{**CALL, "timestep": value})


def test_nested_tensors_go_to_the_inputs_that_the_trace_named() -> None:
    class Nested(nn.Module):
        def forward(self, xs: list[Tensor], extra: dict[str, Tensor]) -> Tensor:
            return xs[0] - xs[1] + 2 * extra["mask"]

    call: dict[str, Any] = {"xs": [X, X + 1], "extra": {"mask": X * 3}}
    engine = TorchEngine(t3compile.trace(Nested(), kwargs=call))
    assert [spec.name for spec in engine.inputs] == ["xs_0", "xs_1", "extra_mask"]
    swapped = t3compile.as_transformer(engine, Nested())
    assert torch.equal(swapped(**call), Nested()(**call))


def test_capture_records_a_call_of_an_engine_too() -> None:
    _, swapped = tiny()
    with t3compile.capture(swapped) as record:
        swapped(**CALL)
    assert torch.equal(record.kwargs["hidden_states"], X)
