"""Prompt attention, backward, the kernel that owns short rows: dQ, dK and dV of a row's heads, and the prompt's share.

All queries of a row are one tile. It meets every key once: a pair of tiles has five products, nothing is read twice,
and delta and lse need no launch of their own. Heads that share keys add to sums in registers, so that their keys have
to be one tile too. See README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ptv2_fast.kernels.arguments import GradientTile, Pairs
from ptv2_fast.kernels.problem import UNSPECIALIZED
from ptv2_fast.kernels.tiles import (
    LOG2E,
    dropout_keep,
    load_tile,
    offset_of,
    prompt_entry,
    row_extent,
    score_gradient,
    store_tile,
    tile_scores,
    widen,
)

# The index of a hidden key: beyond every limit.
HIDDEN_KEY = tl.constexpr(2**30)


class RowTensors(NamedTuple):
    """What a row's gradients are made of besides the inputs (lse a natural logarithm), and they; or their strides.

    prompt_dk, prompt_dv: slots of float32 for sums over rows, which lie alike; None where another kernel sums.
    delta, lse2: what that kernel reads, laid out as lse; None where none does.
    """

    o: Any
    do: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any
    prompt_dk: Any
    prompt_dv: Any
    delta: Any
    lse2: Any


@triton.jit
def load_row_keys(
    inputs,
    strides,
    row,
    memory_row,
    kv_head,
    first_token,
    start,
    num_keys,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Text keys start.. of a row: (indices [1, BLOCK_N], `HIDDEN_KEY` for one that is masked or missing; k; v).

    What is hidden reads as 0 and is not loaded: a weight of 0 would not undo a NaN.
    """
    keys = start + tl.arange(0, BLOCK_N)
    attended = keys < num_keys
    if inputs.key_mask is not None:
        mask = inputs.key_mask + widen(row) * strides.key_mask[0] + widen(keys) * strides.key_mask[1]
        attended = tl.load(mask, mask=attended, other=0) != 0
    rows = tl.arange(0, BLOCK_N)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    loaded = attended[:, None]
    if switches.HEAD_DIM != BLOCK_D:
        loaded = loaded & (cols < switches.HEAD_DIM)
    address = inputs.k + offset_of(strides.k, memory_row, kv_head, first_token + start)
    k = tl.load(address + rows * strides.k[2] + cols * strides.k[3], mask=loaded, other=0.0)
    address = inputs.v + offset_of(strides.v, memory_row, kv_head, first_token + start)
    v = tl.load(address + rows * strides.v[2] + cols * strides.v[3], mask=loaded, other=0.0)
    return tl.where(attended, keys, HIDDEN_KEY)[None, :], k, v


@triton.jit
def query_gradient_step(dq, k, v, tile, keys, pairs, key_limit, factors, switches: tl.constexpr, IS_TEXT: tl.constexpr):
    """Add one tile of keys' share to dq / scale; also gives d dots and the dropped probabilities, [queries, keys].

    The last two are in the inputs' dtype, as operands of dK and dV.
    """
    dots = tl.dot(tile.q, tl.trans(k), input_precision=switches.PRECISION)  # [BLOCK_M, BLOCK_N]
    scores, unit, slope = tile_scores(dots, tile, keys, pairs, key_limit, factors, switches, True, IS_TEXT)
    probs = tl.exp2(scores * unit - tile.lse)
    dprobs = tl.dot(tile.do, tl.trans(v), input_precision=switches.PRECISION)
    keep = None
    if switches.HAS_DROPOUT:
        keep = dropout_keep(tile.seed, tile.stream, tile.queries, pairs.first_column + keys, factors.dropout_p)
    dscores, dropped = score_gradient(probs, dprobs, tile.delta, keep, factors.dropout_p, switches.HAS_DROPOUT)
    ddots = (dscores * slope).to(tile.q.dtype)
    dq = tl.dot(ddots, k, dq, input_precision=switches.PRECISION)
    return dq, ddots, dropped.to(tile.do.dtype)


