"""What can be asked for, by name; nothing is imported here."""

from __future__ import annotations

from typing import Literal, get_args

Device = Literal["cpu", "cuda"]
# "torch" eager, "compile" torch.compile, "ort" onnxruntime, "aoti" AOTInductor, "trt" TensorRT.
RuntimeName = Literal["torch", "compile", "ort", "aoti", "trt"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
# "windows" the rewritten program, "full" attention over everything, "paper" the paper's own formulation, "regrouped"
# both branches as one SDPA on regrouped tokens (ops/regrouped_attention.py), which on a GPU the kernel replaces.
Variant = Literal["windows", "full", "paper", "regrouped"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# They compute what the rewritten program does; full attention is another function.
SAME_FUNCTION: tuple[Variant, ...] = ("windows", "paper", "regrouped")
Subject = Literal["attention", "model"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
