"""Encodings checked against hand-made sub-words, and the way back to tags, answers and text."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ptv2_fast.task_types import TASKS, TRAINED_TASKS
from ptv2_fast.training.batches import IGNORED_LABEL, PadCollator
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.task_data import TaskCodec
from ptv2_fast.training.tokens import (
    decode_answers,
    decode_tags,
    encode_classification,
    encode_language_model,
    encode_question_answering,
    encode_tokens,
)

TAGS = LabelSet(("O", "B-PER", "I-PER"))


class TestClassification:
    def test_single_and_pair(self, tiny_tokenizer):
        labels = LabelSet(("bad", "good"))
        examples = [
            {"text": "good film", "label": "good"},
            {"text": "good film", "text_pair": "bad", "label": "bad"},
        ]
        single, pair = encode_classification(examples, tiny_tokenizer, labels)
        tokens = tiny_tokenizer.convert_ids_to_tokens
        assert tokens(single["input_ids"]) == ["[CLS]", "good", "film", "[SEP]"]
        assert tokens(pair["input_ids"]) == ["[CLS]", "good", "film", "[SEP]", "bad", "[SEP]"]
        assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert (single["labels"], pair["labels"]) == (1, 0)

    def test_cut_and_unlabelled(self, tiny_tokenizer):
        (feature,) = encode_classification([{"text": "good " * 9}], tiny_tokenizer, max_length=6)
        assert len(feature["input_ids"]) == len(feature["attention_mask"]) == 6
        assert "labels" not in feature

    def test_refusals(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="labels: .*LabelSet"):
            encode_classification([{"text": "good", "label": "x"}], tiny_tokenizer)
        with pytest.raises(ValueError, match="'x'"):
            encode_classification([{"text": "good", "label": "x"}], tiny_tokenizer, TAGS)
        with pytest.raises(ValueError, match="fast tokenizer.*got object"):
            encode_classification([{"text": "good"}], object())

    @pytest.mark.parametrize(("example", "least"), [({"text": "good"}, 3), ({"text": "good", "text_pair": "bad"}, 5)])
    def test_a_length_that_leaves_no_text_is_refused(self, tiny_tokenizer, example, least):
        (feature,) = encode_classification([example], tiny_tokenizer, max_length=least)
        assert len(feature["input_ids"]) == least
        with pytest.raises(ValueError, match=f"max_length must be at least {least} for .*texts.*; got {least - 1}"):
            encode_classification([example], tiny_tokenizer, max_length=least - 1)
        with pytest.raises(ValueError, match="max_length must be at least 3 for texts"):
            encode_tokens([{"tokens": ["good"]}], tiny_tokenizer, max_length=2)


class TestTokens:
    example = {
        "tokens": ["Anna", "unbelievable", "played", "."],
        "tags": ["B-PER", "I-PER", "O", "O"],
    }

    def test_first_subword_has_the_tag(self, tiny_tokenizer):
        (feature,) = encode_tokens([self.example], tiny_tokenizer, TAGS)
        pieces = tiny_tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert pieces == [
            "[CLS]",
            "anna",
            "un",
            "##believ",
            "##able",
            "play",
            "##ed",
            ".",
            "[SEP]",
        ]
        ignored = IGNORED_LABEL
        assert feature["labels"] == [ignored, 1, 2, ignored, ignored, 0, ignored, 0, ignored]
        assert feature["word_ids"] == [None, 0, 1, 1, 1, 2, 2, 3, None]

    def test_decode_is_the_inverse(self, tiny_tokenizer):
        (feature,) = encode_tokens([self.example], tiny_tokenizer, TAGS)
        # The tags of later sub-words must not matter: 2 is a wrong tag for them.
        row = [2 if label == IGNORED_LABEL else label for label in feature["labels"]]
        assert decode_tags(row, feature, TAGS) == self.example["tags"]
        assert decode_tags([*row, 2, 2], feature, TAGS) == self.example["tags"]
        left = decode_tags([2, 2, *row], feature, TAGS, padding_side="left")
        assert left == self.example["tags"]
        with pytest.raises(ValueError, match="at least 9 positions; got 8"):
            decode_tags(row[:-1], feature, TAGS)

    def test_words_that_are_cut_count_as_o(self, tiny_tokenizer, caplog):
        example = {"tokens": ["Anna"] * 6, "tags": ["B-PER"] * 6}
        with caplog.at_level(logging.WARNING):
            features = encode_tokens([example, self.example], tiny_tokenizer, TAGS, max_length=5)
        assert [len(feature["input_ids"]) for feature in features] == [5, 5]
        assert "2 of 2 sentences were cut at 5" in caplog.text
        assert decode_tags([1] * 5, features[0], TAGS) == ["B-PER"] * 3 + ["O"] * 3

    def test_word_without_subwords(self, minilm_tokenizer):
        # An emoji's variation selector is a token in WNUT-17 that BERT's normaliser deletes.
        example = {"tokens": ["I", "\ufe0f", "Anna"], "tags": ["O", "B-PER", "B-PER"]}
        (feature,) = encode_tokens([example], minilm_tokenizer, TAGS)
        assert feature["word_ids"] == [None, 0, 2, None]
        assert feature["labels"] == [IGNORED_LABEL, 0, 1, IGNORED_LABEL]
        assert decode_tags([2, 0, 1, 2], feature, TAGS) == ["O", "O", "B-PER"]

    def test_byte_level_words_keep_their_space(self, byte_tokenizer):
        words = ["the", "cat", "the"]
        (feature,) = encode_tokens([{"tokens": words}], byte_tokenizer)
        assert feature["input_ids"] == byte_tokenizer("the cat the")["input_ids"]
        assert feature["word_ids"] == [0, 1, 2]
        assert "labels" not in feature


class TestQuestions:
    context = "Anna wrote a film in Paris . Bob lives in the tower ."

    def example(self, **change):
        answers = {"text": ["Paris"], "answer_start": [21]}
        base = {"id": "1", "question": "who wrote ?", "context": self.context, "answers": answers}
        return {**base, **change}

    def test_span_points_at_the_answer(self, tiny_tokenizer):
        (feature,) = encode_question_answering([self.example()], tiny_tokenizer)
        begin, end = feature["start_positions"], feature["end_positions"]
        offsets = feature["offset_mapping"]
        assert self.context[offsets[begin][0] : offsets[end][1]] == "Paris"
        # [CLS] and the question have no place in the context.
        assert offsets[:5] == [None] * 5 and offsets[-1] is None

    def test_answer_within_a_word_covers_the_word(self, tiny_tokenizer):
        answers = {"text": ["aris . Bo"], "answer_start": [22]}
        (feature,) = encode_question_answering([self.example(answers=answers)], tiny_tokenizer)
        offsets = feature["offset_mapping"]
        begin, end = feature["start_positions"], feature["end_positions"]
        assert self.context[offsets[begin][0] : offsets[end][1]] == "Paris . Bob"

    def test_no_answer_points_at_cls(self, tiny_tokenizer):
        nothing = {"text": [], "answer_start": []}
        (feature,) = encode_question_answering([self.example(answers=nothing)], tiny_tokenizer)
        assert (feature["start_positions"], feature["end_positions"]) == (0, 0)

    def test_windows_overlap_and_only_whole_answers_count(self, tiny_tokenizer):
        answers = {"text": ["in Paris . Bob"], "answer_start": [18]}
        features = encode_question_answering(
            [self.example(), self.example(answers=answers)],
            tiny_tokenizer,
            max_length=12,
            doc_stride=3,
        )
        # 12 - 3 special - 3 of the question leave 6 of the context's 13 tokens; each step moves 3.
        assert [f["example_index"] for f in features] == [0] * 4 + [1] * 4
        windows = []
        for feature in features:
            assert len(feature["input_ids"]) <= 12
            windows.append([offset for offset in feature["offset_mapping"] if offset is not None])
        for before, after in zip(windows[:3], windows[1:4], strict=True):
            assert before[-3:] == after[:3]
        words = {self.context[begin:end] for window in windows[:4] for begin, end in window}
        assert words == set(self.context.split())
        texts = ["Paris"] * 4 + ["in Paris . Bob"] * 4
        for feature, window, text in zip(features, windows, texts, strict=True):
            start = self.context.index(text)
            whole = window[0][0] <= start and start + len(text) <= window[-1][1]
            assert (feature["start_positions"] > 0) == whole
        held = [f["start_positions"] > 0 for f in features]
        assert held == [True, True, False, False, False, True, False, False]

    def test_question_without_room(self, tiny_tokenizer):
        with pytest.raises(ValueError, match=r"examples\[0\]: the question has 3 tokens"):
            encode_question_answering([self.example()], tiny_tokenizer, max_length=9, doc_stride=3)

    def logits(self, features, spans, cls=-5.0):
        """One row a feature: 0 everywhere, `cls` at position 0, a bump at each span's ends."""
        start = [np.zeros(len(feature["input_ids"])) for feature in features]
        end = [np.zeros(len(feature["input_ids"])) for feature in features]
        for row in (*start, *end):
            row[0] = cls
        for window, begin, stop, height in spans:
            start[window][begin] += height
            end[window][stop] += height
        return start, end

    def test_best_span_over_windows(self, tiny_tokenizer):
        examples = [self.example(), self.example(id="2")]
        features = encode_question_answering(examples, tiny_tokenizer, max_length=12, doc_stride=3)
        spans = [(0, 5, 5, 1.0), (2, 6, 7, 3.0), (4, 6, 6, 2.0)]
        start, end = self.logits(features, spans)
        # Rows padded on the right, with values that would win if padding were read.
        start = [np.append(row, [99.0, 99.0]) for row in start]
        first, second = decode_answers(start, end, features, examples, tiny_tokenizer)
        offsets = features[2]["offset_mapping"]
        assert first["text"] == self.context[offsets[6][0] : offsets[7][1]]
        assert (first["score"], first["null_score"]) == (6.0, -10.0)
        assert second["id"] == "2" and second["score"] == 4.0
        assert first["n_best"][0] == (6.0, first["text"])

    def test_spans_outside_the_context_backwards_or_too_long_are_left_out(self, tiny_tokenizer):
        examples = [self.example()]
        features = encode_question_answering(examples, tiny_tokenizer)
        # In the question; backwards; eight tokens long.
        spans = [(0, 1, 2, 9.0), (0, 12, 8, 5.0)]
        start, end = self.logits(features, spans)
        (best,) = decode_answers(start, end, features, examples, tiny_tokenizer, n_best=40, max_answer_length=4)
        assert best["score"] == 5.0
        assert all(score <= 5.0 for score, _ in best["n_best"])
        start, end = self.logits(features, [(0, 5, 12, 5.0)])
        (best,) = decode_answers(start, end, features, examples, tiny_tokenizer, max_answer_length=8)
        assert best["score"] == 10.0
        (best,) = decode_answers(start, end, features, examples, tiny_tokenizer, max_answer_length=7)
        assert best["score"] == 5.0

    def test_a_span_is_found_where_all_good_ends_stand_before_the_good_starts(self, tiny_tokenizer):
        examples = [self.example()]
        features = encode_question_answering(examples, tiny_tokenizer)
        start, end = self.logits(features, [(0, 12, 6, 5.0), (0, 11, 7, 4.0)])
        (best,) = decode_answers(start, end, features, examples, tiny_tokenizer, n_best=2, max_answer_length=3)
        # A good start with an end of 0, within three tokens; nothing is minus infinity.
        assert best["score"] == 5.0 and best["text"] in self.context and best["text"]

    @pytest.mark.parametrize("context", ["", " ", "\u200b"])
    def test_a_context_without_tokens_is_refused(self, tiny_tokenizer, context):
        with pytest.raises(ValueError, match=r"examples\[1\]: the context has no tokens"):
            examples = [self.example(), {"id": "2", "question": "who", "context": context}]
            encode_question_answering(examples, tiny_tokenizer)

    def test_no_answer_wins_by_the_threshold(self, tiny_tokenizer):
        examples = [self.example()]
        features = encode_question_answering(examples, tiny_tokenizer)
        start, end = self.logits(features, [(0, 5, 5, 1.0)], cls=2.0)

        def text(**options):
            rows = (start, end, features, examples, tiny_tokenizer)
            return decode_answers(*rows, **options)[0]["text"]

        assert text() == "Anna"
        assert text(no_answer=True) == ""
        assert text(no_answer=True, null_threshold=2.0) == "Anna"

    def test_refuses_too_few_rows(self, tiny_tokenizer):
        features = encode_question_answering([self.example()], tiny_tokenizer)
        with pytest.raises(ValueError, match="expected 1 rows.*got 0 and 0"):
            decode_answers([], [], features, [self.example()], tiny_tokenizer)


