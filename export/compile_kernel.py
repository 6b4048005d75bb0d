"""One launch of the window attention kernel -> PTX text that any CUDA driver loads, compiled without a GPU.

Rules of the PTX, each checked here or by check_ptx.py: compute capability 8.0 without a letter behind it, PTX 8.0, no
scratch memory, pointers the only parameters (inputs, then the output), no source paths, contraction of float32
multiply-add said explicitly. What triton.compile gives is not launched by triton, so the two scratch pointers that its
own launcher would pass are taken out of the entry.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from t3compile.errors import KernelError, first_line
from t3compile.ops.load_kernel import compilable_kernel
from t3compile.ops.window_launch import INT32_MAX, Tile, WindowLaunch

# Tensor cores by mma.sync and cp.async came with it; drivers translate it for every later architecture.
COMPUTE_CAPABILITY = 80
PTX_VERSION = 80
# a * b + c in float32 rounds once, as triton does by default.
FP_FUSION = True
WARP_SIZE = 32

# Triton's names of the dtypes that the kernel takes.
TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TRITON_MASK_DTYPES = {**TRITON_DTYPES, "bool": "i1"}

# Triton's settings belong to the process: one kernel is compiled at a time.
_SETTINGS = threading.Lock()
_SCRATCH_SIZES = ("global_scratch_size", "profile_scratch_size")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class CompiledKernel:
    """One launch with one tile as PTX text of one entry.

    Launch it with ``grid_x`` blocks of ``block_x`` threads and ``shared_bytes`` of dynamic shared memory; its
    parameters are device pointers alone, 16-byte aligned: the inputs in the order of WindowLaunch, then the output.
    """

    entry: str
    ptx: str
    shared_bytes: int
    launch: WindowLaunch
    tile: Tile

    @property
    def grid_x(self) -> int:
        return self.launch.programs(self.tile)

    @property
    def block_x(self) -> int:
        return WARP_SIZE * self.tile.warps

    @property
    def pointers(self) -> int:
        """Parameters of the entry: inputs and the output."""
        return self.launch.inputs + 1

    @property
    def sha256(self) -> str:
        """Of the PTX text as UTF-8."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


def describe_launch(launch: WindowLaunch) -> dict[str, Any]:
    """Everything that is baked into the kernels of a launch, JSON-able."""
    args = launch.args
    return {
        "pattern": args.pattern.to_json(),
        "grid": list(args.grid.sizes),
        "prefix": args.prefix,
        "suffix": args.suffix,
        "query_prefix": args.query_prefix,
        "query_suffix": args.query_suffix,
        "scale": args.scale,
        "branch": launch.branch,
        "averages": launch.averages,
        "batch": launch.batch,
        "heads": launch.heads,
        "key_heads": launch.key_heads,
        "head_dim": launch.head_dim,
        "value_dim": launch.value_dim,
        "dtype": launch.dtype,
        "strides": {name: asdict(getattr(launch, name)) for name in ("q", "k", "v", "out")},
        "mask": None if launch.mask is None else asdict(launch.mask),
    }


def entry_name(launch: WindowLaunch, tile: Tile) -> str:
    """t3_window_attention_<first twelve hex digits of the hash of launch and tile>: one engine holds many kernels."""
    text = json.dumps([describe_launch(launch), asdict(tile)], sort_keys=True)
    return f"t3_window_attention_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def launch_text(launch: WindowLaunch, tile: Tile | None = None) -> str:
    """A launch, or one kernel of it, in words."""
    heads = f"{launch.heads} heads of {launch.head_dim}"
    text = (
        f"pattern {launch.args.pattern}, {launch.branch} branch, on grid {launch.args.grid} ({heads}, {launch.dtype})"
    )
    return text if tile is None else f"{text}, tile {tile_text(tile)}"


def tile_text(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}, {tile.warps} warps, {tile.stages} stages"


