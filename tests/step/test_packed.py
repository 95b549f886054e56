"""Batches packed on the host: what the models' own functions for padded batches give, whatever the mask looks like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptv2_fast.inputs.pooling import pooled_tokens
from ptv2_fast.step.host_batch import pack, with_labels
from ptv2_fast.step.labelled_rows import labelled_tokens, predictable_labels
from ptv2_fast.step.packed import Buckets, PackedBatch, PackedTask
from ptv2_fast.step.unpad import Packing

ROWS = PackedTask("SEQ_CLS")
NUMBERS = PackedTask("SEQ_CLS", "last", "regression")
TASKS = [
    ROWS, PackedTask("SEQ_CLS", "last"), PackedTask("SEQ_CLS", padding_id=0), NUMBERS, PackedTask("TOKEN_CLS"),
    PackedTask("CAUSAL_LM"), PackedTask("QUESTION_ANS"), PackedTask("MULTIPLE_CHOICE"),
]  # fmt: skip


def _expected(batch, task):
    """The packed batch, by tensors and the functions that padded steps use."""
    flat = {name: x.flatten(0, 1) if x.dim() == 3 else x for name, x in batch.items()}
    ids, labels = flat["input_ids"], flat["labels"]
    mask = flat.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    packing, width, step = Packing.of(mask), 1, "targets"
    if task.padding_id is not None:
        last = ((ids != task.padding_id) * torch.arange(ids.shape[1])).argmax(-1)
        read, targets, step = torch.arange(ids.shape[0]) * ids.shape[1] + last, labels, "rows"
    elif task.gives == "row":
        read, targets = pooled_tokens(*ids.shape, mask, task.pooling, ids.device), labels
        width, step = ids.shape[0] // labels.shape[0], None if task.of_numbers else "rows"
    elif task.gives == "span":
        read, targets, width, step = torch.arange(ids.numel()), labels, ids.shape[1], "rows"
    elif task.gives == "token":
        read = (labels.flatten() != -100).nonzero().flatten()
        targets = labels.flatten()[read]
    else:
        read, targets = labelled_tokens(predictable_labels(labels, mask))
    types = flat.get("token_type_ids")
    return PackedBatch(
        input_ids=packing.pack(ids),
        token_type_ids=None if types is None else packing.pack(types),
        cu_seqlens=packing.cu_seqlens,
        longest=max(packing.longest, 1),
        tokens=packing.places(read),
        targets=targets.float() if task.of_numbers else targets.long(),
        width=width,
        step=step,
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

    labels = {"row": (rows,), "span": (rows, 2)}.get(task.gives, (rows, tokens))
    labels = draw(*labels) - 20
    labels = labels / 7 if task.of_numbers else labels.masked_fill(labels < 0, -100)
    shape = (rows, 3, tokens) if task.in_groups else (rows, tokens)
    batch = {"input_ids": draw(*shape, most=3 if task.padding_id is not None else 40), "labels": labels}
    if masks is not None:
        batch["attention_mask"] = (torch.rand(shape, generator=generator) < shown).to(masks)
    if types is not None:
        batch["token_type_ids"] = draw(*((1, tokens) if types == "one" and not task.in_groups else shape), most=2)
    _assert_same(pack(batch, task).packed(), _expected(batch, task))
    # A batch whose rows are columns in memory.
    turned = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in batch.items()}
    _assert_same(pack(turned, task).packed(), _expected(batch, task))


def test_no_token_stays_no_token_where_a_batch_is_filled():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([4, 5])}
    batch["attention_mask"] = torch.tensor([[0, 0, 0], [1, 1, 0]])
    filled = Buckets(tokens=8, rows=4).fill(pack(batch, ROWS))
    assert filled.tokens.tolist() == [8, 0, 8, 8] and filled.targets.tolist() == [4, 5, -100, -100]
    assert filled.input_ids.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert filled.tokens.dtype == filled.targets.dtype == torch.long and filled.cu_seqlens.dtype == torch.int32


def test_a_batch_is_not_written_to():
    labels = torch.tensor([1, 2])
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels}
    filled = Buckets().fill(pack(batch, ROWS))
    filled.targets.fill_(7)
    filled.input_ids.fill_(7)
    assert labels.tolist() == [1, 2] and bool((batch["input_ids"] == 1).all())


def test_a_mask_of_another_shape_is_refused():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \(2, 3\); got \(2, 4\)"):
        pack({**batch, "attention_mask": torch.ones(2, 4)}, ROWS)


def test_slots_of_a_span_are_none_where_a_batch_is_filled():
    ids = torch.arange(4, 10).view(2, 3)
    batch = {"input_ids": ids, "labels": torch.tensor([[0, 1], [2, 2]])}
    batch["attention_mask"] = torch.tensor([[0, 1, 1], [1, 0, 0]])
    filled = Buckets(tokens=8, rows=3).fill(pack(batch, PackedTask("QUESTION_ANS")))
    padding, none = 8, 9
    expected = torch.full((3, 16), none)
    expected[:2, :3] = torch.tensor([[padding, 0, 1], [2, padding, padding]])
    # A row of no slot would have no softmax.
    expected[2] = padding
    assert filled.width == 16 and torch.equal(filled.tokens.view(3, 16), expected)
    assert filled.targets.tolist() == [[0, 1], [2, 2], [-100, -100]]


def test_numbers_and_texts_that_are_compared_are_not_filled():
    ids = torch.ones(3, 2, 4, dtype=torch.long)
    vectors = PackedTask("SENTENCE_RETRIEVAL", "mean", whole=True)
    filled = Buckets().fill(pack(with_labels({"input_ids": ids}, vectors), vectors))
    assert (filled.tokens.shape[0], filled.targets.shape[0], filled.width) == (6, 3, 2)
    numbers = Buckets().fill(pack({"input_ids": ids[:, 0], "labels": torch.rand(3, 2)}, NUMBERS))
    assert numbers.targets.shape == (3, 2) and numbers.cu_seqlens.shape[0] > 8


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        (ROWS, torch.rand(2), r"integers of shape \(2,\); got torch.float32 \(2,\)"),
        (PackedTask("QUESTION_ANS"), torch.ones(2).long(), r"integers of shape \(2, 2\); got torch.int64 \(2,\)"),
        (PackedTask("QUESTION_ANS"), None, "a tensor; got NoneType"),
        (NUMBERS, torch.ones(2).long(), r"float32 or narrower, of shape \(2,\) or \(2, C\); got torch.int64 \(2,\)"),
        (NUMBERS, torch.rand(2).double(), r"float32 or narrower, of shape .*; got torch.float64 \(2,\)"),
    ],
)
def test_labels_of_another_kind_are_refused(task, labels, expected):
    with pytest.raises(ValueError, match=f"labels must be {expected}"):
        pack({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels}, task)