class TestLanguage:
    def test_text_ends_with_the_end_token(self, byte_tokenizer):
        (feature,) = encode_language_model([{"text": "the cat"}], byte_tokenizer)
        expected = byte_tokenizer("the cat")["input_ids"] + [byte_tokenizer.eos_token_id]
        assert feature["input_ids"] == feature["labels"] == expected
        assert feature["attention_mask"] == [1] * len(expected)

    @pytest.mark.parametrize("length", [2, 3, 4, 7, 12, 13])
    def test_windows_predict_each_token_once(self, byte_tokenizer, length):
        text = "a cat b the c"
        features = encode_language_model([{"text": text}], byte_tokenizer, max_length=length)
        whole = byte_tokenizer(text)["input_ids"] + [byte_tokenizer.eos_token_id]
        # A model predicts labels[1:]; the first token of the text is never predicted.
        predicted = [label for feature in features for label in feature["labels"][1:]]
        assert predicted == whole[1:]
        assert all(2 <= len(feature["input_ids"]) <= length for feature in features)
        assert all(feature["labels"][0] == IGNORED_LABEL for feature in features[1:])

    def test_only_the_completion_is_predicted(self, byte_tokenizer):
        example = {"prompt": "the", "completion": " cat"}
        (feature,) = encode_language_model([example], byte_tokenizer)
        end = byte_tokenizer.eos_token_id
        assert feature["input_ids"] == byte_tokenizer("the cat")["input_ids"] + [end]
        assert feature["labels"] == [IGNORED_LABEL, *feature["input_ids"][1:]]

    def test_long_prompt_is_cut_on_its_left(self, byte_tokenizer):
        example = {"prompt": "abcdef", "completion": "xy"}
        (feature,) = encode_language_model([example], byte_tokenizer, max_length=5)
        pieces = byte_tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert pieces == ["e", "f", "x", "y", "<|end|>"]
        (feature,) = encode_language_model([example], byte_tokenizer, max_length=3)
        assert byte_tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["f", "x", "y"]
        assert feature["labels"][0] == IGNORED_LABEL

    def test_refusals(self, byte_tokenizer):
        with pytest.raises(ValueError, match="max_length: must be at least 2; got 1"):
            encode_language_model([{"text": "x"}], byte_tokenizer, max_length=1)
        with pytest.raises(ValueError, match=r"examples\[1\]: expected at least two tokens"):
            encode_language_model([{"text": "x"}, {"text": ""}], byte_tokenizer)


