"""Packed rows in few padded batches: nothing is lost, nothing is moved in vain, and no row reaches another."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptv2_fast.attention import prompt_attention, row_groups
from ptv2_fast.attention.row_groups import RowGroups
from tolerances import assert_equal, assert_same_bits

CPU = torch.device("cpu")


def _groups(lengths, width=32, prompt_length=4):
    return RowGroups.of([0, *itertools.accumulate(lengths)], width, prompt_length, CPU)


@pytest.mark.parametrize(
    ("lengths", "width", "rows"),
    [
        ([5, 3, 0, 4], 32, [(0, 1, 3)]),  # a call costs more than what is padded
        ([20, 3, 19, 5], 768, [(0, 2), (1, 3)]),
        ([900, 3, 400], 768, [(0,), (1,), (2,)]),  # nothing is worth padding
        ([64, 64, 64], 768, [(0, 1, 2)]),
        ([0, 0], 32, []),
    ],
)
def test_rows_are_grouped_where_that_is_cheaper(lengths, width, rows):
    groups = _groups(lengths, width)
    assert sorted(group.rows for group in groups.groups) == rows
    packed = torch.randn(sum(lengths), 2, 3)
    if rows:
        parts = groups.spread(packed)
        assert [part.shape[2] for part in parts] == [group.longest for group in groups.groups]
        assert_same_bits(groups.collect([part.transpose(1, 2) for part in parts]), packed)
    still = rows == sorted(rows) and not any(group.padded for group in groups.groups)
    assert (groups.tokens is None) == (groups.slots is None) == (still and rows == sorted(rows, key=min))


def test_padding_holds_the_rows_own_last_token():
    (part,) = _groups([2, 1, 3]).spread(torch.arange(6.0).view(6, 1, 1))
    assert part[:, 0, :, 0].tolist() == [[0, 1, 1], [2, 2, 2], [3, 4, 5]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lens", [False, True])
def test_groups_give_what_rows_alone_give(monkeypatch, causal, lens):
    bounds = torch.tensor([0, 7, 9, 9, 20, 26], dtype=torch.int32)
    tensors = [torch.randn(26, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    tensors += [torch.randn(3, 2, 5, 8, requires_grad=True) for _ in range(2)]
    options = {"prompt_index": torch.tensor([2, 0, 1, 0, 1]), "cu_seqlens": bounds, "causal": causal}
    options |= {"prompt_lens": torch.tensor([5, 0, 2])} if lens else {}
    found = []
    for call in (row_groups._CALL, 0):
        monkeypatch.setattr(row_groups, "_CALL", call)
        out = prompt_attention(*tensors, **options, backend="torch")
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for together, alone in zip(*found, strict=True):
        assert_equal(together, alone)
