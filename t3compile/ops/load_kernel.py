"""The Triton kernel in its two forms, side by side in one process: to compile, and to interpret on the CPU.

Neither form needs the environment variable TRITON_INTERPRET; with it set when triton is imported nothing can be
compiled in that process, since triton's own library is then interpreted too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

from t3compile.errors import KernelError, MissingExtraError

_KERNEL_MODULE = "t3compile.ops.window_kernel"


def compilable_kernel() -> Any:
    """The kernel as a ``triton.JITFunction``: launched on CUDA tensors, or compiled for a target without a GPU.

    MissingExtraError without triton, KernelError where TRITON_INTERPRET was set when triton was imported.
    """
    jit_function = _triton().JITFunction
    kernel = importlib.import_module(_KERNEL_MODULE).window_attention_kernel
    if not isinstance(kernel, jit_function):
        raise KernelError(
            "the window attention kernel cannot be compiled in a process started with TRITON_INTERPRET=1; unset it"
        )
    return kernel


@functools.cache
def interpreted_kernel() -> Any:
    """The same kernel run by triton's interpreter on CPU tensors; ``kernel[(programs,)](...)`` launches it.

    Far too slow for use: a test's form. bfloat16 products are wrong there, so it needs the constant UPCAST.
    MissingExtraError without triton.
    """
    triton = _triton()
    spec = importlib.util.find_spec(_KERNEL_MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module.window_attention_kernel


def _triton() -> ModuleType:
    try:
        import triton
    except ModuleNotFoundError:
        raise MissingExtraError("triton", "kernels", "the window attention kernel") from None
    module: ModuleType = triton
    return module
