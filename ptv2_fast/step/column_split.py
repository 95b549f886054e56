"""Columns of a matrix product cut into parts, whose gradients are not copied together where they lie so already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, ...]


class ColumnSplit:
    """Cuts (..., W) along the last axis, as `split_with_sizes` does; the gradients have the same bits too.

    Where those of the parts are the columns of one buffer, in their order, the buffer is the gradient. What was seen to
    come otherwise (rotations in between, SDPA, a gate) is left to PyTorch's own operation from then on, which costs the
    host less.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = list(sizes)
        self.may_lie_together = True

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """The parts of x (..., W), views of it."""
        if (
            self.may_lie_together
            and x.requires_grad
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        ):
            parts: Sequence[Tensor] = _Split.apply(x, self)
            return parts
        return x.split_with_sizes(self.sizes, -1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: ColumnSplit) -> tuple[Tensor, ...]:
        ctx.split = split
        ctx.set_materialize_grads(False)
        return tuple(x.split_with_sizes(split.sizes, -1))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return tuple(tangent.split_with_sizes(ctx.split.sizes, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        split = ctx.split
        if torch.is_grad_enabled():  # a graph of gradients is asked for
            return _concatenated(grads, split.sizes), None
        whole = joined_columns(grads)
        if whole is not None:
            return whole, None
        split.may_lie_together = any(grad is None for grad in grads)
        return _concatenated(grads, split.sizes), None


def joined_columns(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The contiguous tensor (..., W) whose columns the parts are, from the first to the last; None if there is none."""
    first = parts[0]
    # A sparse tensor has no storage, nor has a batch of gradients.
    if type(first) is not Tensor or not torch._C._has_storage(first) or first.stride(-1) != 1:
        return None
    strides, dtype = first.stride(), first.dtype
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    offset = start
    for part in parts:
        if (
            type(part) is not Tensor
            or not torch._C._has_storage(part)
            or part.dtype != dtype
            or part.stride() != strides
            or part.storage_offset() != offset
            or part.untyped_storage().data_ptr() != memory
        ):
            return None
        offset += part.shape[-1]
    whole = first.as_strided((*first.shape[:-1], offset - start), strides)
    return whole if whole.is_contiguous() else None


def _concatenated(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The parts side by side, zeros for those that are missing; None if all are."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    shape = given[0].shape[:-1]
    filled = [given[0].new_zeros(*shape, n) if part is None else part for part, n in zip(parts, sizes, strict=True)]
    return torch.cat(filled, -1)
