"""A frozen linear map in float8: y = x W^T + b and dx = dy W, by `torch._scaled_mm`, from one quantized copy of W.

W (N, K) is float8_e4m3fn times one scale a row, that is an output. Forward, rows of x are quantized as they come, and
both scales leave the product as factors of its result. Backward, the outputs are what is summed over, where a factor
cannot leave: there the weight's scales are multiplied into dy before its rows are quantized, so the same copy serves.

    forward    y  = s_x (x / s_x)_8 W_8^T s_W + b          s_x (M, 1), s_W (1, N)
    backward   dx = s_g (g / s_g)_8 W_8                    g = dy s_W (M, N), s_g (M, 1)

Gradients are e4m3 too: with a scale of its own each row needs precision, and not the range of e5m2
(benchmarks/quality/float8.py compares them).

A product's second operand must lie with what is summed over innermost (Hopper's tensor cores read float8 no other
way). So backward transposes the copy each time: two bytes of traffic a weight beside the 2 M operations of the product,
instead of one more byte of memory a weight for good.

Eager calls on CUDA quantize and transpose by a kernel each (`kernels/float8_rows.py`), others by torch's operations,
which the compiler makes one kernel of: the same numbers to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.triton_backend import unavailable_reason

FLOAT8 = GRADIENTS = torch.float8_e4m3fn
# `torch._scaled_mm` takes sizes that are multiples of it.
MULTIPLE = 16
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A row of zeros has a scale too, by which it can be divided.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Float8Rows(NamedTuple):
    """A matrix whose rows have a scale each: values * scales.

    Attributes:
        values: (R, C) float8.
        scales: (R, 1) float32, or (1, 1) where all rows have the same one.
    """

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor, dtype: torch.dtype = FLOAT8, factors: Tensor | None = None) -> Float8Rows:
    """A matrix (R, C) in float8, contiguous, the largest number of each row as the largest that float8 has.

    What is infinite or NaN makes its row NaN where it stands or everywhere, and is never cut to a number.

    Args:
        x: float.
        dtype: a float8.
        factors: (C,) float32, contiguous, of columns of x: the product is what is quantized. None: x is.
    """
    if _has_kernels(x) and x.dtype in _KERNEL_DTYPES:
        from ptv2_fast.kernels import float8_rows

        return Float8Rows(*float8_rows.quantize_rows(x, dtype, SMALLEST_SCALE, factors))
    if factors is not None:
        x = x * factors
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=_at_least_float32(x))
    scales = (largest.float() / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    # A quotient lies as x does, which a transposed x would have by columns.
    return Float8Rows((x / scales).to(dtype, memory_format=torch.contiguous_format), scales)


def _has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels serve a tensor: one with memory, of an eager call."""
    return type(x) is Tensor and x.is_cuda and not torch.compiler.is_compiling() and not unavailable_reason(x.device)


def float8_linear(x: Tensor, weight: Float8Rows, bias: Tensor | None) -> Tensor:
    """x W^T + b (..., N) with both operands in float8, in the dtype of x, or autocast's; differentiable in x alone.

    Args:
        x: (..., K).
        weight: (N, K), a constant.
        bias: (N,) or None, a constant.
    """
    dtype = autocast_dtype(x.device) or x.dtype
    result: Tensor = _Float8Linear.apply(x, weight.values, weight.scales, bias, dtype)
    return result


def input_gradient(grad_output: Tensor, weight: Float8Rows, dtype: torch.dtype) -> Tensor:
    """dx (..., K) of dy (..., N) and the weight (N, K) that y was computed with."""
    # One scale for all rows is one for each here.
    factors = weight.scales.expand(len(weight.values), 1).contiguous().view(-1)
    rows = quantize_rows(grad_output.reshape(-1, grad_output.shape[-1]), GRADIENTS, factors)
    values = transposed(weight.values)
    ones = weight.scales.new_ones(len(values), 1)
    grad = scaled_product(rows, Float8Rows(values, ones), None, dtype)
    return grad.view(*grad_output.shape[:-1], len(values))


def transposed(values: Tensor) -> Tensor:
    """A contiguous matrix (R, C) of float8 as a contiguous one (C, R)."""
    if _has_kernels(values):
        from ptv2_fast.kernels import float8_rows

        return float8_rows.transposed(values)
    return values.T.clone(memory_format=torch.contiguous_format)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.dtype = x.dtype
        rows = quantize_rows(x.reshape(-1, x.shape[-1]))
        return scaled_product(rows, Float8Rows(values, scales), bias, dtype).view(*x.shape[:-1], values.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradient(grad_output, Float8Rows(*ctx.saved_tensors), ctx.dtype), None, None, None, None


def scaled_product(left: Float8Rows, right: Float8Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """left right^T + bias, (M, N) in `dtype`, summed in float32.

    Args:
        left, right: (M, K) and (N, K), contiguous; on CUDA K and N are multiples of `MULTIPLE`.
        bias: (N,) or None.
    """
    if left.values.device.type == "cuda":
        # With scales by rows, the one dtype that comes out of it.
        through = torch.bfloat16
        own = None if bias is None else bias.to(through)
        scales = right.scales.expand(len(right.values), 1).contiguous().T
        made = torch._scaled_mm(
            left.values, right.values.T, scale_a=left.scales, scale_b=scales, bias=own, out_dtype=through
        )
        return made.to(dtype)
    # Elsewhere the same numbers by a product in float32: `torch._scaled_mm` is slower than that on a CPU.
    with torch.autocast(left.values.device.type, enabled=False):
        made = left.values.float() @ right.values.float().T * left.scales * right.scales.T
        return (made if bias is None else made + bias).to(dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
