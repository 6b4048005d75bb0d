"""The ahead-of-time PTX through the CUDA driver, with exactly the arguments that a plugin's launch has.

Pointers alone: inputs, then the output, by the driver's own loader and without triton. Needs a GPU, so nothing of it
has run where there is none; that is what the skip says.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t3compile.export.build_tactics import Tactic, offered_tiles, smaller_tiles, try_tile
from t3compile.export.compile_kernel import CompiledKernel
from t3compile.export.function_launches import window_launches
from t3compile.export.window_function import FunctionKey, MaskKey
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.ops.reference import masked_sdpa, reference_window_attention
from t3compile.pattern import WindowPattern

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EVEN = WindowAttentionArgs(TokenGrid(3, 8, 12), WindowPattern(Splits(1, 2, 3)))
UNEVEN = WindowAttentionArgs(TokenGrid(3, 7, 11), WindowPattern(Splits(2, 3, 4)), 3, 2, 0.2)
OWN_QUERIES = replace(UNEVEN, query_prefix=1, query_suffix=0)
FRAMES = WindowAttentionArgs(TokenGrid(3, 8, 12), WindowPattern(Splits(3, 1, 1)))


class Driver:
    """The few calls of libcuda that load and launch a kernel; errors are raised by name."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        handle, number, text = ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p
        signatures: dict[str, list[Any]] = {
            "cuInit": [number],
            "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(text)],
            "cuModuleLoadDataEx": [ctypes.POINTER(handle), ctypes.c_void_p, number, handle, handle],
            "cuModuleGetFunction": [ctypes.POINTER(handle), handle, text],
            "cuModuleUnload": [handle],
            "cuLaunchKernel": [handle, *[number] * 7, handle, ctypes.POINTER(handle), ctypes.POINTER(handle)],
        }
        for name, types in signatures.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, ctypes.c_int
        # torch holds the device's primary context, which becomes the current one of this thread.
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            said = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(said))
            raise RuntimeError(f"{name} failed: {status} {(said.value or b'unknown').decode()}")

    def launch(self, kernel: CompiledKernel, tensors: list[Tensor]) -> None:
        """Load the PTX, launch it on the current stream and wait."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = ctypes.create_string_buffer(kernel.ptx.encode())
        self.call("cuModuleLoadDataEx", ctypes.byref(module), image, 0, None, None)
        try:
            self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.entry.encode())
            pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
            # cuLaunchKernel takes the addresses of the parameters' values.
            parameters = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.call(
                "cuLaunchKernel",
                function,
                *(kernel.grid_x, 1, 1),
                *(kernel.block_x, 1, 1),
                kernel.shared_bytes,
                stream,
                parameters,
                None,
            )
            torch.cuda.synchronize()
        finally:
            self.call("cuModuleUnload", module)


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver()


def _kernels(key: FunctionKey) -> list[list[CompiledKernel]]:
    """For each launch, every tile that passes the gates over the text; smaller ones where none does."""
    kernels = []
    for launch in window_launches(key):
        tried = [try_tile(launch, tile, (), None) for tile in (*offered_tiles(launch), *smaller_tiles(launch))]
        kernels.append([one.kernel for one in tried if isinstance(one, Tactic)])
        assert kernels[-1]
    return kernels


def _inputs(key: FunctionKey) -> list[Tensor]:
    """Contiguous q, k, v and, where there is one, the mask, on the device."""
    generator = torch.Generator().manual_seed(0)
    dtype, args = getattr(torch, key.dtype), key.args
    shapes = [
        (key.batch, key.heads, args.query_tokens, key.head_dim),
        (key.batch, key.key_heads, args.tokens, key.head_dim),
        (key.batch, key.key_heads, args.tokens, key.value_dim),
    ]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if key.mask is not None:
        hidden = torch.rand(key.mask.shape, generator=generator) < 0.5
        # The keys of the grid stay visible, and one beside it.
        hidden[..., args.prefix - 1 : args.prefix + args.grid.tokens] = False
        mask = ~hidden if key.mask.dtype == "bool" else hidden.to(getattr(torch, key.mask.dtype)) * -3.0
        tensors.append(mask)
    return [tensor.cuda() for tensor in tensors]


def _reference(key: FunctionKey, inputs: list[Tensor], **options: Any) -> Tensor:
    q, k, v = (x.repeat_interleave(key.heads // x.shape[1], 1) if x.shape[1] != key.heads else x for x in inputs[:3])
    args = key.args
    return reference_window_attention(
        q,
        k,
        v,
        grid=args.grid,
        pattern=args.pattern,
        prefix=args.prefix,
        suffix=args.suffix,
        query_prefix=args.query_prefix,
        query_suffix=args.query_suffix,
        mask=inputs[3] if len(inputs) > 3 else None,
        scale=args.scale,
        **options,
    )


CASES = {
    "even": FunctionKey(EVEN, 2, 3, 64, 64, "bfloat16", "attention"),
    "one branch": FunctionKey(FRAMES, 1, 2, 128, 128, "bfloat16", "attention"),
    "uneven": FunctionKey(UNEVEN, 2, 3, 128, 128, "bfloat16", "attention"),
    "own queries": FunctionKey(OWN_QUERIES, 1, 3, 64, 64, "float16", "attention"),
    "odd depths": FunctionKey(UNEVEN, 1, 2, 40, 24, "float16", "attention"),
    "grouped heads": FunctionKey(UNEVEN, 2, 6, 64, 64, "float16", "attention", None, 2),
    "bool mask": FunctionKey(UNEVEN, 2, 3, 64, 64, "bfloat16", "attention", MaskKey((2, 1, 1, 236), "bool")),
    "float mask": FunctionKey(UNEVEN, 2, 3, 64, 64, "float16", "attention", MaskKey((1, 3, 1, 236), "float32")),
    "float32": FunctionKey(UNEVEN, 1, 2, 64, 64, "float32", "attention"),
    "wide": FunctionKey(UNEVEN, 1, 2, 256, 256, "float32", "attention"),
}


@pytest.mark.parametrize("key", CASES.values(), ids=CASES)
def test_the_ptx_computes_window_attention(key: FunctionKey, driver: Driver) -> None:
    inputs = _inputs(key)
    on_cpu = [x.cpu() for x in inputs]
    exact = _reference(key, [x.double() if x.is_floating_point() else x for x in on_cpu])
    plain = _reference(key, on_cpu, attend=masked_sdpa)
    shape = (key.batch, key.heads, key.args.query_tokens, key.value_dim)
    by_launch = _kernels(key)
    for number in range(max(map(len, by_launch))):
        made: list[Tensor] = []
        for kernels in by_launch:
            kernel = kernels[number % len(kernels)]
            out = torch.full(shape, float("nan"), dtype=inputs[0].dtype, device="cuda")
            arguments = [*inputs, *made, out]
            assert len(arguments) == kernel.pointers
            assert all(tensor.data_ptr() % 16 == 0 for tensor in arguments)
            driver.launch(kernel, arguments)
            made = [out]
        error = (made[0].cpu().double() - exact).abs().max()
        # The first branch is rounded once more on its way into the second launch.
        rounding = torch.finfo(inputs[0].dtype).eps * exact.abs().max()
        assert error <= 2 * (plain.double() - exact).abs().max() + rounding, kernel.tile
