"""Features padded to batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptv2_fast.training.batches import IGNORED_LABEL, PadCollator


def feature(ids, **others):
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), **others}


def group(*rows, **others):
    return {"input_ids": [list(row) for row in rows], "attention_mask": [[1] * len(row) for row in rows], **others}


class TestPadCollator:
    def test_pads_each_kind_with_its_filler(self, tiny_tokenizer):
        rows = [
            feature([5, 6, 7], labels=[1, 0, 2], token_type_ids=[0, 1, 1]),
            feature([8], labels=[3], token_type_ids=[1]),
        ]
        batch = PadCollator(tiny_tokenizer)(rows)
        pad = tiny_tokenizer.pad_token_id
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[1, 0, 2], [3, IGNORED_LABEL, IGNORED_LABEL]]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    def test_left_padding_moves_positions(self, tiny_tokenizer):
        rows = [
            feature([5, 6, 7], start_positions=1, end_positions=2, labels=[1, 2, 3]),
            feature([8], start_positions=0, end_positions=0, labels=[4]),
        ]
        batch = PadCollator(tiny_tokenizer, label_pad=-1, padding_side="left")(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
        assert batch["labels"].tolist() == [[1, 2, 3], [-1, -1, 4]]
        assert batch["start_positions"].tolist() == [1, 2]
        assert batch["end_positions"].tolist() == [2, 2]
        right = PadCollator(tiny_tokenizer, padding_side="right")(rows)
        assert right["start_positions"].tolist() == [1, 0]

    def test_labels_of_rows(self, tiny_tokenizer):
        collate = PadCollator(tiny_tokenizer)
        assert collate([feature([1], labels=3), feature([1, 2], labels=0)])["labels"].tolist() == [
            3,
            0,
        ]
        several = collate([feature([1], labels=[1.0, 0.0]), feature([1, 2], labels=[0.0, 1.0])])
        assert several["labels"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert several["labels"].dtype == torch.float32

    def test_multiple_of(self, tiny_tokenizer):
        collate = PadCollator(tiny_tokenizer, pad_to_multiple_of=8)
        assert collate([feature(range(3))])["input_ids"].shape == (1, 8)
        assert collate([feature(range(8))])["input_ids"].shape == (1, 8)
        assert collate([feature(range(9))])["attention_mask"].sum() == 9

    def test_tokenizer_without_padding_token(self, byte_tokenizer):
        batch = PadCollator(byte_tokenizer)([feature([1, 2]), feature([3])])
        assert batch["input_ids"].tolist() == [[1, 2], [3, byte_tokenizer.eos_token_id]]
        assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]

    def test_decoding_keys_stay_behind(self, tiny_tokenizer):
        row = feature([1], word_ids=[None], num_words=0, offset_mapping=[None], example_index=4)
        assert set(PadCollator(tiny_tokenizer)([row])) == {"input_ids", "attention_mask"}

    def test_refusals(self, tiny_tokenizer):
        collate = PadCollator(tiny_tokenizer)
        with pytest.raises(ValueError, match="at least one row"):
            collate([])
        with pytest.raises(ValueError, match=r"features\[1\]: expected 'labels'"):
            collate([feature([1], labels=1), feature([1])])
        with pytest.raises(ValueError, match=r"features\[1\]: expected 'labels' as long.*\(2\)"):
            collate([feature([1], labels=[1]), feature([1, 2], labels=[1])])
        with pytest.raises(ValueError, match=r"features\[1\]: expected a single row as in features\[0\]"):
            collate([feature([1]), group([1], [2])])
        with pytest.raises(ValueError, match="padding_side.*'top'"):
            replace(collate, padding_side="top")
        with pytest.raises(ValueError, match="pad_to_multiple_of.*0"):
            replace(collate, pad_to_multiple_of=0)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (group([1], [2]), "expected 'labels' as in"),
            ({"input_ids": [[1], [2]], "labels": 0}, "expected 'attention_mask' as in"),
            (group([1], [2], [3], labels=0), "expected 2 rows as in .*; got 3 in 'input_ids'"),
            (group(labels=0), "expected 2 rows as in .*; got 0 in 'input_ids'"),
            (feature([1, 2], labels=0), "expected 2 rows as in .*; got a single row in 'input_ids'"),
            (
                {**group([1], [2], labels=0), "attention_mask": [[1]]},
                "expected 2 rows as in .*; got 1 in 'attention_mask'",
            ),
            (
                {**group([1], [2], labels=0), "attention_mask": [[1], [1, 1]]},
                r"expected 'attention_mask' as long as input_ids \(\[1, 1\]\); got \[1, 2\]",
            ),
        ],
        ids=["labels", "mask", "more", "none", "single", "fewer-masks", "longer-mask"],
    )
    def test_a_group_that_differs_is_refused_by_its_number(self, tiny_tokenizer, other, message):
        with pytest.raises(ValueError, match=rf"features\[1\]: {message}"):
            PadCollator(tiny_tokenizer)([group([1, 2], [3], labels=1), other])
