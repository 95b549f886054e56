"""Positions of the text and boundaries of packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from ptv2_fast.inputs.text import check_inputs, packing_from_positions, text_positions

MASK = tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
SIZES = {"rows": 4, "tokens": 4, "past_length": 0, "first": 0, "device": torch.device("cpu")}


def _positions(mask=None, given=None, offset=0, **changes):
    return text_positions(given, mask, offset=offset, **{**SIZES, **changes})


def test_real_tokens_count_up_wherever_the_padding_stands():
    expected = tensor([[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 1, 2], [0, 0, 0, 0]])
    assert torch.equal(_positions(MASK), expected)
    assert torch.equal(_positions(MASK.bool(), first=2, offset=5), expected + 7)
    own = tensor([[1], [2], [3], [4]])
    assert torch.equal(_positions(MASK, offset=own), expected + own)


def test_cached_tokens_count():
    mask = tensor([[0, 1, 1, 1, 1, 1]])
    got = _positions(mask, rows=1, tokens=2, past_length=4)
    assert torch.equal(got, tensor([[3, 4]]))
    got = _positions(rows=1, tokens=2, past_length=4, offset=3)
    assert torch.equal(got, tensor([[7, 8]]))


def test_positions_that_are_the_models_own_are_left_to_it():
    assert _positions() is None
    assert torch.equal(_positions(offset=2), (torch.arange(4) + 2).expand(4, 4))


def test_given_positions_are_kept_and_shifted():
    given = tensor([[5, 6, 9, 9]])
    assert torch.equal(_positions(MASK, given), given)
    assert torch.equal(_positions(MASK, given, offset=3), given + 3)


def test_restarting_positions_are_packed_rows():
    positions = tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    bounds, rows, longest = packing_from_positions(positions, None)
    assert bounds.tolist() == [0, 3, 5, 6, 10] and bounds.dtype == torch.int32
    assert rows.tolist() == [0, 0, 1, 1] and longest == 4


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (None, None),
        (tensor([[0, 1, 2], [0, 1, 2]]), None),
        (tensor([[0, 1, 0]]), torch.ones(1, 3)),
        (tensor([[2, 3, 4]]), None),
    ],
    ids=["none", "plain", "masked", "shifted"],
)
def test_plain_rows_are_not_packed(positions, mask):
    assert packing_from_positions(positions, mask) is None


def test_sizes_are_read_off_ids_or_embeddings():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert check_inputs(ids, None, None, 0) == (2, 3)
    assert check_inputs(None, torch.zeros(2, 3, 8), torch.ones(2, 3), 0) == (2, 3)
    assert check_inputs(ids, None, torch.ones(2, 7), 4) == (2, 3)
    with pytest.raises(ValueError, match="2 rows, 4 cached tokens and 3 new ones"):
        check_inputs(ids, None, torch.ones(2, 3), 4)