def test_real_tokenizer_through_the_collator(minilm_tokenizer):
    examples = [
        {"tokens": ["Anna", "lives", "in", "Reykjavik"], "tags": ["B-PER", "O", "O", "O"]},
        {"tokens": ["Hello"], "tags": ["O"]},
    ]
    features = encode_tokens(examples, minilm_tokenizer, TAGS)
    batch = PadCollator(minilm_tokenizer)(features)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(1).tolist() == [len(f["input_ids"]) for f in features]
    for row, feature, example in zip(batch["labels"], features, examples, strict=True):
        assert decode_tags(row.clamp(min=0), feature, TAGS) == example["tags"]


@pytest.mark.parametrize("task_type", TRAINED_TASKS)
def test_a_codec_has_the_usual_length_of_its_task(task_type, tiny_tokenizer):
    """One for questions has room for a context behind the question, and windows that share `doc_stride` tokens."""
    codec = TaskCodec(task_type, tiny_tokenizer)
    assert codec.max_length == TASKS[task_type].max_length
    if task_type == "QUESTION_ANS":
        example = {"id": "1", "question": "who met anna ?", "context": "bob met anna ."}
        assert len(codec.encode([example])) == 1


@pytest.mark.parametrize(
    ("task_type", "example", "expected"),
    [
        ("TOKEN_CLS", {"words": ["a"]}, "'tokens'"),
        ("QUESTION_ANS", {"question": "a"}, "'question' and 'context'"),
        ("CAUSAL_LM", {"prompt": "a"}, "'text', or 'messages', or 'prompt' and 'completion'"),
    ],
)
def test_an_example_with_columns_of_other_names_is_refused(task_type, example, expected, tiny_tokenizer):
    (name,) = example
    with pytest.raises(ValueError, match=rf"^examples\[0\] must have {expected} for .*{task_type}.*; got {name}$"):
        TaskCodec(task_type, tiny_tokenizer).encode([example])
