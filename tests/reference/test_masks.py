"""Positions and additive masks, against tables written by hand."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask


def test_positions_count_real_tokens_wherever_the_padding_is():
    key_mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    expected = [[0, 1, 2, 2], [0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert positions_from_mask(key_mask).tolist() == expected


@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        pytest.param(False, ["xx.x", "xx.x", "xx.x", "xx.x"], id="bidirectional"),
        pytest.param(True, ["x...", "xx..", "xx..", "xx.x"], id="causal"),
    ],
)
def test_additive_mask_shows_every_prompt_and_no_padding(causal, expected):
    key_mask = torch.tensor([[False, True]])
    mask = additive_mask(key_mask, 2, causal=causal, dtype=torch.float64)
    assert mask.dtype == torch.float64 and mask.shape == (1, 1, 4, 4)
    shown = ["".join("x" if cell == 0 else "." for cell in row) for row in mask[0, 0].tolist()]
    assert shown == expected
    assert mask.min() == torch.finfo(torch.float64).min


@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        pytest.param(False, ["xxx.x", "xxx..", "xxx.x", "xxx.x", "x.x.x"], id="bidirectional"),
        pytest.param(True, ["x....", "xx...", "xxx..", "xxx..", "x.x.x"], id="causal"),
    ],
)
def test_a_window_counts_the_texts_own_tokens_and_hides_no_prompt(causal, expected):
    """One prompt, then tokens x x . x of which the third is padding: the last one is two tokens behind the first."""
    key_mask = torch.tensor([[True, True, False, True]])
    mask = additive_mask(key_mask, 1, causal=causal, dtype=torch.float64, window=2 if causal else 1)
    shown = ["".join("x" if cell == 0 else "." for cell in row) for row in mask[0, 0].tolist()]
    assert shown == expected


def test_a_row_that_may_see_nothing_gives_no_nan():
    mask = additive_mask(torch.zeros(1, 3, dtype=torch.bool), 0, causal=True, dtype=torch.float32)
    assert torch.isfinite((torch.randn(1, 1, 3, 3) + mask).softmax(dim=-1)).all()


def test_wrong_shapes_are_refused():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert as_key_mask(None, ids).all()
    with pytest.raises(ValueError, match=r"attention_mask must .*\(2, 3\); got \(2, 4\)"):
        as_key_mask(torch.ones(2, 4), ids)
    with pytest.raises(ValueError, match=r"input_ids must .*got shape \(3,\)"):
        as_key_mask(None, ids[0])
