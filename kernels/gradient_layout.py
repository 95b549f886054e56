"""Where the gradients of queries, keys and values lie in memory.

A model that computes all three by one matrix product cuts its result into columns. Gradients that lie as those columns
do are what the product's backward reads; each in memory of its own, they would be copied together first.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from ptv2_fast.kernels import launch

ThreeGradients: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

# Which of queries (0), keys (1) and values (2) have the columns of one buffer, from the first to the last.
Order: TypeAlias = tuple[int, int, int]


def column_order(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Order | None:
    """In which order (B, H, N, d) and two (B, Hkv, N, d) are the columns of one contiguous (B, N, W); None otherwise.

    It asks for addresses: what repeats a call has to be told the answer.
    """
    _, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    width = (heads + 2 * kv_heads) * head_dim
    if not q.stride() == k.stride() == v.stride() == (tokens * width, head_dim, width, 1) or k.shape[2] != tokens:
        return None
    parts = sorted(((q.data_ptr(), 0, heads), (k.data_ptr(), 1, kv_heads), (v.data_ptr(), 2, kv_heads)))
    (start, first, one), (middle, second, two), (last, third, _) = parts
    size = head_dim * q.element_size()
    return (first, second, third) if middle - start == one * size and last - middle == two * size else None


def allocate_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_query: bool, of_text: bool, order: Order | None = None
) -> ThreeGradients:
    """Fresh memory for dq, dk and dv; None for dq, or for the others, if not asked for.

    Args:
        q, k, v: (B, H, N, d) and (B, Hkv, M, d), or packed (T, H, d) and (T, Hkv, d).
        order: they become the columns of one (B, N, (H + 2 Hkv) d) or (T, (H + 2 Hkv) d), if all are asked for. Without
            it each has memory of its own, laid out as the output is.
    """
    if order is not None and of_query and of_text:
        return _columns((q, k, v), order)
    dq = launch.allocate_heads(q) if of_query else None
    if not of_text:
        return dq, None, None
    return dq, launch.allocate_heads(k), launch.allocate_heads(v)


def _columns(tensors: tuple[torch.Tensor, ...], order: Order) -> ThreeGradients:
    first = tensors[0]
    head_dim = first.shape[-1]
    width = sum(tensor.shape[1] for tensor in tensors) * head_dim
    if first.dim() == 3:
        rows: tuple[int, ...] = (first.shape[0],)
        strides: tuple[int, ...] = (width, head_dim, 1)
    else:
        rows = (first.shape[0], first.shape[2])
        strides = (rows[1] * width, head_dim, width, 1)
    buffer = launch.allocate((*rows, width), first.dtype, first.device)
    made: list[torch.Tensor | None] = [None] * 3
    start = 0
    for place in order:
        shape = tensors[place].shape
        made[place] = buffer.as_strided(shape, strides, start)
        start += shape[1] * head_dim
    return made[0], made[1], made[2]
