"""Packed rows whose boundaries the caller states."""

from __future__ import annotations

import pytest
import torch

from batches import packed, text_rows
from ptv2_fast.inputs.text import packed_positions
from tiny_models import FAMILIES, tiny_model
from tolerances import assert_equal

LENGTHS = (5, 2, 7)
BOUNDS = torch.tensor([0, 5, 7, 14], dtype=torch.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_stated_boundaries_are_those_of_restarting_positions(family):
    model = tiny_model(family, "deep")
    rows = packed(text_rows(*LENGTHS))
    alone = [model(input_ids=row[None]).last_hidden_state[0] for row in text_rows(*LENGTHS)]
    stated = model(input_ids=rows["input_ids"], cu_seq_lens_q=BOUNDS, max_length_q=7).last_hidden_state[0]
    assert_equal(stated, torch.cat(alone), family)
    without_longest = model(input_ids=rows["input_ids"], cu_seq_lens_q=BOUNDS).last_hidden_state[0]
    assert_equal(without_longest, stated, family)


def test_packed_texts_may_be_longer_together_than_the_learned_positions():
    model = tiny_model("bert", "deep")
    ids = torch.randint(3, 30, (1, 90))
    bounds = torch.tensor([0, 40, 90], dtype=torch.int32)
    both = model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=50).last_hidden_state[0]
    alone = [model(input_ids=ids[:, a:b]).last_hidden_state[0] for a, b in ((0, 40), (40, 90))]
    assert_equal(both, torch.cat(alone), "states")


def test_positions_restart_at_every_boundary():
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert packed_positions(bounds, 5, 2).tolist() == [[2, 3, 4, 2, 3]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"cu_seq_lens_q": BOUNDS.long()}, "cu_seq_lens_q must be int32"),
        ({"cu_seq_lens_q": BOUNDS[None]}, "cu_seq_lens_q must be int32"),
        ({"cu_seq_lens_q": BOUNDS, "input_ids": torch.ones(2, 14, dtype=torch.long)}, "beside one row"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 14)}, "attention_mask must be None"),
    ],
)
def test_boundaries_that_describe_no_packed_row_are_refused(inputs, message):
    model = tiny_model("bert", "deep")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.ones(1, 14, dtype=torch.long), **inputs})


def test_a_shallow_prompt_on_an_encoder_refuses_packed_rows():
    model = tiny_model("bert", "shallow")
    with pytest.raises(ValueError, match="cu_seq_lens_q must not pack rows"):
        model(input_ids=torch.ones(1, 14, dtype=torch.long), cu_seq_lens_q=BOUNDS)
