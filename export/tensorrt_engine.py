"""Run an engine that `t3compile build-engine` built, called like the model.

Neither TensorRT nor a GPU was at hand where this was written: its use of the API was checked against the real
bindings, and its flow against a recording stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import EngineError
from t3compile.export.cuda_device import CudaDevice
from t3compile.export.engine_inputs import FROZEN_PROPERTY, bind_engine_inputs, check_tensor, read_frozen
from t3compile.export.engine_manifest import EngineManifest, hash_file, read_manifest
from t3compile.export.tensorrt_api import TensorRT, load_tensorrt_and_device
from t3compile.export.tensorrt_session import TensorRTSession
from t3compile.tensorrt_versions import parse_version


class TensorRTEngine:
    """A TensorRT engine with its manifest, on the GPU it was built for.

    Call it with tensors or arrays, by position or by input name. Returns torch tensors where an input is one, on the
    GPU if that is, else on the CPU; arrays for arrays (bfloat16 outputs, which NumPy does not have, stay tensors).
    Complex inputs [...] are given as real [..., 2]. One output, or a tuple of them.

    ``cuda_graph`` replays one recorded launch per call. ``weight_streaming_budget``, in bytes, bounds the weights that
    stay on the GPU, for engines built with weight streaming; None is TensorRT's own choice. ``refit_from`` is the ONNX
    file that an engine with stripped weights was built from. EngineError where the engine was built for another
    TensorRT version or compute capability, before anything is loaded.
    """

    runtime = "tensorrt"

    def __init__(
        self,
        path: str | Path,
        *,
        cuda_graph: bool = False,
        weight_streaming_budget: int | None = None,
        refit_from: str | Path | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise EngineError(f"there is no engine '{path}'; build one with 't3compile build-engine'")
        self.manifest = read_manifest(path)
        onnx = _refit_source(path, self.manifest, refit_from)
        if weight_streaming_budget is not None and not self.manifest.weight_streaming:
            raise EngineError(
                f"a weight streaming budget was given and '{path}' was built without: build it with --weight-streaming"
            )
        tensorrt, device = load_tensorrt_and_device(f"running the engine '{path.name}'")
        check_built_for(self.manifest, path, tensorrt, device)
        self._session = TensorRTSession(
            tensorrt,
            path,
            device.index,
            refit_from=onnx,
            streams=self.manifest.weight_streaming,
            weight_streaming_budget=weight_streaming_budget,
            cuda_graph=cuda_graph,
        )
        self.inputs = self.manifest.inputs
        self.output_names = tuple(spec.name for spec in self.manifest.outputs)
        self.notes = _notes(self.manifest, self._session)
        for side, told, found in (
            ("inputs", self.inputs, self._session.inputs),
            ("outputs", self.manifest.outputs, self._session.outputs),
        ):
            if sorted(map(str, told)) != sorted(map(str, found)):
                raise EngineError(
                    f"the manifest of '{path}' lists {side} {', '.join(map(str, told))}, and the engine has "
                    f"{', '.join(map(str, found))}: copy both files again"
                )

    @property
    def frozen(self) -> Mapping[str, object] | None:
        """Arguments that the trace fixed, by forward's names; None where the ONNX file did not tell."""
        return read_frozen(self.manifest.metadata.get(FROZEN_PROPERTY))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = bind_engine_inputs(self.inputs, args, kwargs)
        tensors = {spec.name: check_tensor(spec, given[spec.name]) for spec in self.inputs}
        by_name = dict(zip((spec.name for spec in self._session.outputs), self._session.run(tensors), strict=True))
        outputs: list[Any] = [by_name[name] for name in self.output_names]
        if not any(isinstance(value, Tensor) and value.is_cuda for value in given.values()):
            outputs = [output.cpu() for output in outputs]
        if not any(isinstance(value, Tensor) for value in given.values()):
            outputs = [output if output.dtype == torch.bfloat16 else output.numpy() for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def check_built_for(manifest: EngineManifest, path: Path, tensorrt: TensorRT, device: CudaDevice) -> None:
    """Raise EngineError with both values where an engine was built for another TensorRT or another kind of GPU."""
    if parse_version(manifest.tensorrt_version) != tensorrt.version:
        raise EngineError(
            f"'{path}' was built with TensorRT {manifest.tensorrt_version} and this is {tensorrt.version_text}: build "
            f"it again here with 't3compile build-engine', or install tensorrt=={manifest.tensorrt_version}"
        )
    if manifest.compute_capability != device.compute_capability:
        raise EngineError(
            f"'{path}' was built for compute capability {manifest.compute_capability} ({manifest.gpu}) and this GPU "
            f"has {device.compute_capability} ({device.name}): build it again here with 't3compile build-engine'"
        )


def _refit_source(path: Path, manifest: EngineManifest, refit_from: str | Path | None) -> Path | None:
    """The ONNX file for a stripped engine, checked to be the one it was built from."""
    if not manifest.stripped:
        if refit_from is not None:
            raise EngineError(f"'{path}' holds its weights: leave out refit_from")
        return None
    wanted = manifest.onnx
    if refit_from is None:
        raise EngineError(
            f"'{path}' was built without weights: give the ONNX file it was built from ('{wanted.file}') as refit_from"
        )
    onnx = Path(refit_from)
    for file, sha256 in {onnx.name: wanted.sha256, **wanted.data_sha256}.items():
        part = onnx.parent / file
        if not part.is_file():
            raise EngineError(f"'{part}' does not exist; refitting '{path}' needs '{wanted.file}' and its data")
        found = hash_file(part)
        if found != sha256:
            raise EngineError(
                f"'{part}' is not what '{path}' was built from (sha256 {found[:12]}..., expected {sha256[:12]}...): "
                "TensorRT takes only the same weights"
            )
    return onnx


def _notes(manifest: EngineManifest, session: TensorRTSession) -> tuple[str, ...]:
    notes = [str(warning) for warning in manifest.layer_check.get("warnings", ())]
    if session.weight_streaming_budget is not None:
        notes.append(f"{session.weight_streaming_budget:,} bytes of weights stay on the GPU, the rest is streamed")
    return tuple(notes)