@triton.jit
def store_keys(
    own,
    own_strides,
    memory_row,
    kv_head,
    first,
    keys_left,
    dk,
    dv,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write transposed dk / scale and dv of the text keys from token `first` on."""
    address = own.dk + offset_of(own_strides.dk, memory_row, kv_head, first)
    dk = tl.trans(dk * factors.scale)
    store_tile(address, own_strides.dk, keys_left, dk, BLOCK_N, switches.HEAD_DIM, BLOCK_D)
    address = own.dv + offset_of(own_strides.dv, memory_row, kv_head, first)
    store_tile(address, own_strides.dv, keys_left, tl.trans(dv), BLOCK_N, switches.HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_rows_kernel(
    inputs,
    own,
    strides,
    own_strides,
    num_queries,
    num_keys,
    prompt_length,
    num_heads,
    window,
    num_rows,
    num_splits,
    slot_size,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # A program owns a key/value head and every num_splits-th row. Heads vary fastest: they share lines of memory.
    num_kv_heads = num_heads // switches.GROUP
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(0) // num_kv_heads
    seed = 0
    if switches.HAS_DROPOUT:
        seed = tl.load(inputs.seed)
    keys_p = tl.arange(0, BLOCK_P)[None, :]
    if own.prompt_dk is not None:
        # One prompt for all rows, in one tile.
        _, length = prompt_entry(None, inputs.prompt_lens, 0, prompt_length)
        address = inputs.prompt_k + offset_of(strides.prompt_k, 0, kv_head, 0)
        prompt_k = load_tile(address, strides.prompt_k, length, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
        address = inputs.prompt_v + offset_of(strides.prompt_v, 0, kv_head, 0)
        prompt_v = load_tile(address, strides.prompt_v, length, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
        # Sums of keys are transposed: 64 rows and more for the tensor cores, whatever the number of keys.
        prompt_dk = tl.zeros([BLOCK_D, BLOCK_P], dtype=tl.float32)
        prompt_dv = tl.zeros([BLOCK_D, BLOCK_P], dtype=tl.float32)

    # What the compiler would compute once for all rounds of these loops, addresses of eight tensors, takes registers
    # that the sums need.
    for row in tl.range(split, num_rows, num_splits, disable_licm=True):
        memory_row, first_token, num_m, num_n = row_extent(inputs.cu_seqlens, row, num_queries, num_keys)
        entry = 0
        if own.prompt_dk is None and switches.HAS_PROMPT:
            entry, length = prompt_entry(inputs.prompt_index, inputs.prompt_lens, row, prompt_length)
        if switches.GROUP > 1:
            keys, k, v = load_row_keys(
                inputs, strides, row, memory_row, kv_head, first_token, 0, num_n, switches, BLOCK_D, BLOCK_N
            )
            dk = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
            dv = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)

        for number in tl.range(switches.GROUP, disable_licm=True):
            head = kv_head * switches.GROUP + number
            # [BLOCK_M, BLOCK_D]
            address = inputs.q + offset_of(strides.q, memory_row, head, first_token)
            q = load_tile(address, strides.q, num_m, BLOCK_M, switches.HEAD_DIM, BLOCK_D, True)
            address = own.do + offset_of(own_strides.do, memory_row, head, first_token)
            do = load_tile(address, own_strides.do, num_m, BLOCK_M, switches.HEAD_DIM, BLOCK_D, True)
            address = own.o + offset_of(own_strides.o, memory_row, head, first_token)
            o = load_tile(address, own_strides.o, num_m, BLOCK_M, switches.HEAD_DIM, BLOCK_D, True)
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            # In powers of two, and +inf where a query saw no key or is missing: its probabilities become 0.
            rows = tl.arange(0, BLOCK_M)
            statistics = offset_of(own_strides.lse, memory_row, head, first_token + rows)
            lse = tl.load(own.lse + statistics, mask=rows < num_m, other=float("-inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
            if own.delta is not None:
                tl.store(own.delta + statistics, delta, mask=rows < num_m)
                tl.store(own.lse2 + statistics, lse, mask=rows < num_m)
            queries = rows[:, None]
            tile = GradientTile(q, do, lse[:, None], delta[:, None], queries, num_m, seed, row * num_heads + head)
            dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

            if switches.HAS_PROMPT:
                prompt_bias = None
                if inputs.prompt_bias is not None:
                    prompt_bias = inputs.prompt_bias + offset_of(strides.prompt_bias, entry, head, 0) + queries * 0
                pairs = Pairs(
                    bias=prompt_bias,
                    bias_stride=strides.prompt_bias[2],
                    mask=None,
                    mask_stride=0,
                    shift=0,
                    window=0,
                    first_column=0,
                )
                if own.prompt_dk is not None:
                    dq, prompt_ddots, prompt_dropped = query_gradient_step(
                        dq, prompt_k, prompt_v, tile, keys_p, pairs, length, factors, switches, False
                    )
                    prompt_dv = tl.dot(tl.trans(do), prompt_dropped, prompt_dv, input_precision=switches.PRECISION)
                    prompt_dk = tl.dot(tl.trans(q), prompt_ddots, prompt_dk, input_precision=switches.PRECISION)
                else:
                    for start in tl.range(0, length, BLOCK_P, disable_licm=True):
                        address = inputs.prompt_k + offset_of(strides.prompt_k, entry, kv_head, start)
                        left = length - start
                        k_p = load_tile(address, strides.prompt_k, left, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
                        address = inputs.prompt_v + offset_of(strides.prompt_v, entry, kv_head, start)
                        v_p = load_tile(address, strides.prompt_v, left, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
                        dq, _, _ = query_gradient_step(
                            dq, k_p, v_p, tile, start + keys_p, pairs, length, factors, switches, False
                        )

            bias = None
            if inputs.bias is not None:
                bias = inputs.bias + offset_of(strides.bias, row, head, queries)  # [BLOCK_M, 1]
            pairs = Pairs(
                bias=bias,
                bias_stride=strides.bias[3],
                mask=None,
                mask_stride=0,
                shift=num_n - num_m,
                window=window,
                first_column=prompt_length,
            )
            if switches.GROUP > 1:
                dq, ddots, dropped = query_gradient_step(dq, k, v, tile, keys, pairs, num_n, factors, switches, True)
                dv = tl.dot(tl.trans(do), dropped, dv, input_precision=switches.PRECISION)
                dk = tl.dot(tl.trans(q), ddots, dk, input_precision=switches.PRECISION)
            else:
                for start in tl.range(0, num_n, BLOCK_N, disable_licm=True):
                    keys, k, v = load_row_keys(
                        inputs, strides, row, memory_row, kv_head, first_token, start, num_n, switches, BLOCK_D, BLOCK_N
                    )
                    dq, ddots, dropped = query_gradient_step(
                        dq, k, v, tile, keys, pairs, num_n, factors, switches, True
                    )
                    dv = tl.dot(tl.trans(do), dropped, input_precision=switches.PRECISION)
                    dk = tl.dot(tl.trans(q), ddots, input_precision=switches.PRECISION)
                    first, left = first_token + start, num_n - start
                    store_keys(
                        own, own_strides, memory_row, kv_head, first, left, dk, dv, factors, switches, BLOCK_D, BLOCK_N
                    )
            address = own.dq + offset_of(own_strides.dq, memory_row, head, first_token)
            dq *= factors.scale
            store_tile(address, own_strides.dq, num_m, dq, BLOCK_M, switches.HEAD_DIM, BLOCK_D)
        if switches.GROUP > 1:
            store_keys(
                own, own_strides, memory_row, kv_head, first_token, num_n, dk, dv, factors, switches, BLOCK_D, BLOCK_N
            )

    if own.prompt_dk is not None:
        # Keys beyond the prompt's length had probabilities of 0.
        base = widen(split) * slot_size + offset_of(own_strides.prompt_dk, 0, kv_head, 0)
        prompt_dk = tl.trans(prompt_dk * factors.scale)
        address = own.prompt_dk + base
        store_tile(address, own_strides.prompt_dk, prompt_length, prompt_dk, BLOCK_P, switches.HEAD_DIM, BLOCK_D)
        address = own.prompt_dv + base
        store_tile(
            address, own_strides.prompt_dk, prompt_length, tl.trans(prompt_dv), BLOCK_P, switches.HEAD_DIM, BLOCK_D
        )
