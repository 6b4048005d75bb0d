"""config.pbtxt of Triton Inference Server: what a model takes, gives and runs on, in protobuf text format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Backend = Literal["onnxruntime", "tensorrt"]
InstanceKind = Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"]

# numpy's names -> the server's; nothing else (complex, float8, 4-bit integers) has one.
DATA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "TYPE_BOOL",
        "uint8": "TYPE_UINT8",
        "uint16": "TYPE_UINT16",
        "uint32": "TYPE_UINT32",
        "uint64": "TYPE_UINT64",
        "int8": "TYPE_INT8",
        "int16": "TYPE_INT16",
        "int32": "TYPE_INT32",
        "int64": "TYPE_INT64",
        "float16": "TYPE_FP16",
        "float32": "TYPE_FP32",
        "float64": "TYPE_FP64",
        "bfloat16": "TYPE_BF16",
    }
)


@dataclass(frozen=True)
class ServedTensor:
    """An input or output as requests see it: dims in full, -1 where any size is taken; data_type as TYPE_FP32."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class ServerConfig:
    """The fields of the server's ModelConfig message that t3compile writes.

    max_batch_size is always 0: dims are the model's whole shapes, the batch among them. `accelerator` is the ONNX
    Runtime execution provider asked for on a GPU ("cuda" or "tensorrt") with its parameters, `parameters` are the
    backend's own, and `notes` become comments.
    """

    name: str
    backend: Backend
    file_name: str
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    kind: InstanceKind
    instances: int = 1
    accelerator: str = ""
    accelerator_parameters: tuple[tuple[str, str], ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def to_pbtxt(self) -> str:
        """The text of config.pbtxt."""
        group: Message = [("kind", Symbol(self.kind)), ("count", self.instances)]
        fields: Message = [
            ("name", self.name),
            ("backend", self.backend),
            ("max_batch_size", 0),
            ("default_model_filename", self.file_name),
            *(("input", _tensor(tensor)) for tensor in self.inputs),
            *(("output", _tensor(tensor)) for tensor in self.outputs),
            ("instance_group", group),
        ]
        if self.accelerator:
            asked: Message = [("name", self.accelerator)]
            for key, value in self.accelerator_parameters:
                asked.append(("parameters", [("key", key), ("value", value)]))
            gpu: Message = [("gpu_execution_accelerator", asked)]
            fields.append(("optimization", [("execution_accelerators", gpu)]))
        for key, value in self.parameters:
            fields.append(("parameters", [("key", key), ("value", [("string_value", value)])]))
        comments = [f"# {line}" for note in self.notes for line in note.splitlines()]
        return "\n".join([*comments, *_lines(fields, "")]) + "\n"


@dataclass(frozen=True)
class Symbol:
    """The name of an enum's value: written without quotes."""

    name: str


# A tuple of integers is a repeated field on one line, a list of fields a message.
Value: TypeAlias = "str | int | tuple[int, ...] | Symbol | list[tuple[str, Value]]"
Message: TypeAlias = list[tuple[str, Value]]


def _tensor(tensor: ServedTensor) -> Message:
    return [("name", tensor.name), ("data_type", Symbol(tensor.data_type)), ("dims", tensor.dims)]


def _lines(message: Message, indent: str) -> list[str]:
    lines = []
    for field, value in message:
        match value:
            case Symbol(name):
                lines.append(f"{indent}{field}: {name}")
            case str():
                lines.append(f"{indent}{field}: {_quoted(value)}")
            case int():
                lines.append(f"{indent}{field}: {value}")
            case tuple():
                lines.append(f"{indent}{field}: [{', '.join(map(str, value))}]")
            case _:
                lines += [f"{indent}{field} {{", *_lines(value, indent + "  "), f"{indent}}}"]
    return lines


def _quoted(text: str) -> str:
    """A string literal of protobuf's text format: bytes that are not plain ASCII as three octal digits."""
    plain = {ord("\\"): "\\\\", ord('"'): '\\"'}
    return (
        '"'
        + "".join(plain.get(byte, chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in text.encode())
        + '"'
    )
