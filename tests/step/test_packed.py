"""Batches packed on the host: what the models' own functions for padded batches give, whatever the mask looks like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptv2_fast.inputs.pooling import pooled_tokens
from ptv2_fast.step.labelled_rows import labelled_tokens, predictable_labels
from ptv2_fast.step.packed import Buckets, PackedBatch, pack
from ptv2_fast.step.unpad import Packing

TASKS = [("SEQ_CLS", "first"), ("SEQ_CLS", "last"), ("TOKEN_CLS", "first"), ("CAUSAL_LM", "last")]


def _expected(batch, task, pooling):
    """The packed batch, by tensors and the functions that padded steps use."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    packing = Packing.of(mask)
    if task == "SEQ_CLS":
        read, targets = pooled_tokens(*ids.shape, mask, pooling, ids.device), labels
    elif task == "TOKEN_CLS":
        read = (labels.flatten() != -100).nonzero().flatten()
        targets = labels.flatten()[read]
    else:
        read, targets = labelled_tokens(predictable_labels(labels, mask))
    types = batch.get("token_type_ids")
    return PackedBatch(
        input_ids=packing.pack(ids),
        token_type_ids=None if types is None else packing.pack(types),
        cu_seqlens=packing.cu_seqlens,
        longest=max(packing.longest, 1),
        tokens=packing.places(read),
        targets=targets.long(),
    )


def _assert_same(ours, expected):
    assert ours.sizes == expected.sizes
    for name, tensor in expected.tensors().items():
        found = ours.tensors()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


@settings(max_examples=150, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 999),
    shown=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    masks=st.sampled_from([None, torch.long, torch.bool, torch.bfloat16]),
    numbers=st.sampled_from([torch.long, torch.int32]),
    types=st.sampled_from([None, "one", "each"]),
)
def test_it_is_what_padded_steps_read(task, rows, tokens, seed, shown, masks, numbers, types):
    """Padding anywhere, rows of nothing, labels at padding, integers of any width, token types of one row for all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, most=40):
        return torch.randint(0, most, shape, generator=generator).to(numbers)

    labels = draw(rows) if task[0] == "SEQ_CLS" else draw(rows, tokens) - 20
    labels = labels if task[0] == "SEQ_CLS" else labels.masked_fill(labels < 0, -100)
    batch = {"input_ids": draw(rows, tokens), "labels": labels}
    if masks is not None:
        batch["attention_mask"] = (torch.rand(rows, tokens, generator=generator) < shown).to(masks)
    if types is not None:
        batch["token_type_ids"] = draw(1 if types == "one" else rows, tokens, most=2)
    _assert_same(pack(batch, *task).packed(), _expected(batch, *task))
    # A batch whose rows are columns in memory.
    turned = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in batch.items()}
    _assert_same(pack(turned, *task).packed(), _expected(batch, *task))


def test_no_token_stays_no_token_where_a_batch_is_filled():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([4, 5])}
    batch["attention_mask"] = torch.tensor([[0, 0, 0], [1, 1, 0]])
    filled = Buckets(tokens=8, rows=2, targets=4).fill(pack(batch, "SEQ_CLS"))
    assert filled.tokens.tolist() == [8, 0, 8, 8] and filled.targets.tolist() == [4, 5, -100, -100]
    assert filled.input_ids.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert filled.tokens.dtype == filled.targets.dtype == torch.long and filled.cu_seqlens.dtype == torch.int32


def test_a_batch_is_not_written_to():
    labels = torch.tensor([1, 2])
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels}
    filled = Buckets().fill(pack(batch, "SEQ_CLS"))
    filled.targets.fill_(7)
    filled.input_ids.fill_(7)
    assert labels.tolist() == [1, 2] and bool((batch["input_ids"] == 1).all())


def test_a_mask_of_another_shape_is_refused():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \(2, 3\); got \(2, 4\)"):
        pack({**batch, "attention_mask": torch.ones(2, 4)}, "SEQ_CLS")
