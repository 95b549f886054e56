"""Prompt attention for few queries against a long prompt and a cache: split over keys, merged by log-sum-exp.

Decoding asks one query a row, so attention is a read of keys and values. The shared prompt is read once for the whole
batch: the B * group * N queries of a key/value head stand in one tile. Each row's own text is cut in chunks so that a
small batch still fills the device. Both kinds of programs run in one launch and leave (o, lse) per chunk; a second
launch merges: o = sum_c exp(lse_c - lse) o_c with lse = log sum_c exp(lse_c). Grid: README.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.arguments import Blocks, Inputs, KeyList, Pairs, QueryTile, Results
from ptv2_fast.kernels.problem import UNSPECIALIZED, Form, Problem
from ptv2_fast.kernels.prompt_forward import attend_range
from ptv2_fast.kernels.tiles import finish_softmax, offset_of, prompt_entry, visible_keys, widen

# Larger tiles of queries than this need more registers than a configuration's bound leaves them.
_BOUNDED_QUERIES = 32


@triton.jit
def attend_chunk(
    inputs,
    own,
    strides,
    key_list,
    mask,
    bias_entry,
    first_row,
    row_limit,
    kv_head,
    chunk,
    begin,
    end,
    shift,
    num_queries,
    num_heads,
    num_rows,
    window,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_TEXT: tl.constexpr,
):
    """Attend from query rows first_row.. (row-major over batch, head of the group, query) to keys begin..end-1."""
    # Rows past the limit repeat the last one, so that every pointer made from them is a valid one.
    rows = first_row + tl.arange(0, BLOCK_R)
    inside = rows < row_limit
    rows = tl.minimum(rows, row_limit - 1)[:, None]  # [BLOCK_R, 1]
    batch = rows // (switches.GROUP * num_queries)
    head = kv_head * switches.GROUP + rows // num_queries % switches.GROUP
    queries = rows % num_queries
    cols = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = inputs.q + offset_of(strides.q, batch, head, queries) + cols * strides.q[3]
    q = tl.load(q_ptrs, mask=cols < switches.HEAD_DIM, other=0.0)  # [BLOCK_R, BLOCK_D]
    bias = None
    if IS_TEXT:
        bias_stride = strides.bias[3]
        if inputs.bias is not None:
            bias = inputs.bias + offset_of(strides.bias, batch, head, queries)
    else:
        bias_stride = strides.prompt_bias[2]
        if inputs.prompt_bias is not None:
            bias = (
                inputs.prompt_bias + widen(bias_entry) * strides.prompt_bias[0] + widen(head) * strides.prompt_bias[1]
            )
    pairs = Pairs(
        bias=bias,
        bias_stride=bias_stride,
        mask=mask,
        mask_stride=strides.key_mask[1],
        shift=shift,
        window=window,
        first_column=0,
    )
    tile = QueryTile(q, queries, num_queries, 0, 0)
    blocks = Blocks(begin, begin, begin, end)
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    acc, row_max, row_sum = attend_range(
        acc, row_max, row_sum, tile, key_list, pairs, blocks, factors, switches, BLOCK_D, BLOCK_N, True, IS_TEXT
    )
    output, lse = finish_softmax(acc, row_max, row_sum)
    flat = widen(chunk) * num_rows + (batch * num_heads + head) * num_queries + queries  # [BLOCK_R, 1]
    places = own.o + flat * switches.HEAD_DIM + cols
    tl.store(places, output, mask=inside[:, None] & (cols < switches.HEAD_DIM))
    tl.store(own.lse + flat, lse[:, None], mask=inside[:, None])


@triton.jit(
    do_not_specialize=(
        *UNSPECIALIZED,
        "batch",
        "prompt_chunks",
        "prompt_tiles",
        "prompt_chunk",
        "text_chunks",
        "text_chunk",
    )
)
def _prompt_attention_decode_kernel(
    inputs,
    own,
    strides,
    num_queries,
    num_keys,
    prompt_length,
    num_heads,
    batch,
    prompt_chunks,
    prompt_tiles,
    prompt_chunk,
    text_chunks,
    text_chunk,
    window,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Programs 0.. own (query tile, chunk, kv head) of the prompt, the others (query tile, chunk, kv head, row) of text.
    # A shared prompt's tiles run over the queries of the whole batch; with a bank every row reads its own entry.
    num_kv_heads = num_heads // switches.GROUP
    rows_of_one = switches.GROUP * num_queries
    num_rows = batch * num_heads * num_queries
    program = tl.program_id(0)
    prompt_programs = prompt_tiles * prompt_chunks * num_kv_heads
    if program < prompt_programs:
        tile = program % prompt_tiles
        chunk = program // prompt_tiles % prompt_chunks
        kv_head = program // prompt_tiles // prompt_chunks
        first_row = tile * BLOCK_SHARED
        row_limit = batch * rows_of_one
        entry_row = 0
        if inputs.prompt_index is not None:
            tiles_of_one = tl.cdiv(rows_of_one, BLOCK_SHARED)
            entry_row = tile // tiles_of_one
            first_row = entry_row * rows_of_one + tile % tiles_of_one * BLOCK_SHARED
            row_limit = (entry_row + 1) * rows_of_one
        entry, length = prompt_entry(inputs.prompt_index, inputs.prompt_lens, entry_row, prompt_length)
        key_list = KeyList(
            inputs.prompt_k + offset_of(strides.prompt_k, entry, kv_head, 0),
            inputs.prompt_v + offset_of(strides.prompt_v, entry, kv_head, 0),
            strides.prompt_k,
            strides.prompt_v,
        )
        begin = chunk * prompt_chunk
        attend_chunk(
            inputs,
            own,
            strides,
            key_list,
            None,
            entry,
            first_row,
            row_limit,
            kv_head,
            chunk,
            begin,
            tl.minimum(begin + prompt_chunk, length),
            0,
            num_queries,
            num_heads,
            num_rows,
            0,
            factors,
            switches,
            BLOCK_D,
            BLOCK_SHARED,
            BLOCK_P,
            False,
        )
    else:
        program -= prompt_programs
        tiles_of_one = tl.cdiv(rows_of_one, BLOCK_OWN)
        tile = program % tiles_of_one
        chunk = program // tiles_of_one % text_chunks
        rest = program // tiles_of_one // text_chunks
        kv_head = rest % num_kv_heads
        row = rest // num_kv_heads
        key_list = KeyList(
            inputs.k + offset_of(strides.k, row, kv_head, 0),
            inputs.v + offset_of(strides.v, row, kv_head, 0),
            strides.k,
            strides.v,
        )
        mask = None
        if inputs.key_mask is not None:
            mask = inputs.key_mask + widen(row) * strides.key_mask[0]
        shift = num_keys - num_queries
        begin, _, _, end = visible_keys(
            shift,
            num_keys - 1,
            chunk * text_chunk,
            tl.minimum((chunk + 1) * text_chunk, num_keys),
            window,
            switches.IS_CAUSAL,
            switches.HAS_WINDOW,
        )
        attend_chunk(
            inputs,
            own,
            strides,
            key_list,
            mask,
            0,
            row * rows_of_one + tile * BLOCK_OWN,
            (row + 1) * rows_of_one,
            kv_head,
            prompt_chunks + chunk,
            begin,
            end,
            shift,
            num_queries,
            num_heads,
            num_rows,
            window,
            factors,
            switches,
            BLOCK_D,
            BLOCK_OWN,
            BLOCK_N,
            True,
        )


@triton.jit(do_not_specialize=("num_rows", "num_chunks", "num_heads", "num_queries"))
def _merge_chunks_kernel(
    partial_o_ptr,
    partial_lse_ptr,
    o_ptr,
    lse_ptr,
    o_strides,
    num_rows,
    num_chunks,
    num_heads,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    chunks = tl.arange(0, BLOCK_C)
    lses = tl.load(partial_lse_ptr + widen(chunks) * num_rows + row, mask=chunks < num_chunks, other=float("-inf"))
    highest = tl.max(lses, 0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(lses - reference), 0)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for chunk in range(num_chunks):
        flat = widen(chunk) * num_rows + row
        weight = tl.exp(tl.load(partial_lse_ptr + flat) - reference)
        acc += weight * tl.load(partial_o_ptr + flat * HEAD_DIM + cols, mask=cols < HEAD_DIM, other=0.0)
    safe_total = tl.where(total == 0.0, 1.0, total)
    output = acc / safe_total
    query = row % num_queries
    head = row // num_queries % num_heads
    batch = row // num_queries // num_heads
    tl.store(
        o_ptr + offset_of(o_strides, batch, head, query) + cols * o_strides[3],
        output.to(o_ptr.dtype.element_ty),
        mask=cols < HEAD_DIM,
    )
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), reference + tl.log(safe_total)))


def prompt_attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    *,
    config: launch.LaunchConfig | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompt_attention_forward` for few queries a row: the prompt is read once for the batch; gives (o, lse).

    Args:
        q, k, v, prompt_k, prompt_v: as in `prompt_attention_forward`, dense form.
        config: block_m bounds the queries in a tile, block_n the keys.
        arguments: as there, without cu_seqlens and dropout.
    Returns:
        o and lse as there; the two functions agree to rounding, so one may serve the other's backward.
    Raises:
        ValueError: as there; or the call is packed or drops attention weights.
    """
    problem = Problem.of(q, k, v, prompt_k, prompt_v, **arguments)
    if problem.packed:
        raise ValueError("cu_seqlens must be None for decoding; got a packed call")
    if problem.dropout_p > 0.0:
        raise ValueError(f"dropout_p must be 0 for decoding; got {problem.dropout_p!r}")
    batch, heads, queries, head_dim = problem.q.shape
    output = launch.allocate_heads(problem.q)
    lse = launch.allocate((batch, heads, queries), torch.float32, q.device)
    if lse.numel() == 0:
        return output, lse
    plan = _decode_plan(
        problem.form,
        config or problem.config("decode"),
        problem.prompt_index is None,
        launch.target_programs(q.device),
        output.stride(),
    )
    num_rows = batch * heads * queries
    partial_o = launch.allocate((plan.num_chunks, num_rows, head_dim), torch.float32, q.device)
    partial_lse = launch.allocate((plan.num_chunks, num_rows), torch.float32, q.device)
    launch.run(
        _prompt_attention_decode_kernel,
        plan.grid,
        q.device,
        (problem.tensors("decode"), (partial_o, partial_lse)),
        plan.constants,
    )
    launch.run(_merge_chunks_kernel, (num_rows,), q.device, (partial_o, partial_lse, output, lse), plan.merge_constants)
    return output, lse


