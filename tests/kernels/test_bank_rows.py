"""Rows sorted by the prompt that they use: against PyTorch's stable sort, at every border of a tile."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.kernels.bank_rows import rows_by_entry


@pytest.mark.parametrize(("rows", "entries"), [(1, 1), (1, 70), (63, 3), (64, 64), (65, 2), (130, 200), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_rows_are_sorted_by_entry_and_stay_in_order(rows, entries, dtype, device):
    index = torch.randint(entries, (rows,), generator=torch.Generator().manual_seed(rows)).to(device, dtype)
    order, bounds = rows_by_entry(index, entries)
    by_entry, expected = torch.sort(index.long(), stable=True)
    assert torch.equal(order.long(), expected) and order.dtype == bounds.dtype == torch.int32
    assert torch.equal(bounds.long(), torch.searchsorted(by_entry, torch.arange(entries + 1, device=device)))


def test_every_row_may_use_one_entry(device):
    order, bounds = rows_by_entry(torch.full((90,), 2, device=device), 4)
    assert order.tolist() == list(range(90)) and bounds.tolist() == [0, 0, 0, 90, 90]
