"""Where weights come from: order, default dtype and missing files must not change their values."""

from __future__ import annotations

import pytest
import torch

from t3compile.errors import WeightsError
from t3compile.verification import allowed_error
from t3compile.weights import CastWeights, NoWeights, OverlaidWeights, RandomWeights, TensorWeights

SHAPES = {"a.weight": ((4, 3), torch.float32), "b.bias": ((5,), torch.float16)}


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    forward = {name: RandomWeights(SHAPES).load(name) for name in SHAPES}
    backward = {name: RandomWeights(SHAPES).load(name) for name in reversed(SHAPES)}
    assert all(torch.equal(forward[name], backward[name]) for name in SHAPES)
    assert not torch.equal(forward["a.weight"], RandomWeights(SHAPES, seed=1).load("a.weight"))


def test_random_weights_do_not_depend_on_the_default_dtype() -> None:
    expected = RandomWeights(SHAPES).load("a.weight")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = RandomWeights(SHAPES).load("a.weight")
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, expected)


def test_cast_and_overlaid_weights() -> None:
    under = TensorWeights({"a": torch.ones(2), "b": torch.ones(2)})
    over = OverlaidWeights(TensorWeights({"b": torch.zeros(2)}), under)
    cast = CastWeights(over, {"a": torch.float16})
    assert set(cast.names()) == {"a", "b"}
    assert cast.load("a").dtype == torch.float16
    assert torch.equal(cast.load("b"), torch.zeros(2))


def test_missing_weights_name_the_tensor_and_the_remedy() -> None:
    with pytest.raises(WeightsError, match=r"'a' is needed first.*give --weights"):
        NoWeights(("a",), "give --weights").load("a")


def test_a_tolerance_never_becomes_meaningless() -> None:
    assert allowed_error(1e-6, 1e-7, 1.0) == pytest.approx(2.1e-6)
    assert allowed_error(6.2, 1e-7, 4.4) == pytest.approx(0.44)
