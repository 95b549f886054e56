"""Keys and values of every layer's prompt in one launch, and the gradient back to the prompts in one more.

    y[l] = x[l] W[l]^T + b[l]          dx[l] = dy[l] W[l]

The prompts of all layers are known before the first one runs, so their projections need not be 2 L small products. The
weights stay where the model keeps them: the kernel finds layer l's through a table of addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.repeat import Repeated
from ptv2_fast.kernels.tiles import widen

_POINTER_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# inner and columns belong to the model, and loads are only vectorised where their bounds are known to be even.
@triton.jit(do_not_specialize=("rows",))
def _layered_matmul_kernel(
    x_ptr,
    weight_table_ptr,
    bias_table_ptr,
    out_ptr,
    x_strides,
    inner_stride,
    column_stride,
    out_strides,
    rows,
    inner,
    columns,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # out[l] (rows, columns) = x[l] (rows, inner) @ w[l] (inner, columns) + bias[l]
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    column_tile = tl.program_id(0) // row_tiles
    layer = tl.program_id(1)
    weight = tl.load(weight_table_ptr + layer).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # An address read from memory carries no promise of its own, and loads would go element by element.
        weight = tl.multiple_of(weight, 16)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    x = x_ptr + widen(layer) * x_strides[0] + widen(m) * x_strides[1]  # [BLOCK_M, 1]
    weight += widen(n) * column_stride  # [1, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + widen(k)[None, :] * x_strides[2], mask=(m < rows) & (k[None, :] < inner), other=0.0)
        b = tl.load(weight + widen(k)[:, None] * inner_stride, mask=(k[:, None] < inner) & (n < columns), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias_table_ptr is not None:
        bias = tl.load(bias_table_ptr + layer).to(tl.pointer_type(DTYPE))
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    out = out_ptr + widen(layer) * out_strides[0] + widen(m) * out_strides[1] + widen(n) * out_strides[2]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < rows) & (n < columns))


_How = tuple[bool, int, int, int]


def _layered_matmul(
    x: torch.Tensor,
    weight_table: torch.Tensor,
    bias_table: torch.Tensor | None,
    aligned: bool,
    columns: int,
    inner_stride: int,
    column_stride: int,
) -> torch.Tensor:
    """(L, rows, columns) from x (L, rows, inner) and tables of addresses of (inner, columns) weights.

    aligned: whether every weight begins at a multiple of 16 bytes.
    """
    layers, rows, inner = x.shape
    out = launch.allocate((layers, rows, columns), x.dtype, x.device)
    config = launch.choose_projection_config(launch.architecture(x.device), x.dtype, rows)
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    launch.run(
        _layered_matmul_kernel,
        (programs, layers),
        x.device,
        (x, weight_table, bias_table, out),
        launcher.constants(
            x_strides=x.stride(),
            inner_stride=inner_stride,
            column_stride=column_stride,
            out_strides=out.stride(),
            rows=rows,
            inner=inner,
            columns=columns,
            DTYPE=_POINTER_TYPES[x.dtype],
            ALIGNED=aligned,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )
    return out


class WeightTable:
    """Addresses of the (F, D) weights, and optionally (F,) biases, of L layers on the device that holds them.

    Build it once per model and pass it to `prompt_projection`: building copies 8 L bytes to the device. It keeps the
    memory alive, also of parameters that are moved elsewhere; a model that moves or replaces its weights needs another
    table.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None) -> None:
        first = weights[0]
        for name, tensors in (("weights", weights), ("biases", biases or ())):
            for place, tensor in enumerate(tensors):
                like = tensors[0]
                if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != (
                    like.shape, like.stride(), first.dtype, first.device,
                ):  # fmt: skip
                    raise ValueError(
                        f"{name}[{place}] must have the shape, strides, dtype and device of {name}[0]: "
                        f"{tuple(like.shape)}, {like.stride()}, {first.dtype}, {first.device}; "
                        f"got {tuple(tensor.shape)}, {tensor.stride()}, {tensor.dtype}, {tensor.device}"
                    )
        if first.dtype not in _POINTER_TYPES:
            raise ValueError(f"weights must be float16, bfloat16 or float32; got {first.dtype}")
        if first.dim() != 2:
            raise ValueError(f"weights must be (F, D) each; got shape {tuple(first.shape)}")
        if biases is not None and (
            len(biases) != len(weights) or biases[0].shape != first.shape[:1] or biases[0].stride() != (1,)
        ):
            raise ValueError(
                f"biases must be {len(weights)} contiguous tensors of shape ({first.shape[0]},); "
                f"got {len(biases)} of shape {tuple(biases[0].shape)}"
            )
        # A parameter may be given other memory; an alias of it keeps what is addressed here.
        self.tensors = tuple(tensor.detach() for tensor in (*weights, *(biases or ())))
        self.num_layers = len(weights)
        self.shape, self.strides, self.dtype, self.device = first.shape, first.stride(), first.dtype, first.device
        self.aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
        (out_features, in_features), (of_row, of_column) = self.shape, self.strides
        # The last arguments of `_layered_matmul`, for x and for gradients of what is made of it.
        self.forward: _How = (self.aligned, out_features, of_column, of_row)
        self.backward: _How = (self.aligned, in_features, of_row, of_column)
        self.weights = self._addresses(weights)
        self.biases = None if biases is None else self._addresses(biases)

    @staticmethod
    def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)