@functools.lru_cache(maxsize=256)
def compile_launch(launch: WindowLaunch, tile: Tile) -> CompiledKernel:
    """The PTX of a launch with a tile; the same text every time.

    Needs triton, no GPU. Reads none of triton's caches and leaves none; environment variables that bear on the result
    are set meanwhile, then as before. MissingExtraError without triton; KernelError where the kernel does not take
    the launch, a compiler fails, or scratch memory would be needed.
    """
    kernel = compilable_kernel()
    what = launch_text(launch, tile)
    if launch.dtype not in TRITON_DTYPES:
        raise KernelError(f"{what}: the kernel takes {', '.join(TRITON_DTYPES)}; export with one of these")
    if launch.programs(tile) > INT32_MAX:
        raise KernelError(f"{what}: {launch.programs(tile):,} blocks, a launch has at most {INT32_MAX:,}")
    with _SETTINGS, _compiler_settings():
        try:
            compiled = _compile(kernel, launch, tile)
        except Exception as error:
            # Of many kinds: triton's own, MLIR's RuntimeError, ptxas's.
            raise KernelError(f"{what}: triton cannot compile it ({type(error).__name__}: {_reason(error)})") from error
    for name in _SCRATCH_SIZES:
        size = getattr(compiled.metadata, name, 0)
        if size:
            raise KernelError(f"{what}: expected {name} 0, found {size} bytes; no plugin can provide scratch memory")
    entry = entry_name(launch, tile)
    try:
        ptx = rename_entry(strip_parameters(compiled.asm["ptx"], launch.inputs + 1), entry)
    except KernelError as error:
        raise KernelError(f"{what}: {error}") from None
    return CompiledKernel(entry, ptx, compiled.metadata.shared, launch, tile)


def _compile(kernel: Any, launch: WindowLaunch, tile: Tile) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = _pointer_types(launch)
    names = list(kernel.arg_names)
    signature = {name: pointers.get(name, "constexpr") for name in names}
    constants = {name: None for name in names if name not in pointers} | launch.constants(tile)
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        # Without it loads are two bytes wide and not pipelined.
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": FP_FUSION,
    }
    return triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, WARP_SIZE), options=options)


def _pointer_types(launch: WindowLaunch) -> dict[str, str]:
    """Triton's types of the pointer arguments of a launch, in their order."""
    own = f"*{TRITON_DTYPES[launch.dtype]}"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), own)
    if launch.mask is not None:
        types["mask_ptr"] = f"*{_TRITON_MASK_DTYPES[launch.mask.dtype]}"
    if launch.averages:
        types["other_ptr"] = own
    return types | {"out_ptr": own}


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Triton's settings that bear on the PTX, whatever the environment says, and a cache that goes afterwards."""
    from triton import knobs

    settings: dict[Any, dict[str, Any]] = {
        knobs.compilation: {
            "disable_line_info": True,
            "dump_ir_extract_di_local_variables": False,
            "always_compile": True,
            "store_binary_only": False,
            "override": False,
            "use_ir_loc": None,
        },
        knobs.runtime: {"override_arch": None},
        knobs.language: {"force_disable_fp_fusion": False},
    }
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="t3compile-triton-", ignore_cleanup_errors=True)
        )
        for room, values in (*settings.items(), (knobs.cache, {"dir": folder})):
            stack.enter_context(room.scope())
            for name, value in values.items():
                setattr(room, name, value)
        yield


def _reason(error: BaseException) -> str:
    """The last line of what triton says: the first ones quote the kernel's source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else first_line(error)


def entry_parameters(ptx: str) -> tuple[str, ...]:
    """The declarations of the entry's parameters; KernelError unless there is one entry."""
    entries = _ENTRY.findall(ptx)
    if len(entries) != 1:
        raise KernelError(f"expected one entry in the PTX, found {len(entries)}")
    return tuple(part.strip() for part in entries[0][1].split(",") if part.strip())


def strip_parameters(ptx: str, keep: int) -> str:
    """The PTX with the entry's first ``keep`` parameters alone.

    KernelError where there are fewer, or where one of the others is anything but a pointer that is never read.
    """
    parameters = entry_parameters(ptx)
    if len(parameters) < keep:
        raise KernelError(f"expected {keep} entry parameters, found {len(parameters)}")
    head = _ENTRY.search(ptx)
    assert head is not None
    for declaration in parameters[keep:]:
        name = declaration.split()[-1]
        if not re.match(r"\.param\s+\.[ub]64\b", declaration):
            raise KernelError(f"expected pointers behind the {keep} parameters, found '{declaration}'")
        uses = len(re.findall(rf"(?<![\w$]){re.escape(name)}(?![\w$])", ptx)) - 1
        if uses:
            raise KernelError(f"expected the scratch parameter {name} never to be read, found {uses} uses")
    kept = ",\n\t".join(parameters[:keep])
    return f"{ptx[: head.start(2)]}\n\t{kept}\n{ptx[head.end(2) :]}"


def rename_entry(ptx: str, name: str) -> str:
    """The PTX with the entry and whatever is named after it under another name."""
    head = _ENTRY.search(ptx)
    assert head is not None
    return re.sub(rf"(?<![\w$]){re.escape(head.group(1))}(?=[^\w$]|_param_)", name, ptx)
