"""A stand-in for TensorRT's Python module that records how it is used and reads the ONNX file it is given.

Its names are a subset of the real module's (test_tensorrt_api.py compares them with the real bindings). An engine is
JSON behind TensorRT's magic; it lists the layers that the network's nodes would have if every attention were fused.
"""

from __future__ import annotations

import json
import os
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from t3compile.export.engine_inputs import EngineInput

MAGIC = b"ftrt"
_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
}


@dataclass
class Behaviour:
    """What the stand-in does, and what it was asked."""

    unknown_operators: frozenset[str] = frozenset()
    parser_errors: tuple[dict[str, Any], ...] = ()
    build_error: str = ""
    # Called in the middle of a build, on the building thread.
    during_build: Callable[[], None] | None = None
    accepts_cache: bool = True
    # From a network's ONNX model to the inspector's layers; None for all fused.
    layers: Callable[[onnx.ModelProto], list[Any]] | None = None
    # Seconds of a call, by whether the network has plugin nodes.
    seconds: Mapping[bool, float] = field(default_factory=dict)
    # Fills the outputs of a call, both by name.
    compute: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    missing_weights: tuple[str, ...] = ()
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    networks: list[onnx.ModelProto] = field(default_factory=list)
    cancelled: bool = False

    def names(self) -> list[str]:
        return [str(call[0]) for call in self.calls]

    def last(self, name: str) -> tuple[Any, ...]:
        return [call for call in self.calls if call[0] == name][-1]


# Buffers by address, as a device would know them.
BUFFERS: dict[int, Tensor] = {}


