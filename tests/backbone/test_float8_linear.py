"""A linear map in float8 against the same in float64, of numbers rounded one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_fast.backbone import float8_linear as own
from ptv2_fast.backbone.float8_linear import Float8Rows, float8_linear, input_gradient, quantize_rows, scaled_product
from tolerances import assert_equal, relative_error

# A number of e4m3 has three binary digits after the first one, and half of the last is lost at most.
ROUNDING = 2.0**-4


def _rounded(x: Tensor, largest: float = 448.0, digits: int = 3, lowest: int = -6) -> Tensor:
    """Rows of float64 numbers at what a float8 with one scale a row leaves of them."""
    # What is divided stands nearly between two numbers often enough: that is done as the device does it.
    scales = x.abs().amax(-1, keepdim=True).float() / largest
    scaled, scales = (x.float() / scales).double(), scales.double()
    exponents = torch.floor(torch.log2(scaled.abs().clamp(min=1e-300))).clamp(min=lowest)
    steps = torch.exp2(exponents - digits)
    return torch.round(scaled / steps) * steps * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_map_and_its_gradient_are_those_of_rounded_numbers(dtype, with_bias):
    torch.manual_seed(0)
    x = torch.randn(3, 17, 48, dtype=dtype) * torch.logspace(-20, 3, 17)[:, None].to(dtype)
    x.requires_grad_()
    weight = torch.randn(32, 48, dtype=dtype) * torch.logspace(-4, 1, 32)[:, None].to(dtype)
    bias = torch.randn(32, dtype=dtype) if with_bias else None
    rows = quantize_rows(weight)
    y = float8_linear(x, rows, bias)
    exact, scales = _rounded(weight.double()), rows.scales.double()
    assert_equal(rows.values.double() * scales, exact, "weight", torch.float32)
    expected = _rounded(x.double()) @ exact.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert_equal(y.double(), expected, "y", torch.float32 if dtype is torch.float64 else dtype)
    grad_output = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    folded = _rounded((grad_output.float() * rows.scales.T).double())
    assert grad.dtype == dtype
    expected = folded @ (exact / scales)
    assert_equal(grad.double(), expected, "dx", torch.float32 if dtype is torch.float64 else dtype)


def test_it_is_near_to_the_plain_map():
    torch.manual_seed(0)
    x, weight = torch.randn(65, 64, requires_grad=True), torch.randn(32, 64)
    y, plain = float8_linear(x, quantize_rows(weight), None), x @ weight.T
    assert relative_error(y, plain) < ROUNDING
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, plain)]
    assert relative_error(*grads) < 2 * ROUNDING


def test_rows_of_zeros_and_of_the_smallest_numbers_are_numbers():
    x = torch.zeros(4, 16)
    x[1], x[2], x[3, 5] = 1e-44, torch.finfo(torch.float32).max, -1e-30
    back = quantize_rows(x).values.float() * quantize_rows(x).scales
    assert torch.equal(back[0], x[0]) and back.isfinite().all()
    assert_equal(back[2:], x[2:], "largest and small")


def test_rows_are_contiguous_where_what_they_are_made_of_is_transposed():
    """`torch._scaled_mm` takes a left operand that lies by rows, and a right one that lies by columns."""
    x = torch.randn(16, 32)
    rows, straight = quantize_rows(x.T.contiguous().T), quantize_rows(x)
    assert rows.values.is_contiguous() and rows.scales.is_contiguous()
    assert torch.equal(rows.values.float(), straight.values.float())


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_hidden_and_stays_in_its_row(odd):
    x = torch.ones(3, 16)
    x[1, 4] = odd
    y = float8_linear(x, quantize_rows(torch.ones(16, 16)), None)
    assert y[1].isnan().all()
    assert_equal(y[[0, 2]], torch.full((2, 16), 16.0), "other rows")


def test_under_autocast_it_gives_the_dtype_of_autocast():
    x, rows = torch.randn(5, 32, requires_grad=True), quantize_rows(torch.randn(16, 32))
    expected = float8_linear(x, rows, None)
    with torch.autocast("cpu", torch.bfloat16):
        y = float8_linear(x, rows, None)
    assert y.dtype is torch.bfloat16
    assert_equal(y, expected.bfloat16(), "y")
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_on_cuda_torch_takes_the_operands_as_they_lie(tokens, dtype):
    """torch's own rules of `_scaled_mm`, without a card: shapes, strides, dtypes, scales."""
    with FakeTensorMode():
        x = torch.empty(2, tokens, 48, dtype=dtype, device="cuda")
        weight = quantize_rows(torch.empty(32, 48, dtype=dtype, device="cuda"))
        bias = torch.empty(32, dtype=dtype, device="cuda")
        y = scaled_product(quantize_rows(x.reshape(-1, 48)), weight, bias, dtype)
        assert y.shape == (2 * tokens, 32) and y.dtype is dtype
        grad = input_gradient(y.view(2, tokens, 32), weight, dtype)
        assert grad.shape == x.shape and grad.dtype is dtype
        odd = torch.empty(3, 40, dtype=dtype, device="cuda")
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_product(quantize_rows(odd), quantize_rows(odd), None, dtype)


def test_where_rows_have_a_scale_torchs_own_product_on_a_cpu_is_the_imitation():
    ones, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"this torch has none: {error}")
    torch.manual_seed(0)
    left, right = quantize_rows(torch.randn(5, 48)), quantize_rows(torch.randn(32, 48))
    found = torch._scaled_mm(
        left.values, right.values.T, scale_a=left.scales, scale_b=right.scales.T, out_dtype=torch.float32
    )
    assert_equal(scaled_product(left, right, None, torch.float32), found, "product")


def test_the_forward_is_one_graph():
    rows: Float8Rows = quantize_rows(torch.randn(16, 32))
    compiled = torch.compile(float8_linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 32, requires_grad=True)
    y, expected = compiled(x, rows, None), float8_linear(x, rows, None)
    assert_equal(y, expected, "y")
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    assert_equal(*grads, "dx")
    assert own.GRADIENTS is own.FLOAT8
