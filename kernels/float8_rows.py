"""Matrices in float8 with a scale a row, made in one launch; and such a matrix transposed in one more.

    scale[r] = max_c |x[r, c] f[c]| / largest        values[r, c] = x[r, c] f[c] / scale[r]

A program owns a row: it reads the row for its largest number, and again, from the cache, to scale and round it. So x
comes from memory once, where separate operations read it twice and keep the quotients in float32 between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.tiles import widen

# Columns that are read at once, and the sides of a tile that is transposed.
_MOST_COLUMNS, _SIDE = 2048, 64


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    factors_ptr,
    values_ptr,
    scales_ptr,
    x_strides,
    columns,
    largest,
    smallest,
    BLOCK: tl.constexpr,
):
    row = widen(tl.program_id(0))
    x = x_ptr + row * x_strides[0]
    lanes = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        most = tl.maximum(most, tl.abs(_scaled_part(x, factors_ptr, x_strides[1], start + lanes, columns)))
    scale = tl.maximum(tl.div_rn(tl.max(most, 0), largest), smallest)
    tl.store(scales_ptr + row, scale)
    for start in range(0, columns, BLOCK):
        places = start + lanes
        part = _scaled_part(x, factors_ptr, x_strides[1], places, columns)
        # Rounded as everywhere else: the usual quotient may be off by a bit, which may be another number of float8.
        quotient = tl.div_rn(part, tl.zeros_like(part) + scale)
        tl.store(values_ptr + row * columns + places, quotient.to(values_ptr.dtype.element_ty), mask=places < columns)


@triton.jit
def _scaled_part(x, factors_ptr, stride, places, columns):
    """x f at some places of a row, in float32."""
    there = places < columns
    part = tl.load(x + widen(places) * stride, mask=there, other=0.0).to(tl.float32)
    if factors_ptr is not None:
        part *= tl.load(factors_ptr + places, mask=there, other=0.0)
    return part


@triton.jit
def _transpose_bytes_kernel(x_ptr, out_ptr, rows, columns, SIDE: tl.constexpr):
    down, along = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    there = (down[:, None] < rows) & (along[None, :] < columns)
    tile = tl.load(x_ptr + widen(down[:, None]) * columns + along[None, :], mask=there)
    tl.store(out_ptr + widen(along[:, None]) * rows + down[None, :], tl.trans(tile), mask=tl.trans(there))


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, smallest: float, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float8 with the largest number of each as the largest that float8 has; gives (values, scales).

    Args:
        x: (R, C) float16, bfloat16 or float32, any strides.
        dtype: a float8.
        smallest: what no scale is below.
        factors: (C,) float32, contiguous: x f is what is quantized. None: x is.
    Returns:
        values (R, C) in `dtype` and scales (R, 1) float32, contiguous. What is NaN stays so where it stands; an
        infinite number is NaN in float8, and its row's scale is infinite.
    """
    rows, columns = x.shape
    values = launch.allocate((rows, columns), dtype, x.device)
    scales = launch.allocate((rows, 1), torch.float32, x.device)
    launch.run(
        _quantize_rows_kernel,
        (rows,),
        x.device,
        (x, factors, values, scales),
        launcher.constants(
            x_strides=x.stride(),
            columns=columns,
            largest=torch.finfo(dtype).max,
            smallest=smallest,
            BLOCK=min(_MOST_COLUMNS, triton.next_power_of_2(columns)),
        ),
    )
    return values, scales


def transposed(x: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix (R, C) of one byte an element as a contiguous one (C, R)."""
    rows, columns = x.shape
    out = launch.allocate((columns, rows), x.dtype, x.device)
    launch.run(
        _transpose_bytes_kernel,
        (triton.cdiv(rows, _SIDE), triton.cdiv(columns, _SIDE)),
        x.device,
        # Whatever the bytes mean, they are moved.
        (x.view(torch.uint8), out.view(torch.uint8)),
        launcher.constants(rows=rows, columns=columns, SIDE=_SIDE),
    )
    return out