@Repeated
def _projected(numbers: tuple[_How, ...], x: torch.Tensor, *tables: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What each table makes of x: (L, rows, columns); numbers are the last arguments of `_layered_matmul`."""
    pairs: Any = zip(numbers, tables[::2], tables[1::2], strict=True)
    return tuple(_layered_matmul(x, weights, biases, *how) for how, weights, biases in pairs)


@Repeated
def _differentiated(numbers: tuple[_How, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the tables make of gradients of what they made, one each."""
    pairs = zip(numbers, tensors[::2], tensors[1::2], strict=True)
    return tuple(_layered_matmul(grad, weights, None, *how) for how, grad, weights in pairs)


class _PromptProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tables: tuple[WeightTable, ...]) -> tuple[torch.Tensor, ...]:
        ctx.tables = tables
        ctx.set_materialize_grads(False)
        return _projected(
            tuple([table.forward for table in tables]),
            x,
            *[addresses for table in tables for addresses in (table.weights, table.biases)],
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        asked = [(grad, table) for grad, table in zip(grads, ctx.tables, strict=True) if grad is not None]
        if not asked:
            return None, None
        parts = _differentiated(
            tuple([table.backward for _, table in asked]),
            *[tensor for grad, table in asked for tensor in (grad, table.weights)],
        )
        return functools.reduce(torch.add, parts), None


def prompt_projection(
    x: torch.Tensor, weights: Sequence[torch.Tensor] | WeightTable, biases: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Project every layer's prompt with that layer's frozen weight: y[l] = x[l] W[l]^T + b[l], in one launch.

    Args:
        x: prompts (L, P, D), any strides; differentiable.
        weights: L tensors (F, D) of one shape and one stride pattern (a transposed view is fine), frozen; or a
            `WeightTable` of them, which a training loop should build once.
        biases: L contiguous tensors (F,), or None; part of the table where one is given.
    Returns:
        (L, P, F) in x's dtype, products accumulated in float32.
    Raises:
        ValueError: layers, sizes, dtypes or devices disagree.
    """
    table = weights if isinstance(weights, WeightTable) else WeightTable(weights, biases)
    return prompt_projections(x, (table,))[0]


def prompt_projections(x: torch.Tensor, tables: Sequence[WeightTable]) -> tuple[torch.Tensor, ...]:
    """`prompt_projection` of the same prompts by several tables: keys and values are two.

    Raises:
        ValueError: as there.
    """
    for table in tables:
        expected = (table.num_layers, table.shape[1])
        if x.dim() != 3 or (x.shape[0], x.shape[2]) != expected or (x.dtype, x.device) != (table.dtype, table.device):
            raise ValueError(
                f"x must be ({expected[0]}, P, {expected[1]}) {table.dtype} on {table.device}; "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if x.dtype == torch.bfloat16 and launch.architecture(x.device) == 0:
        raise ValueError("x must be float32 or float16 under Triton's interpreter; got torch.bfloat16")
    made: tuple[torch.Tensor, ...] = _PromptProjection.apply(x, tuple(tables))
    return made
