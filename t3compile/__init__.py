"""t3compile: full attention of trained video DiTs -> hierarchical window attention, proven and exported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t3compile.aoti import export_aoti
    from t3compile.building import build_engine
    from t3compile.capturing import capture
    from t3compile.cost import plan_cost
    from t3compile.errors import T3CompileError
    from t3compile.export.triton_server import deploy_triton_server
    from t3compile.geometry import Splits, TokenGrid
    from t3compile.inputs import VideoSize
    from t3compile.kernels import build_kernels
    from t3compile.ops.dispatch import record_paths
    from t3compile.pattern import Schedule, WindowPattern
    from t3compile.pipeline import detect, export_onnx, load_engine, load_program, rewrite, trace, verify
    from t3compile.plan import Plan, make_plan
    from t3compile.probing import ProbeReport, probe
    from t3compile.program import Program
    from t3compile.sites import SiteSurvey
    from t3compile.transformer import as_transformer
    from t3compile.verification import VerifyReport

__version__ = "0.1.0"

# Where each public name lives; a name is imported when it is first used, so that `import t3compile` is instant.
_HOMES = {
    "Plan": "plan",
    "ProbeReport": "probing",
    "Program": "program",
    "Schedule": "pattern",
    "SiteSurvey": "sites",
    "Splits": "geometry",
    "T3CompileError": "errors",
    "TokenGrid": "geometry",
    "VerifyReport": "verification",
    "VideoSize": "inputs",
    "WindowPattern": "pattern",
    "as_transformer": "transformer",
    "build_engine": "building",
    "build_kernels": "kernels",
    "capture": "capturing",
    "deploy_triton_server": "export.triton_server",
    "detect": "pipeline",
    "export_aoti": "aoti",
    "export_onnx": "pipeline",
    "load_engine": "pipeline",
    "load_program": "pipeline",
    "make_plan": "plan",
    "plan_cost": "cost",
    "probe": "probing",
    "record_paths": "ops.dispatch",
    "rewrite": "pipeline",
    "trace": "pipeline",
    "verify": "pipeline",
}

__all__ = [
    "Plan",
    "ProbeReport",
    "Program",
    "Schedule",
    "SiteSurvey",
    "Splits",
    "T3CompileError",
    "TokenGrid",
    "VerifyReport",
    "VideoSize",
    "WindowPattern",
    "as_transformer",
    "build_engine",
    "build_kernels",
    "capture",
    "deploy_triton_server",
    "detect",
    "export_aoti",
    "export_onnx",
    "load_engine",
    "load_program",
    "make_plan",
    "plan_cost",
    "probe",
    "record_paths",
    "rewrite",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 't3compile' has no attribute '{name}'")
    module = importlib.import_module(f"t3compile.{_HOMES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
