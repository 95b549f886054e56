"""Prompt attention, backward, the kernels that own queries: dQ, and delta with the converted lse.

dQ mirrors the forward: a tile of queries walks over the prompt's keys and the text's. delta is rowsum(do * o); dQ makes
it before it walks and leaves it for the kernels that own keys. Where nobody asks for dQ, a kernel of its own does.
Derivation and grids: README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ptv2_fast.kernels.arguments import Blocks, GradientTile, KeyList, Pairs
from ptv2_fast.kernels.problem import UNSPECIALIZED
from ptv2_fast.kernels.tiles import (
    LOG2E,
    block_start,
    count_blocks,
    dropout_keep,
    key_blocks,
    load_keys,
    load_tile,
    offset_of,
    product,
    program_coordinates,
    prompt_entry,
    row_extent,
    score_gradient,
    store_tile,
    tile_scores,
    widen,
)


class QueryTensors(NamedTuple):
    """What kernels that own queries read besides the inputs (o, do, lse) and write; or their strides.

    delta, lse2: what other kernels subtract in their loops, laid out as lse: lse2 in powers of two, and +inf for -inf.
    dq: None where nobody asks for it.
    """

    o: Any
    do: Any
    lse: Any
    delta: Any
    lse2: Any
    dq: Any


@triton.jit
def make_statistics(
    own,
    own_strides,
    memory_row,
    head,
    first_token,
    start,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(do, lse in powers of two, delta) of the tile of queries from `start` on; leaves the last two in memory.

    Queries that are missing have do 0, lse +inf and delta 0.
    """
    first, left = first_token + start, num_queries - start
    # [BLOCK_M, BLOCK_D]
    address = own.do + offset_of(own_strides.do, memory_row, head, first)
    do = load_tile(address, own_strides.do, left, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    address = own.o + offset_of(own_strides.o, memory_row, head, first)
    o = load_tile(address, own_strides.o, left, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    rows = tl.arange(0, BLOCK_M)
    places = offset_of(own_strides.lse, memory_row, head, first + rows)
    lse = tl.load(own.lse + places, mask=rows < left, other=float("-inf"))
    # A row that saw no key has probabilities of 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(own.lse2 + places, lse, mask=rows < left)
    tl.store(own.delta + places, delta, mask=rows < left)
    if do.dtype == tl.float32:
        # Read again, delta lies as the products want it. Moved there it makes the compiler hold operands of a loop's
        # exact products in registers: 171 a thread instead of 75 at d = 128 on Hopper, and spills at 256.
        tl.debug_barrier()
        delta = tl.load(own.delta + places, mask=rows < left, other=0.0)
    return do, lse, delta


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_delta_kernel(
    o_ptr,
    do_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    delta_ptr,
    lse2_ptr,
    o_strides,
    do_strides,
    lse_strides,
    num_queries,
    num_heads,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile, head, row = program_coordinates(num_tiles, num_heads)
    memory_row, first_token, num_queries, _ = row_extent(cu_seqlens_ptr, row, num_queries, num_queries)
    start_m = tile * BLOCK_M
    if start_m >= num_queries:
        return
    own = QueryTensors(o_ptr, do_ptr, lse_ptr, delta_ptr, lse2_ptr, None)
    strides = QueryTensors(o_strides, do_strides, lse_strides, lse_strides, lse_strides, None)
    make_statistics(own, strides, memory_row, head, first_token, start_m, num_queries, HEAD_DIM, BLOCK_D, BLOCK_M)


@triton.jit
def query_gradient_range(
    dq,
    tile,
    key_list,
    pairs,
    blocks,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
    IS_TEXT: tl.constexpr,
):
    """Add the share of one key list's blocks to dq / scale; which of them as in `attend_range`."""
    num_blocks, head_blocks = count_blocks(blocks, BLOCK_N, CHECK)
    k_place = product(blocks.head_end, key_list.k_strides[2])
    v_place = product(blocks.head_end, key_list.v_strides[2])
    for block in range(num_blocks):
        start = block_start(block, head_blocks, blocks, BLOCK_N, CHECK)
        if CHECK:
            k_place = product(start, key_list.k_strides[2])
            v_place = product(start, key_list.v_strides[2])
        # [BLOCK_N, BLOCK_D]
        first = key_list.k + k_place
        k = load_keys(first, key_list.k_strides, start, blocks.end, pairs, BLOCK_N, switches.HEAD_DIM, BLOCK_D, CHECK)
        first = key_list.v + v_place
        v = load_keys(first, key_list.v_strides, start, blocks.end, pairs, BLOCK_N, switches.HEAD_DIM, BLOCK_D, CHECK)
        dots = tl.dot(tile.q, tl.trans(k), input_precision=switches.PRECISION)  # [BLOCK_M, BLOCK_N]
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        scores, unit, slope = tile_scores(dots, tile, keys, pairs, blocks.end, factors, switches, CHECK, IS_TEXT)
        probs = tl.exp2(scores * unit - tile.lse[:, None])
        dprobs = tl.dot(tile.do, tl.trans(v), input_precision=switches.PRECISION)
        keep = None
        if switches.HAS_DROPOUT:
            keep = dropout_keep(tile.seed, tile.stream, tile.queries, pairs.first_column + keys, factors.dropout_p)
        dscores, _ = score_gradient(probs, dprobs, tile.delta[:, None], keep, factors.dropout_p, switches.HAS_DROPOUT)
        dq = tl.dot((dscores * slope).to(k.dtype), k, dq, input_precision=switches.PRECISION)
        if not CHECK:
            k_place += product(BLOCK_N, key_list.k_strides[2])
            v_place += product(BLOCK_N, key_list.v_strides[2])
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_query_kernel(
    inputs,
    own,
    strides,
    own_strides,
    num_queries,
    num_keys,
    prompt_length,
    num_heads,
    num_tiles,
    window,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    number, head, row = program_coordinates(num_tiles, num_heads)
    if switches.IS_CAUSAL:
        number = num_tiles - 1 - number
    kv_head = head // switches.GROUP
    memory_row, first_token, num_queries, num_keys = row_extent(inputs.cu_seqlens, row, num_queries, num_keys)
    start_m = number * BLOCK_M
    if start_m >= num_queries:
        return

    do, lse, delta = make_statistics(
        own, own_strides, memory_row, head, first_token, start_m, num_queries, switches.HEAD_DIM, BLOCK_D, BLOCK_M
    )
    first_row = first_token + start_m
    # [BLOCK_M, BLOCK_D]
    first = inputs.q + offset_of(strides.q, memory_row, head, first_row)
    q = load_tile(first, strides.q, num_queries - start_m, BLOCK_M, switches.HEAD_DIM, BLOCK_D, True)
    queries = start_m + tl.arange(0, BLOCK_M)[:, None]
    seed = 0
    if switches.HAS_DROPOUT:
        seed = tl.load(inputs.seed)
    tile = GradientTile(q, do, lse, delta, queries, num_queries, seed, row * num_heads + head)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    if switches.HAS_PROMPT:
        entry, length = prompt_entry(inputs.prompt_index, inputs.prompt_lens, row, prompt_length)
        key_list = KeyList(
            inputs.prompt_k + offset_of(strides.prompt_k, entry, kv_head, 0),
            inputs.prompt_v + offset_of(strides.prompt_v, entry, kv_head, 0),
            strides.prompt_k,
            strides.prompt_v,
        )
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
        blocks = Blocks(0, 0, length // BLOCK_P * BLOCK_P, length)
        for CHECK in tl.static_range(2):
            dq = query_gradient_range(
                dq, tile, key_list, pairs, blocks, factors, switches, BLOCK_D, BLOCK_P, CHECK, False
            )

    key_list = KeyList(
        inputs.k + offset_of(strides.k, memory_row, kv_head, first_token),
        inputs.v + offset_of(strides.v, memory_row, kv_head, first_token),
        strides.k,
        strides.v,
    )
    bias = None
    if inputs.bias is not None:
        bias = inputs.bias + offset_of(strides.bias, row, head, queries)  # [BLOCK_M, 1]
    mask = None
    if inputs.key_mask is not None:
        mask = inputs.key_mask + widen(row) * strides.key_mask[0]
    pairs = Pairs(
        bias=bias,
        bias_stride=strides.bias[3],
        mask=mask,
        mask_stride=strides.key_mask[1],
        shift=num_keys - num_queries,
        window=window,
        first_column=prompt_length,
    )
    blocks = key_blocks(pairs, start_m, num_queries, num_keys, switches, BLOCK_M, BLOCK_N)
    for CHECK in tl.static_range(2):
        dq = query_gradient_range(dq, tile, key_list, pairs, blocks, factors, switches, BLOCK_D, BLOCK_N, CHECK, True)

    first = own.dq + offset_of(own_strides.dq, memory_row, head, first_row)
    store_tile(first, own_strides.dq, num_queries - start_m, dq * factors.scale, BLOCK_M, switches.HEAD_DIM, BLOCK_D)