class _DecodePlan(NamedTuple):
    """How decoding is split among programs, worked out once for the layers of a step."""

    grid: tuple[int, ...]
    constants: launcher.Constants
    num_chunks: int
    merge_constants: launcher.Constants


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _decode_plan(
    form: Form, config: launch.LaunchConfig, shared: bool, target: int, o_strides: tuple[int, ...]
) -> _DecodePlan:
    """For `target` programs; `shared`: all rows have one prompt."""
    batch, rows_of_one = form.num_rows, form.num_heads // form.num_kv_heads * form.num_queries
    block_own = min(config.block_m, max(16, triton.next_power_of_2(rows_of_one)))
    rows_together = rows_of_one * batch if shared else rows_of_one
    block_shared = min(config.block_m, max(16, triton.next_power_of_2(rows_together)))
    if block_shared > _BOUNDED_QUERIES:
        config = dataclasses.replace(config, maxnreg=None)
    block_p = form.prompt_block(config.block_n)
    prompt_tiles = triton.cdiv(rows_together, block_shared) * (1 if shared else batch)
    text_programs = triton.cdiv(rows_of_one, block_own) * form.num_kv_heads * batch
    prompt_chunks, prompt_chunk = _chunks(form.prompt_length, block_p, prompt_tiles * form.num_kv_heads, target)
    text_chunks, text_chunk = _chunks(form.num_keys, config.block_n, text_programs, target)
    num_chunks = prompt_chunks + text_chunks
    constants = launcher.Constants(
        {
            **form.constants("decode"),
            "batch": batch,
            "prompt_chunks": prompt_chunks,
            "prompt_tiles": prompt_tiles,
            "prompt_chunk": prompt_chunk,
            "text_chunks": text_chunks,
            "text_chunk": text_chunk,
            "BLOCK_SHARED": block_shared,
            "BLOCK_OWN": block_own,
            "BLOCK_N": config.block_n,
            "BLOCK_P": block_p,
            **config.options,
        },
        groups=(Inputs, Results),
    )
    merge_constants = launcher.Constants(
        {
            "o_strides": o_strides,
            "num_rows": batch * form.num_heads * form.num_queries,
            "num_chunks": num_chunks,
            "num_heads": form.num_heads,
            "num_queries": form.num_queries,
            "HEAD_DIM": form.head_dim,
            "BLOCK_D": launch.padded_head_dim(form.head_dim),
            # The number of chunks grows with the cache: not one version of the kernel for each power of two.
            "BLOCK_C": max(64, triton.next_power_of_2(num_chunks)),
            "num_warps": 1,
        }
    )
    num_programs = prompt_tiles * prompt_chunks * form.num_kv_heads + text_programs * text_chunks
    return _DecodePlan((num_programs,), constants, num_chunks, merge_constants)


def _chunks(length: int, block: int, programs: int, target: int) -> tuple[int, int]:
    """(number of chunks, keys in a chunk) for a list of `length` keys that `programs` programs read anyway."""
    blocks = triton.cdiv(length, block)
    if blocks == 0:
        return 0, block
    blocks_in_chunk = triton.cdiv(blocks, launch.split(target, programs, blocks))
    return triton.cdiv(blocks, blocks_in_chunk), blocks_in_chunk * block
