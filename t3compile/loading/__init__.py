"""Loading: every kind of MODEL becomes a Program."""

from t3compile.loading.load_program import load_program

__all__ = ["load_program"]
