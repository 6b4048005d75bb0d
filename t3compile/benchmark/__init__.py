"""A rewritten model measured beside what would be used in its place: Program -> variants -> child processes -> report."""

from t3compile.benchmark.run_benchmark import BenchSettings, Workload, bench

__all__ = ["BenchSettings", "Workload", "bench"]