class FakeMemory:
    """DeviceMemory on the CPU; a captured launch counts its replays."""

    stream = 7

    def __init__(self, index: int) -> None:
        self.replays = 0

    def allocate(self, spec: EngineInput) -> int:
        dtype = getattr(torch, spec.dtype)
        buffer = torch.full(spec.shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        BUFFERS[buffer.data_ptr()] = buffer
        return buffer.data_ptr()

    def run(self, given: Any, launch: Callable[[], None], results: Any) -> list[Tensor]:
        for address, value in given:
            BUFFERS[address].copy_(value)
        launch()
        return [BUFFERS[address].clone() for address in results]

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            launch()

        return replay

    def synchronize(self) -> None:
        pass


def is_plugin(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    return node.domain == "t3" and node.op_type not in {function.name for function in model.functions}


def fused_layers(model: onnx.ModelProto) -> list[Any]:
    """The inspector's layers if TensorRT made one of every attention."""
    functions = {function.name: function for function in model.functions}
    layers: list[Any] = []

    def fused(entry: str) -> None:
        name = f"_gemm_mha_v2_myl0_{len(layers)}"
        layers.append({"Name": name, "LayerType": "kgen", "TacticName": f"{name}_0x1", "Metadata": entry})

    for node in model.graph.node:
        if is_plugin(node, model):
            entry = f"[ONNX Layer: {node.name}]"
            layers.append({"Name": node.name, "LayerType": "PluginV3", "TacticName": "", "Metadata": entry})
        elif node.op_type in functions:
            for inner in functions[node.op_type].node:
                if inner.op_type in ("Attention", "Softmax"):
                    fused(f"[ONNX Layer: {inner.name} | Local Function: {node.op_type}]")
        elif node.op_type in ("Attention", "Softmax"):
            fused(f"[ONNX Layer: before]\x1f[ONNX Layer: {node.name}]")
        else:
            entry = f"[ONNX Layer: {node.name}]"
            layers.append({"Name": f"{node.name}_myl0_1", "LayerType": "gemm", "TacticName": "", "Metadata": entry})
    return layers


def make_tensorrt(version: str, behaviour: Behaviour) -> types.ModuleType:
    """The module ``tensorrt`` of a version."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    is_10 = version.startswith("10.")
    record = behaviour.calls.append

    class ILogger:
        Severity = IntEnum("Severity", [("INTERNAL_ERROR", 0), ("ERROR", 1), ("WARNING", 2), ("INFO", 3)])

    class IProgressMonitor:
        pass

    class IStreamWriter:
        pass

    def enum(name: str, *members: str) -> None:
        setattr(trt, name, IntEnum(name, [(member, i) for i, member in enumerate(members)]))

    network_flags = ("STRONGLY_TYPED", "PREFER_JIT_PYTHON_PLUGINS", "PREFER_AOT_PYTHON_PLUGINS")
    enum("NetworkDefinitionCreationFlag", *(("EXPLICIT_BATCH",) if is_10 else ()), *network_flags)
    enum("BuilderFlag", "DEBUG", "TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING")
    enum("MemoryPoolType", "WORKSPACE")
    enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED")
    enum("LayerInformationFormat", "ONELINE", "JSON")
    enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "BF16", "INT64")

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto) -> None:
            self.name = value.name
            dims = value.type.tensor_type.shape.dim
            self.shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self.flags = flags
            self.model: onnx.ModelProto | None = None

        @property
        def num_inputs(self) -> int:
            assert self.model is not None
            return len(self.model.graph.input)

        def get_input(self, index: int) -> ITensor:
            assert self.model is not None
            return ITensor(self.model.graph.input[index])

    class ParserError:
        def __init__(self, fields: dict[str, Any]) -> None:
            self.fields = fields

        def node(self) -> int:
            return int(self.fields["node"])

        def node_name(self) -> str:
            return str(self.fields["name"])

        def node_operator(self) -> str:
            return str(self.fields["operator"])

        def desc(self) -> str:
            return str(self.fields["desc"])

        def func(self) -> str:
            return str(self.fields["func"])

        def local_function_stack(self) -> list[str]:
            return list(self.fields.get("stack", ()))

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self.network = network
            self.errors = [ParserError(fields) for fields in behaviour.parser_errors]

        def supports_operator(self, op_name: str) -> bool:
            return op_name not in behaviour.unknown_operators

        def parse_from_file(self, model: str) -> bool:
            # External data are read: the file's references must hold.
            self.network.model = onnx.load(model)
            behaviour.networks.append(self.network.model)
            record(("parse_from_file", Path(model)))
            return not self.errors

        @property
        def num_errors(self) -> int:
            return len(self.errors)

        def get_error(self, index: int) -> ParserError:
            return self.errors[index]

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data + b"+timed"

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags = 1 << int(trt.BuilderFlag.TF32)
            self.progress_monitor: Any = None
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self.builder_optimization_level = 3
            self.cache: ITimingCache | None = None

        def set_flag(self, flag: Any) -> None:
            self.flags |= 1 << int(flag)
            record(("set_flag", flag.name))

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            record(("set_memory_pool_limit", pool.name, pool_size))

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            record(("set_timing_cache", cache.data, ignore_mismatch))
            if cache.data and not behaviour.accepts_cache:
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self.cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            record(("create_network", flags))
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def build_serialized_network_to_stream(
            self, network: INetworkDefinition, config: IBuilderConfig, writer: Any
        ) -> bool:
            record(("build", config.profiling_verbosity.name, config.builder_optimization_level, config.flags))
            monitor = config.progress_monitor
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Timing", "Building Engine", 4)
            if behaviour.during_build is not None:
                behaviour.during_build()
            for step in range(4):
                if not monitor.step_complete("Timing", step):
                    behaviour.cancelled = True
                    return False
            monitor.phase_finish("Timing")
            monitor.step_complete("Building Engine", 0)
            if behaviour.build_error:
                self.logger.log(trt.ILogger.Severity.ERROR, behaviour.build_error)
                return False
            assert network.model is not None
            data = MAGIC + json.dumps(_engine(network.model)).encode()
            half = len(data) // 2
            written = [writer.write(part) for part in (data[:half], data[half:])]
            monitor.phase_finish("Building Engine")
            return sum(written) == len(data)

    def _engine(model: onnx.ModelProto) -> dict[str, Any]:
        layers = (behaviour.layers or fused_layers)(model)
        plugin = any(is_plugin(node, model) for node in model.graph.node)
        return {
            "inputs": [_described(value) for value in model.graph.input],
            "outputs": [_described(value) for value in model.graph.output],
            "layers": layers,
            "plugin": plugin,
        }

    class EngineInspector:
        def __init__(self, layers: list[Any]) -> None:
            self.layers = layers

        def get_engine_information(self, format: Any) -> str:
            assert format == trt.LayerInformationFormat.JSON
            return json.dumps({"Layers": self.layers, "Bindings": []})

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self.engine = engine
            self.addresses: dict[str, int] = {}

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            record(("execute_async_v3", stream_handle))
            time.sleep(behaviour.seconds.get(self.engine.fields["plugin"], 0.0))
            if behaviour.compute is not None:
                given = {row["name"]: BUFFERS[self.addresses[row["name"]]] for row in self.engine.fields["inputs"]}
                for name, value in behaviour.compute(given).items():
                    BUFFERS[self.addresses[name]].copy_(value)
            return True

    class ICudaEngine:
        def __init__(self, fields: dict[str, Any]) -> None:
            self.fields = fields
            self.rows = {row["name"]: row for row in (*fields["inputs"], *fields["outputs"])}
            self.weight_streaming_budget_v2 = 0

        @property
        def num_io_tensors(self) -> int:
            return len(self.rows)

        def get_tensor_name(self, index: int) -> str:
            return str(list(self.rows)[index])

        def get_tensor_mode(self, name: str) -> Any:
            taken = any(row["name"] == name for row in self.fields["inputs"])
            return trt.TensorIOMode.INPUT if taken else trt.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.rows[name]["shape"])

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[self.rows[name]["type"]]

        def get_weight_streaming_automatic_budget(self) -> int:
            return 4096

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector(self.fields["layers"])

        def create_execution_context(self) -> IExecutionContext:
            record(("create_execution_context", self.weight_streaming_budget_v2))
            return IExecutionContext(self)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            data = bytes(memoryview(serialized_engine))
            record(("deserialize_cuda_engine", len(data)))
            if not data.startswith(MAGIC):
                self.logger.log(trt.ILogger.Severity.ERROR, "magic tag does not match")
                return None
            return ICudaEngine(json.loads(data[len(MAGIC) :]))

    class Refitter:
        def __init__(self, engine: ICudaEngine, logger: Any) -> None:
            self.engine = engine

        def get_missing_weights(self) -> list[str]:
            return list(behaviour.missing_weights)

        def refit_cuda_engine(self) -> bool:
            record(("refit_cuda_engine",))
            return True

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter: Refitter, logger: Any) -> None:
            pass

        def refit_from_file(self, model: str) -> bool:
            record(("refit_from_file", os.path.basename(model)))
            return True

        def get_error(self, index: int) -> ParserError:
            raise IndexError(index)

    def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
        return True

    for made in (
        ILogger,
        IProgressMonitor,
        IStreamWriter,
        INetworkDefinition,
        ParserError,
        OnnxParser,
        ITimingCache,
        IBuilderConfig,
        Builder,
        EngineInspector,
        IExecutionContext,
        ICudaEngine,
        Runtime,
        Refitter,
        OnnxParserRefitter,
        init_libnvinfer_plugins,
    ):
        setattr(trt, made.__name__, made)
    module: types.ModuleType = trt
    return module


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    return {"name": value.name, "shape": [dim.dim_value for dim in kind.shape.dim], "type": _TYPES[kind.elem_type]}
