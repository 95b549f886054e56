"""The building blocks: which keys and queries are visited, tanh, dropout."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import tiles
from ptv2_fast.kernels.arguments import Pairs
from ptv2_fast.kernels.dropout import dropout_keep_mask
from ptv2_fast.reference.attention import prompt_attention as reference

BLOCK_M, BLOCK_N = 16, 8


class Rules(NamedTuple):
    """Those of a call's `Switches` that say which keys are visible."""

    IS_CAUSAL: bool
    HAS_WINDOW: bool


@triton.jit(do_not_specialize=("num_queries", "num_keys", "window"))
def _key_blocks_kernel(
    mask_ptr,
    out_ptr,
    num_queries,
    num_keys,
    window,
    switches: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    pairs = Pairs(
        bias=None,
        bias_stride=0,
        mask=mask_ptr,
        mask_stride=1,
        shift=num_keys - num_queries,
        window=window,
        first_column=0,
    )
    blocks = tiles.key_blocks(pairs, tile * BLOCK_M, num_queries, num_keys, switches, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + tile * 4, blocks.begin)
    tl.store(out_ptr + tile * 4 + 1, blocks.head_end)
    tl.store(out_ptr + tile * 4 + 2, blocks.body_end)
    tl.store(out_ptr + tile * 4 + 3, blocks.end)


@triton.jit(do_not_specialize=("num_queries", "num_keys", "window"))
def _seeing_queries_kernel(
    out_ptr, num_queries, num_keys, window, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    tile = tl.program_id(0)
    last = tl.minimum(tile * BLOCK_N + BLOCK_N, num_keys) - 1
    begin, full_begin, full_end, end = tiles.seeing_queries(
        tile * BLOCK_N, last, num_keys - num_queries, num_queries, window, IS_CAUSAL, HAS_WINDOW
    )
    tl.store(out_ptr + tile * 4, begin)
    tl.store(out_ptr + tile * 4 + 1, full_begin)
    tl.store(out_ptr + tile * 4 + 2, full_end)
    tl.store(out_ptr + tile * 4 + 3, end)


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tiles.tanh(tl.load(x_ptr + offsets)))


def visible_pairs(queries, keys, causal, window, mask):
    """(N, M) bool, read off the reference: a pair is visible if the key's value reaches the query's output."""
    one_hot = torch.eye(keys, dtype=torch.float64)[None, None]
    zero = torch.zeros(1, 1, queries, keys, dtype=torch.float64)
    none = torch.zeros(1, 1, 0, keys, dtype=torch.float64)
    return reference(
        zero, torch.zeros_like(one_hot), one_hot, none, none, causal=causal, window=window,
        key_mask=None if mask is None else mask[None])[0, 0] > 0  # fmt: skip


SHAPES = [(40, 40), (5, 33), (33, 20)]
RULES = list(itertools.product([False, True], [None, 1, 7, 20]))


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("kind", [None, "left", "right", "holes"])
def test_key_blocks_visit_what_is_visible_and_no_more(device, queries, keys, kind):
    positions = torch.arange(keys)
    mask = {None: None, "left": positions >= 9, "right": positions < 14, "holes": (positions % 5 != 0)}[kind]
    num_tiles = -(-queries // BLOCK_M)
    for causal, window in RULES:
        out = torch.empty(num_tiles, 4, dtype=torch.int32, device=device)
        switches = Rules(causal, window is not None)
        _key_blocks_kernel[(num_tiles,)](
            None if mask is None else mask.to(torch.uint8).to(device),
            out,
            queries,
            keys,
            window or 0,
            switches,
            BLOCK_M,
            BLOCK_N,
        )
        visible = visible_pairs(queries, keys, causal, window, mask)
        for tile, (begin, head_end, body_end, end) in enumerate(out.tolist()):
            rows = visible[tile * BLOCK_M : (tile + 1) * BLOCK_M]
            seen = rows.any(0).nonzero().flatten().tolist()
            if seen:
                assert begin <= seen[0] and seen[-1] < end
                # A mask's own bounds are exact; a window over holes may begin on an invalid key.
                assert kind == "holes" or (begin, end) == (seen[0], seen[-1] + 1)
            else:
                assert begin >= end or not rows.any()
            assert rows[:, head_end:body_end].all()
            full_blocks = [
                start for start in range(begin, end - BLOCK_N + 1, BLOCK_N) if rows[:, start : start + BLOCK_N].all()
            ]
            if kind != "holes":
                assert (body_end - head_end) // BLOCK_N == len(full_blocks)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_seeing_queries_are_exact(device, queries, keys):
    num_tiles = -(-keys // BLOCK_N)
    for causal, window in RULES:
        out = torch.empty(num_tiles, 4, dtype=torch.int32, device=device)
        _seeing_queries_kernel[(num_tiles,)](out, queries, keys, window or 0, BLOCK_N, causal, window is not None)
        visible = visible_pairs(queries, keys, causal, window, None)
        for tile, (begin, full_begin, full_end, end) in enumerate(out.tolist()):
            columns = visible[:, tile * BLOCK_N : (tile + 1) * BLOCK_N]
            seeing = columns.any(1).nonzero().flatten().tolist()
            assert (begin, end) == (seeing[0], seeing[-1] + 1) if seeing else begin >= end
            everything = columns.all(1).nonzero().flatten().tolist()
            inside = range(max(begin, full_begin), min(full_end, end))
            assert list(inside) == everything


def test_tanh_is_accurate_everywhere(device):
    x = torch.cat([torch.linspace(-12, 12, 2048), torch.logspace(-8, 1, 2048)]).to(device)
    out = torch.empty_like(x)
    _tanh_kernel[(4,)](x, out, BLOCK=1024)
    truth = torch.tanh(x.double())
    # A card's exp2 and division are each within 2 units in the last place; right above the polynomial's end their
    # errors weigh most.
    allowed = 4e-6 if x.is_cuda else 2e-6
    assert ((out - truth).abs() <= allowed * truth.abs()).all()


def test_dropout_keeps_the_right_share_everywhere(device):
    keep = dropout_keep_mask(2, 2, 32, 200, 0.3, torch.tensor([5], device=device)).float()
    for axis in range(4):
        others = [other for other in range(4) if other != axis]
        count = keep.numel() // keep.shape[axis]
        # Five standard deviations of a mean of `count` Bernoulli draws.
        assert ((keep.mean(others) - 0.7).abs() < 5 * (0.21 / count) ** 0.5).all()


def test_dropout_is_independent_between_neighbours(device):
    keep = dropout_keep_mask(2, 2, 64, 100, 0.5, torch.tensor([5], device=device)).float() - 0.5
    for axis in range(4):
        correlation = (keep * keep.roll(1, axis)).mean() * 4
        assert abs(correlation) < 5 / keep.numel() ** 0.5


@pytest.mark.parametrize(("dropout_p", "share"), [(0.0, 1.0), (0.999999, 0.0)])
def test_dropout_extremes(device, dropout_p, share):
    keep = dropout_keep_mask(1, 1, 16, 64, dropout_p, torch.tensor([5], device=device))
    assert keep.float().mean() == share


def test_dropout_depends_on_the_seed(device):
    seeds = (torch.tensor([seed], device=device) for seed in (1, 1 + 2**32))
    first, second = (dropout_keep_mask(1, 1, 8, 64, 0.5, seed) for seed in seeds)
    assert not torch.equal(first, second)
