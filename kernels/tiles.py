"""Building blocks shared by the prompt-attention kernels.

Conventions: an index is widened to 64 bits before it meets a stride, except inside one tile, where the host
guarantees that 32 bits are enough (`launch.tile_safe`). Index vectors handed to a helper that says "2-D" carry
their broadcast axis already, so the same helper serves (query, key) tiles and transposed (key, query) ones.
The maths these helpers implement is derived in `kernels/README.md`.
"""

import triton
import triton.language as tl

from ptv2_fast.kernels.arguments import Blocks

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below this |x| the exponential form of tanh loses digits to cancellation; the odd polynomial of degree seven is
# good to 3e-8 (relative) there.
TANH_POLYNOMIAL_LIMIT = tl.constexpr(0.2)
# Seven rounds are the fewest for which Philox-4x32 passes BigCrush (Salmon et al., 2011).
PHILOX_ROUNDS = tl.constexpr(7)
# Entries of a key mask read at once while looking for its first and last valid key.
MASK_SCAN = tl.constexpr(1024)


@triton.jit
def widen(index):
    """`index` (tensor, constant or interpreter integer) as a 64-bit scalar or block."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def product(index, stride):
    """index * stride in 64 bits, neither of them negative.

    With upper halves that are 0, not copies of a sign, it is one instruction and not four.
    """
    return (tl.full((), 0, tl.uint32) + index).to(tl.int64) * (tl.full((), 0, tl.uint32) + stride).to(tl.int64)


@triton.jit
def offset_of(strides, outer, head, row):
    """Element offset of (outer, head, row, 0) in a 4-D tensor."""
    return product(outer, strides[0]) + product(head, strides[1]) + product(row, strides[2])


@triton.jit
def program_coordinates(num_tiles, num_heads):
    """The (tile, head, row) of a flat program id; tiles vary fastest so that neighbours share keys in cache."""
    program = tl.program_id(0)
    tile = program % num_tiles
    rest = program // num_tiles
    return tile, rest % num_heads, rest // num_heads


@triton.jit
def row_extent(cu_seqlens_ptr, row, num_queries, num_keys):
    """Where row's tokens live: (batch index in memory, first token, number of queries, number of keys)."""
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + row)
        length = tl.load(cu_seqlens_ptr + row + 1) - first
        return 0, first, length, length
    else:
        return row, 0, num_queries, num_keys


@triton.jit
def prompt_entry(prompt_index_ptr, prompt_lens_ptr, row, prompt_length):
    """The bank entry that row uses and how many of its keys are real."""
    entry = 0
    if prompt_index_ptr is not None:
        entry = tl.load(prompt_index_ptr + row).to(tl.int32)
    length = prompt_length
    if prompt_lens_ptr is not None:
        # In 32 bits like every index: a wider column would be another counter for the dropout.
        length = tl.load(prompt_lens_ptr + entry).to(tl.int32)
    return entry, length


