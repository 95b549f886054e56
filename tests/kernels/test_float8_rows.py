"""Rows quantized by the kernel, and bytes transposed by it, against torch's operations: the same bits."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.backbone import float8_linear
from ptv2_fast.backbone.float8_linear import SMALLEST_SCALE
from ptv2_fast.kernels import float8_rows

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def _rounding(monkeypatch, device):
    """The interpreter loses the carry of a rounding that reaches the next power of two; torch's does not."""
    if device.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    convert = interpreter._convert_float

    def rounded(numbers, given, wanted, mode):
        if wanted not in kinds or given != tl.float32:
            return convert(numbers, given, wanted, mode)
        return torch.from_numpy(numbers.copy()).to(kinds[wanted]).view(torch.uint8).numpy().reshape(numbers.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def same(found, expected):
    """Whether values and scales are the same bits; NaN is no number of its own."""
    values, scales = found
    assert values.dtype == expected.values.dtype and values.is_contiguous() and scales.shape == (len(values), 1)
    assert torch.equal(scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))
    numbers, others = values.float(), expected.values.float()
    return torch.equal(numbers.nan_to_num(-1.0), others.nan_to_num(-1.0))


@pytest.mark.parametrize("columns", [1, 48, 2500])
@pytest.mark.parametrize("kind", FLOAT8, ids=str)
def test_rows_are_torchs_to_the_bit(device, dtype, kind, columns):
    torch.manual_seed(0)
    sizes = torch.logspace(-7, 4, 9, device=device)[:, None]
    x = (torch.randn(9, columns, device=device) * sizes).to(dtype)
    x[3] = 0.0
    factors = torch.rand(columns, device=device) + 1e-3
    strided = x.T.contiguous().T
    for given in (x, strided):
        assert same(float8_rows.quantize_rows(given, kind, SMALLEST_SCALE), plain(given, kind, None))
        assert same(float8_rows.quantize_rows(given, kind, SMALLEST_SCALE, factors), plain(given, kind, factors))


def plain(x, kind, factors):
    """What torch's operations make, on the CPU."""
    made = float8_linear.quantize_rows(x.cpu(), kind, None if factors is None else factors.cpu())
    return float8_linear.Float8Rows(*(part.to(x.device) for part in made))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_hidden_and_stays_in_its_row(device, odd):
    x = torch.ones(3, 40, device=device)
    x[1, 4] = odd
    values, scales = float8_rows.quantize_rows(x, torch.float8_e4m3fn, SMALLEST_SCALE)
    numbers = values.float() * scales
    assert numbers[1, 4].isnan() and torch.equal(numbers[[0, 2]], x[[0, 2]])


def test_no_rows(device):
    values, scales = float8_rows.quantize_rows(torch.empty(0, 48, device=device), torch.float8_e4m3fn, SMALLEST_SCALE)
    assert values.shape == (0, 48) and scales.shape == (0, 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 64), (70, 130)])
def test_bytes_are_transposed(device, rows, columns):
    x = torch.randint(0, 255, (rows, columns), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    turned = float8_rows.transposed(x)
    assert turned.dtype == x.dtype and turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), x.view(torch.uint8).T)


@pytest.mark.parametrize("one_scale", [False, True])
def test_a_map_by_kernels_is_the_map_without(monkeypatch, device, dtype, one_scale):
    torch.manual_seed(0)
    weight = float8_linear.quantize_rows(torch.randn(32, 48, device=device))
    if one_scale:
        weight = weight._replace(scales=weight.scales[:1])
    x = torch.randn(2, 5, 48, device=device, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(2, 5, 32, device=device, dtype=dtype)
    made = {}
    for by_kernels in (False, True):
        monkeypatch.setattr(float8_linear, "_has_kernels", lambda x, answer=by_kernels: answer)
        y = float8_linear.float8_linear(x, weight, None)
        made[by_kernels] = y, *torch.autograd.grad(y, x, grad_output)
    for found, expected in zip(made[True], made[False], strict=True):
        assert torch.equal(found, expected)
