"""Tracing: a module and example inputs become a Program, by the first strategy that gives eager's outputs."""

from t3compile.tracing.trace_module import trace

__all__ = ["trace"]
