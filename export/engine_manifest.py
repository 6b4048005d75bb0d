"""The JSON manifest beside an engine: what it was built from, for which TensorRT and GPU, and how it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from t3compile.errors import EngineError
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.onnx_file import external_tensors

MANIFEST_SUFFIX = ".manifest.json"
LAYERS_SUFFIX = ".layers.json"
FORMAT = 1

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class SiteLowering:
    """How one attention of the network was lowered, "plugin" or "native", and why it is native where not asked for."""

    site: str
    function: str
    lowering: str
    reason: str = ""


@dataclass(frozen=True)
class PluginKernel:
    """A kernel that a plugin layer offered, by its tactic, and the sha256 of its PTX; an engine holds one of each."""

    name: str
    tactic: int
    ptx_sha256: str


@dataclass(frozen=True)
class SourceFiles:
    """The ONNX file that an engine was built from: its name, sha256, and its external data's sha256 by location."""

    file: str
    sha256: str
    data_sha256: Mapping[str, str]


@dataclass(frozen=True)
class EngineManifest:
    """Everything about an engine that its bytes do not tell without TensorRT.

    ``plan`` is the plan's JSON, None where the model is not rewritten; ``metadata`` the ONNX file's own entries;
    ``times_s`` the median seconds of a call per lowering, where there was a choice; ``stripped`` whether the weights
    must be put in from the ONNX file before the first call.
    """

    t3compile_version: str
    tensorrt_version: str
    compute_capability: str
    gpu: str
    driver_cuda: str
    precision: str
    lowering: str
    inputs: tuple[EngineInput, ...]
    outputs: tuple[EngineInput, ...]
    sites: tuple[SiteLowering, ...]
    plugins: tuple[PluginKernel, ...]
    onnx: SourceFiles
    engine_sha256: str
    engine_bytes: int
    stripped: bool
    weight_streaming: bool
    settings: Mapping[str, Any]
    layer_check: Mapping[str, Any]
    times_s: Mapping[str, float]
    metadata: Mapping[str, str]
    plan: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str, path: Path) -> EngineManifest:
        """What ``dumps`` wrote; EngineError names the file where it is damaged or of another format."""
        try:
            fields = dict(json.loads(text))
            number = fields.pop("format")
            if number != FORMAT:
                raise EngineError(
                    f"'{path}' has format {number}, this t3compile reads {FORMAT}: build the engine again"
                )
            for name in ("inputs", "outputs"):
                rows = fields[name]
                fields[name] = tuple(EngineInput(r["name"], tuple(map(int, r["shape"])), r["dtype"]) for r in rows)
            fields["sites"] = tuple(SiteLowering(**row) for row in fields["sites"])
            fields["plugins"] = tuple(PluginKernel(**row) for row in fields["plugins"])
            fields["onnx"] = SourceFiles(**fields["onnx"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"'{path}' is not an engine's manifest, or is damaged ({type(error).__name__}: {error}); build the "
                "engine again with 't3compile build-engine'"
            ) from None


def manifest_path(engine: Path) -> Path:
    return engine.with_name(engine.name + MANIFEST_SUFFIX)


def layers_path(engine: Path) -> Path:
    return engine.with_name(engine.name + LAYERS_SUFFIX)


def read_manifest(engine: Path) -> EngineManifest:
    """The manifest beside an engine; EngineError where it is missing, damaged, or tells another size of the engine.

    The size alone is compared: a call does not wait for a hash of many gigabytes. `check_engine_hash` compares bytes.
    """
    path = manifest_path(engine)
    try:
        manifest = EngineManifest.loads(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise EngineError(
            f"the engine '{engine}' has no manifest '{path.name}' beside it, which says for which TensorRT and GPU it "
            "was built: build it with 't3compile build-engine', or copy both files"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"cannot read the manifest '{path}': {error}") from None
    if engine.stat().st_size != manifest.engine_bytes:
        raise EngineError(
            f"'{engine}' has {engine.stat().st_size} bytes and its manifest describes an engine of "
            f"{manifest.engine_bytes}: copy both files again"
        )
    return manifest


def check_engine_hash(engine: Path, manifest: EngineManifest) -> None:
    """EngineError where the engine's bytes are not those that its manifest describes; reads the whole file."""
    found, wanted = hash_file(engine), manifest.engine_sha256
    if found != wanted:
        raise EngineError(
            f"'{engine}' is not the engine that its manifest describes (sha256 {found[:12]}..., expected "
            f"{wanted[:12]}...): copy both files again"
        )


def hash_file(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_source(onnx: Path, locations: tuple[str, ...]) -> SourceFiles:
    """Hash an ONNX file and its external data, by their locations relative to it."""
    return SourceFiles(onnx.name, hash_file(onnx), {name: hash_file(onnx.parent / name) for name in locations})


def external_locations(model: ir.Model) -> tuple[str, ...]:
    """The files that hold a model's external tensors, relative to its folder, each once."""
    return tuple(sorted({str(tensor.location) for tensor in external_tensors(model)}))
