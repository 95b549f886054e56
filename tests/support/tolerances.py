"""How far two results may lie apart: the one place that says so."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error ||a - r|| / ||r|| between two orders of the same sums.
_BUDGET = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_equal(actual: Tensor, expected: Tensor, what: str = "", dtype=None) -> None:
    """Fail unless two tensors are the same up to rounding in their dtype."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    budget = _BUDGET[dtype or actual.dtype]
    if expected.numel() == 0:
        return
    if not float(expected.detach().abs().max()):
        assert float(actual.detach().abs().max()) < budget, f"{what}: should be zero"
        return
    error = relative_error(actual, expected)
    assert error < budget, f"{what}: relative error {error:.2e} over {budget:.0e}"


def assert_differs(actual: Tensor, other: Tensor, what: str = "") -> None:
    """Fail unless two tensors differ by far more than rounding."""
    error = relative_error(actual, other)
    assert error > 1e-3, f"{what}: relative difference is only {error:.2e}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail unless two tensors hold the same numbers to the last bit, in the same shape and dtype.

    To be asked of what is stored, copied, chosen or masked: parameters, gradients that are zero, tokens, positions. Of
    what a model computes only where the same code runs on the same inputs under the same conditions: shapes, strides,
    requires_grad of the parameters, gradients on or off, training or eval, dtype, device, threads. Anything else is a
    sum in another order on some processor, and `assert_equal` compares it: one row and a batch, padded and packed,
    trained and frozen, eager and compiled, two backends. docs/reproducibility.md promises no more; what is asked for
    too much fails with PTV2_OTHER_ROUNDING=1.
    """
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    if not torch.equal(actual, expected):
        count = int((actual != expected).sum())
        error = relative_error(actual, expected)
        raise AssertionError(f"{what}: {count} of {actual.numel()} numbers differ, relative error {error:.2e}")
