"""Attention as a textbook has it, in Triton: what the loops of our kernels are measured by, and nothing else.

One list of keys, no prompt, no mask, no group of heads; numbers of queries and keys are multiples of the tiles, and all
tensors lie alike, (heads, rows, d) with a stride of rows. Compiled with the tiles of our kernels (`hot_loops.py`), its
loops are what those would be if what they do besides cost nothing. Never launched.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.tiles import LOG2E


@triton.jit
def _rows_of(ptr, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    return tl.load(ptr + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _store_rows(ptr, start, stride, tile, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    tl.store(ptr + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :], tile.to(ptr.dtype.element_ty))


@triton.jit
def _plain_forward_kernel(
    q, k, v, o, lse, size, stride, scale, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64) * BLOCK_D
    first = tl.program_id(0) * BLOCK_M
    queries = _rows_of(q + head, first, stride, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, size, BLOCK_N):
        scores = tl.dot(queries, tl.trans(_rows_of(k + head, start, stride, BLOCK_N, BLOCK_D)))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * LOG2E))
        probs = tl.exp2(scores * (scale * LOG2E) - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(probs, 1)
        values = _rows_of(v + head, start, stride, BLOCK_N, BLOCK_D)
        acc = tl.dot(probs.to(values.dtype), values, acc * decay[:, None])
        row_max = new_max
    _store_rows(o + head, first, stride, acc / row_sum[:, None], BLOCK_M, BLOCK_D)
    rows = tl.program_id(1) * size + first + tl.arange(0, BLOCK_M)
    tl.store(lse + rows, row_max + tl.log2(row_sum))


@triton.jit
def _plain_query_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    size,
    stride,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * BLOCK_D
    first = tl.program_id(0) * BLOCK_M
    queries = _rows_of(q + head, first, stride, BLOCK_M, BLOCK_D)
    upstream = _rows_of(do + head, first, stride, BLOCK_M, BLOCK_D)
    rows = tl.program_id(1) * size + first + tl.arange(0, BLOCK_M)
    row_lse, row_delta = tl.load(lse + rows)[:, None], tl.load(delta + rows)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, size, BLOCK_N):
        keys = _rows_of(k + head, start, stride, BLOCK_N, BLOCK_D)
        values = _rows_of(v + head, start, stride, BLOCK_N, BLOCK_D)
        probs = tl.exp2(tl.dot(queries, tl.trans(keys)) * (scale * LOG2E) - row_lse)
        dscores = probs * (tl.dot(upstream, tl.trans(values)) - row_delta)
        acc = tl.dot(dscores.to(keys.dtype), keys, acc)
    _store_rows(dq + head, first, stride, acc * scale, BLOCK_M, BLOCK_D)


@triton.jit
def _plain_key_gradients_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    size,
    stride,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * BLOCK_D
    first = tl.program_id(0) * BLOCK_N
    keys = _rows_of(k + head, first, stride, BLOCK_N, BLOCK_D)
    values = _rows_of(v + head, first, stride, BLOCK_N, BLOCK_D)
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in range(0, size, BLOCK_M):
        queries = _rows_of(q + head, start, stride, BLOCK_M, BLOCK_D)
        upstream = _rows_of(do + head, start, stride, BLOCK_M, BLOCK_D)
        rows = tl.program_id(1) * size + start + tl.arange(0, BLOCK_M)
        row_lse, row_delta = tl.load(lse + rows)[None, :], tl.load(delta + rows)[None, :]
        probs = tl.exp2(tl.dot(keys, tl.trans(queries)) * (scale * LOG2E) - row_lse)
        dscores = probs * (tl.dot(values, tl.trans(upstream)) - row_delta)
        value_sum = tl.dot(probs.to(upstream.dtype), upstream, value_sum)
        key_sum = tl.dot(dscores.to(queries.dtype), queries, key_sum)
    _store_rows(dk + head, first, stride, key_sum * scale, BLOCK_N, BLOCK_D)
    _store_rows(dv + head, first, stride, value_sum, BLOCK_N, BLOCK_D)


# Our kernel -> its plain form, and the tensors that form takes.
_PLAIN = {
    "prompt_attention_forward": (_plain_forward_kernel, "q k v o lse"),
    "prompt_attention_backward_query": (_plain_query_gradient_kernel, "q k v do lse delta dq"),
    "prompt_attention_backward_text": (_plain_key_gradients_kernel, "q k v do lse delta dk dv"),
    "prompt_attention_backward_prompt": (_plain_key_gradients_kernel, "q k v do lse delta dk dv"),
}


def plain_launch(kernel: str, recorded: launch.Launch) -> launch.Launch | None:
    """The plain form of a launch of ours, with its tile and options; None for a kernel that has none.

    Args:
        kernel: its name in the tables.
        recorded: the launch; the prompt's tile, where it owns one, is the plain form's tile of keys.
    """
    if kernel not in _PLAIN:
        return None
    plain, names = _PLAIN[kernel]
    given = recorded.arguments
    keys = given["BLOCK_P"] if kernel == "prompt_attention_backward_prompt" else given["BLOCK_N"]
    dtype = given["inputs"].q.dtype
    statistics = torch.zeros(1)
    tensors = {name: statistics if name in ("lse", "delta") else torch.zeros(1, dtype=dtype) for name in names.split()}
    options: dict[str, Any] = {name: given[name] for name in ("num_warps", "num_stages", "maxnreg") if name in given}
    return launch.Launch(
        plain,
        {**tensors, "size": 1024, "stride": 768, "scale": 0.1, "BLOCK_D": given["BLOCK_D"], "BLOCK_M": given["BLOCK_M"],
         "BLOCK_N": keys, **options, **launcher.ASKED},
    )  # fmt: skip