@triton.jit
def load_tile(
    ptr, strides, rows_left, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """A [BLOCK, BLOCK_D] tile starting at `ptr`; rows from `rows_left` on (if CHECK) and padded columns read as 0."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + (rows * strides[2] + cols * strides[3])  # [BLOCK, BLOCK_D]
    if CHECK:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs, mask=rows < rows_left, other=0.0)
        else:
            return tl.load(ptrs, mask=(rows < rows_left) & (cols < HEAD_DIM), other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=cols < HEAD_DIM, other=0.0)


@triton.jit
def load_keys(
    first,
    strides,
    start,
    end,
    pairs,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A [BLOCK, BLOCK_D] tile of keys or values start..; masked ones and those from `end` on (if CHECK) read as 0.

    first: pointer of the one at `start`. What stands in a masked row is not loaded: a weight of 0 would not undo a NaN.
    """
    if not CHECK or pairs.mask is None:
        return load_tile(first, strides, end - start, BLOCK, HEAD_DIM, BLOCK_D, CHECK)
    else:
        rows = tl.arange(0, BLOCK)[:, None]
        cols = tl.arange(0, BLOCK_D)[None, :]
        keys = start + rows
        attended = tl.load(pairs.mask + widen(keys) * pairs.mask_stride, mask=keys < end, other=0) != 0
        return tl.load(first + (rows * strides[2] + cols * strides[3]), mask=attended & (cols < HEAD_DIM), other=0.0)


@triton.jit
def store_tile(ptr, strides, rows_left, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a [BLOCK, BLOCK_D] tile at `ptr`, rows before `rows_left` and real columns only."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + (rows * strides[2] + cols * strides[3])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < rows_left) & (cols < HEAD_DIM))


@triton.jit
def key_bounds(key_mask_ptr, stride, num_keys):
    """First valid key, one past the last, and whether invalid keys lie between; (0, 0, False) if none is valid."""
    if key_mask_ptr is None:
        return tl.full((), 0, tl.int32), num_keys, False
    else:
        lowest = num_keys
        highest = tl.full((), 0, tl.int32)
        count = tl.full((), 0, tl.int32)
        for start in range(0, num_keys, MASK_SCAN):
            keys = start + tl.arange(0, MASK_SCAN)
            inside = keys < num_keys
            valid = tl.load(key_mask_ptr + widen(keys) * stride, mask=inside, other=0) != 0
            lowest = tl.minimum(lowest, tl.min(tl.where(valid, keys, num_keys), 0))
            highest = tl.maximum(highest, tl.max(tl.where(valid, keys + 1, 0), 0))
            count += tl.sum(valid.to(tl.int32), 0)
        lowest = tl.minimum(lowest, highest)
        return lowest, highest, count < highest - lowest


@triton.jit
def visible_keys(first, last, lowest, highest, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Keys that some query at positions first..last sees [begin, end), and that all see [full_begin, full_end)."""
    begin = lowest
    end = highest
    full_begin = lowest
    full_end = highest
    if IS_CAUSAL:
        end = tl.minimum(end, last + 1)
        full_end = tl.minimum(full_end, first + 1)
    if HAS_WINDOW:
        reach = window
        if IS_CAUSAL:
            reach = window - 1
        else:
            end = tl.minimum(end, last + window + 1)
            full_end = tl.minimum(full_end, first + window + 1)
        begin = tl.maximum(begin, first - reach)
        full_begin = tl.maximum(full_begin, last - reach)
    return begin, full_begin, full_end, end


@triton.jit
def seeing_queries(first, last, shift, num_queries, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Queries that see some key of first..last [begin, end), and that see all of them [full_begin, full_end).

    Query i stands at position i + shift.
    """
    begin = tl.full((), 0, tl.int32)
    end = num_queries
    full_begin = begin
    full_end = num_queries
    if IS_CAUSAL:
        begin = tl.maximum(begin, first - shift)
        full_begin = tl.maximum(full_begin, last - shift)
    if HAS_WINDOW:
        reach = window
        if IS_CAUSAL:
            reach = window - 1
        else:
            begin = tl.maximum(begin, first - window - shift)
            full_begin = tl.maximum(full_begin, last - window - shift)
        end = tl.minimum(end, last + reach + 1 - shift)
        full_end = tl.minimum(full_end, first + reach + 1 - shift)
    return begin, full_begin, full_end, end


@triton.jit
def split_blocks(begin, full_begin, full_end, BLOCK: tl.constexpr):
    """Cut a range from `begin` on in blocks: partial ones, full ones from head_end to body_end, partial ones again."""
    head_end = begin + tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK
    body_end = head_end + tl.maximum(full_end - head_end, 0) // BLOCK * BLOCK
    return head_end, body_end


@triton.jit
def count_blocks(blocks, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(blocks to visit, how many of them stand before the full ones): the partial ones if CHECK, else the full."""
    if CHECK:
        head_blocks = tl.cdiv(tl.maximum(tl.minimum(blocks.head_end, blocks.end) - blocks.begin, 0), BLOCK)
        return head_blocks + tl.cdiv(tl.maximum(blocks.end - blocks.body_end, 0), BLOCK), head_blocks
    else:
        return tl.cdiv(tl.maximum(blocks.body_end - blocks.head_end, 0), BLOCK), 0


@triton.jit
def block_start(block, head_blocks, blocks, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Where the block-th block of `count_blocks` starts; one loop visits the partial blocks of both ends."""
    if CHECK:
        behind = blocks.body_end + (block - head_blocks) * BLOCK
        return tl.where(block < head_blocks, blocks.begin + block * BLOCK, behind)
    else:
        return blocks.head_end + block * BLOCK


@triton.jit
def key_blocks(
    pairs, start_m, num_queries, num_keys, switches: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The `Blocks` of text keys that a tile of queries has to visit."""
    last_query = tl.minimum(start_m + BLOCK_M, num_queries) - 1
    lowest, highest, has_holes = key_bounds(pairs.mask, pairs.mask_stride, num_keys)
    begin, full_begin, full_end, end = visible_keys(
        start_m + pairs.shift,
        last_query + pairs.shift,
        lowest,
        highest,
        pairs.window,
        switches.IS_CAUSAL,
        switches.HAS_WINDOW,
    )
    head_end, body_end = split_blocks(begin, full_begin, full_end, BLOCK_N)
    if pairs.mask is not None:
        # With holes every block needs the mask: none is full.
        head_end = tl.where(has_holes, begin, head_end)
        body_end = tl.where(has_holes, begin, body_end)
    return Blocks(begin, head_end, body_end, end)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, accurate near zero."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    exponential = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < TANH_POLYNOMIAL_LIMIT, series, exponential)


@triton.jit
def tile_scores(
    dots, tile, keys, pairs, key_limit, factors, switches: tl.constexpr, CHECK: tl.constexpr, IS_TEXT: tl.constexpr
):
    """Scores of a tile from its dot products, as (scores, unit, slope): `scores * unit` is in powers of two.

    slope is d(capped score)/d(scaled dot): 1 without softcap. Invisible pairs get -inf (only looked for if CHECK).

    tile: of queries. keys: 2-D indices. pairs: the `Pairs` that they make. IS_TEXT: whether causality and the window
    hide some of them.
    """
    unit = factors.scale * LOG2E
    slope = 1.0
    scores = dots
    if switches.HAS_SOFTCAP:
        bounded = tanh(dots * (factors.scale / factors.softcap))
        scores = bounded * (factors.softcap * LOG2E)
        slope = 1.0 - bounded * bounded
        unit = 1.0
    if pairs.bias is not None:
        inside = (tile.queries < tile.num_queries) & (keys < key_limit)
        bias = tl.load(pairs.bias + widen(keys) * pairs.bias_stride, mask=inside, other=0.0).to(tl.float32)
        scores = scores * unit + bias * LOG2E
        unit = 1.0
    if CHECK:
        visible = keys < key_limit
        if pairs.mask is not None:
            attended = tl.load(pairs.mask + widen(keys) * pairs.mask_stride, mask=visible, other=0)
            visible = visible & (attended != 0)
        if IS_TEXT and switches.IS_CAUSAL:
            visible = visible & (keys <= tile.queries + pairs.shift)
        if IS_TEXT and switches.HAS_WINDOW:
            if switches.IS_CAUSAL:
                visible = visible & (tile.queries + pairs.shift - keys < pairs.window)
            else:
                visible = visible & (tl.abs(tile.queries + pairs.shift - keys) <= pairs.window)
        scores = tl.where(visible, scores, float("-inf"))
    return scores, unit, slope


@triton.jit
def online_softmax_step(acc, row_max, row_sum, scores, unit, HIDES: tl.constexpr):
    """Fold a tile of scores into the running softmax; gives (acc, row_max, row_sum, probs), acc still without probs.

    HIDES: whether scores may be -inf.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    reference = new_max
    if HIDES:
        # A row that has seen no key has the maximum -inf; subtracting it would give NaN.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = tl.exp2(scores * unit - reference[:, None])
    decay = tl.exp2(row_max - reference)
    return acc * decay[:, None], new_max, row_sum * decay + tl.sum(probs, 1), probs


@triton.jit
def finish_softmax(acc, row_max, row_sum):
    """(output, natural-log lse) of a finished running softmax; a row without keys gives zeros and -inf."""
    empty = row_sum == 0.0
    output = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    return output, lse


@triton.jit
def dropout_keep(seed, stream, queries, columns, dropout_p):
    """Keep decisions of a tile, a pure function of (seed, row and head `stream`, query, column); indices are 2-D."""
    bits, _, _, _ = tl.philox(seed, columns + queries * 0, queries + columns * 0, stream, 0, n_rounds=PHILOX_ROUNDS)
    # The upper 24 bits are what float32 holds exactly.
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= dropout_p


@triton.jit
def score_gradient(probs, dprobs, delta, keep, dropout_p, HAS_DROPOUT: tl.constexpr):
    """(d score, dropped probs): ds = probs * (keep * dprobs / (1 - p) - delta), and what multiplied the values."""
    if HAS_DROPOUT:
        inverse = 1.0 / (1.0 - dropout_p)
        dprobs = tl.where(keep, dprobs * inverse, 0.0)
        return probs * (dprobs - delta), tl.where(keep, probs * inverse, 0.0)
    else:
        return probs * (dprobs - delta), probs
