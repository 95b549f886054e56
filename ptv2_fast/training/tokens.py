"""Tokens: examples to model inputs with a fast tokenizer, and predictions back to text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptv2_fast.task_types import IGNORED_LABEL
from ptv2_fast.training.chat import encode_chat, is_chat, say_template
from ptv2_fast.training.labels import LabelSet

logger = logging.getLogger(__name__)


def check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer without word ids and offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: must be a fast tokenizer (with word ids and offsets); got {type(tokenizer).__name__}"
        )


def check_room(tokenizer: Any, max_length: int, pair: bool) -> None:
    """Refuse a length that special tokens take alone: of no text anything would be left."""
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if max_length < least:
        texts = "pairs of texts" if pair else "texts"
        raise ValueError(f"max_length must be at least {least} for {texts} of this tokenizer; got {max_length}")


def encode_classification(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    labels: LabelSet | None = None,
    *,
    max_length: int = 128,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Inputs and class numbers of SEQ_CLS examples; longer texts are cut at max_length, and counted in a warning.

    Args:
        quiet: leave out the warning.

    Returns:
        Features with the tokenizer's inputs and, where the example has a label, `labels` (an int).

    Raises:
        ValueError: the tokenizer is not fast, max_length has no room for special tokens, `labels` is missing or does
            not know a label.
    """
    check_fast(tokenizer)
    check_room(tokenizer, max_length, any("text_pair" in example for example in examples))
    features, cut = [], 0
    for example in examples:
        texts = [example[key] for key in ("text", "text_pair") if key in example]
        encoding = tokenizer(*texts, truncation=True, max_length=max_length)
        cut += bool(encoding.encodings[0].overflowing)
        feature = dict(encoding)
        if "label" in example:
            feature["labels"] = _known(labels).to_id(example["label"])
        features.append(feature)
    if not quiet:
        say_cut(cut, f"{len(examples)} texts", max_length)
    return features


def say_cut(cut: int, of: str, max_length: int, more: str = "") -> None:
    """Warn of what was cut."""
    if cut:
        logger.warning("%d of %s were cut at %d tokens (max_length, --max-length)%s", cut, of, max_length, more)


def _known(labels: LabelSet | None) -> LabelSet:
    if labels is None:
        raise ValueError("labels: the examples have labels; expected a LabelSet, got None")
    return labels


def encode_tokens(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    labels: LabelSet | None = None,
    *,
    max_length: int = 128,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Inputs and tag numbers of TOKEN_CLS examples: the first sub-word has the tag, the rest -100.

    Args:
        quiet: leave out the warning.

    Returns:
        Features with the tokenizer's inputs, `word_ids` (the word of each sub-word, None for
        special tokens), `num_words` and, where the example has tags, `labels` (a list). Words that
        max_length cuts off are counted in a warning; `decode_tags` calls them O.

    Raises:
        ValueError: the tokenizer is not fast, max_length has no room for a word, `labels` is missing or does not know
            a tag.
    """
    check_fast(tokenizer)
    check_room(tokenizer, max_length, pair=False)
    spaced = splits_differ(tokenizer)
    features, cut = [], 0
    for example in examples:
        words = list(example["tokens"])
        if spaced:
            words = words[:1] + [" " + word for word in words[1:]]
        encoding = tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
        )
        cut += len(encoding.encodings) > 1
        feature = _model_inputs(encoding, tokenizer, 0)
        word_ids = encoding.word_ids(0)
        feature["word_ids"] = word_ids
        feature["num_words"] = len(words)
        if "tags" in example:
            tag_ids = [_known(labels).to_id(tag) for tag in example["tags"]]
            firsts = _first_subwords(word_ids)
            feature["labels"] = [
                tag_ids[word] if index in firsts else IGNORED_LABEL for index, word in enumerate(word_ids)
            ]
        features.append(feature)
    if not quiet:
        say_cut(cut, f"{len(examples)} sentences", max_length, "; the words beyond count as O")
    return features


def _model_inputs(encoding: Any, tokenizer: Any, window: int) -> dict[str, Any]:
    names = (name for name in tokenizer.model_input_names if name in encoding)
    return {name: encoding[name][window] for name in names}


def splits_differ(tokenizer: Any) -> bool:
    """Whether a list of words loses the spaces that text has (byte-level tokenizers).

    Their vocabulary has a space inside the word ("Ġthe"); without it every word of a list would
    look glued to the one before.
    """
    text = tokenizer("the the", add_special_tokens=False)["input_ids"]
    words = tokenizer(["the", "the"], is_split_into_words=True, add_special_tokens=False)
    return text != words["input_ids"]


def _first_subwords(word_ids: Sequence[int | None]) -> set[int]:
    return {
        index for index, word in enumerate(word_ids) if word is not None and (index == 0 or word_ids[index - 1] != word)
    }


def decode_tags(
    tag_ids: Sequence[int],
    feature: Mapping[str, Any],
    labels: LabelSet,
    *,
    padding_side: str = "right",
) -> list[str]:
    """The tag of each word from the predicted tag number of each sub-word of one row.

    A word takes the tag of its first sub-word. A word without one (cut off, or made of characters
    that the tokenizer deletes) is O.

    Args:
        tag_ids: (N,) integers, N at least the feature's length (padding is left out).
        feature: as `encode_tokens` made it.
        labels: the tags of training.
        padding_side: where the row was padded.
    """
    word_ids = feature["word_ids"]
    row = _without_padding(tag_ids, len(word_ids), padding_side)
    tags = ["O"] * feature["num_words"]
    for index in _first_subwords(word_ids):
        tags[word_ids[index]] = labels.to_name(int(row[index]))
    return tags


def _without_padding(row: Sequence[Any], length: int, padding_side: str) -> Sequence[Any]:
    if len(row) < length:
        raise ValueError(f"row: expected at least {length} positions; got {len(row)}")
    return row[len(row) - length :] if padding_side == "left" else row[:length]


def encode_question_answering(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
) -> list[dict[str, Any]]:
    """Windows over each context, with the answer's first and last token where answers are given.

    A context that does not fit is cut into windows that share doc_stride tokens. A window that
    does not hold the whole (first) answer, and a question without one, points at the CLS token
    (position 0 for tokenizers that have none).

    Returns:
        Features with the tokenizer's inputs, `example_index`, `offset_mapping` (None outside the
        context) and, where the example has answers, `start_positions` and `end_positions` (ints).

    Raises:
        ValueError: the tokenizer is not fast, or a question leaves no room for the context.
    """
    check_fast(tokenizer)
    features = []
    for example_index, example in enumerate(examples):
        question = example["question"].strip()
        used = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        room = max_length - used - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= doc_stride:
            raise ValueError(
                f"examples[{example_index}]: the question has {used} tokens; with max_length"
                f" {max_length} that leaves {room} for the context, expected more than doc_stride"
                f" {doc_stride}"
            )
        if not tokenizer(example["context"], add_special_tokens=False)["input_ids"]:
            raise ValueError(f"examples[{example_index}]: the context has no tokens: {example['context']!r}")
        encoding = tokenizer(
            question,
            example["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window in range(len(encoding["input_ids"])):
            feature = _model_inputs(encoding, tokenizer, window)
            feature["example_index"] = example_index
            feature["offset_mapping"] = [
                tuple(offset) if sequence == 1 else None
                for offset, sequence in zip(
                    encoding["offset_mapping"][window], encoding.sequence_ids(window), strict=True
                )
            ]
            if "answers" in example:
                span = _answer_span(feature, example["answers"], tokenizer.cls_token_id)
                feature["start_positions"], feature["end_positions"] = span
            features.append(feature)
    return features


def _cls_position(input_ids: Sequence[int], cls_token_id: int | None) -> int:
    return input_ids.index(cls_token_id) if cls_token_id in input_ids else 0


def _answer_span(feature: Mapping[str, Any], answers: Mapping[str, Any], cls_token_id: int | None) -> tuple[int, int]:
    nowhere = _cls_position(feature["input_ids"], cls_token_id)
    if not answers["text"]:
        return nowhere, nowhere
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    offsets = feature["offset_mapping"]
    inside = [
        index for index, offset in enumerate(offsets) if offset is not None and offset[0] < end and offset[1] > start
    ]
    # The window's first and last tokens must reach the ends of the answer, or it is cut here.
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return nowhere, nowhere
    return inside[0], inside[-1]


def decode_answers(
    start_logits: Sequence[Sequence[float]],
    end_logits: Sequence[Sequence[float]],
    features: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    no_answer: bool = False,
    null_threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """The best span of each example over all of its windows.

    score(i, j) = start_logits[i] + end_logits[j] for i <= j < i + max_answer_length inside the
    context, among the n_best starts and ends of each window. With `no_answer`, the answer is "" if
    the smallest CLS score of the windows exceeds the best span's by more than null_threshold.

    Args:
        start_logits, end_logits: one row a feature, padded on the right or not at all.
        features: as `encode_question_answering` made them.
        examples: the examples they came from.

    Returns:
        For each example {"id", "text", "score", "place", "null_score", "n_best": [(score, text), ...]}; the place is
        the answer's first character in the context and the one behind it, None without an answer.

    Raises:
        ValueError: the rows and the features are not as many, or a row is too short.
    """
    if not len(start_logits) == len(end_logits) == len(features):
        raise ValueError(
            f"start_logits, end_logits: expected {len(features)} rows, one a feature;"
            f" got {len(start_logits)} and {len(end_logits)}"
        )
    spans: list[list[tuple[float, int, int]]] = [[] for _ in examples]
    null_scores = [float("inf")] * len(examples)
    for starts, ends, feature in zip(start_logits, end_logits, features, strict=True):
        index = feature["example_index"]
        length = len(feature["input_ids"])
        start = np.asarray(_without_padding(starts, length, "right"), dtype=np.float64)
        end = np.asarray(_without_padding(ends, length, "right"), dtype=np.float64)
        cls = _cls_position(feature["input_ids"], tokenizer.cls_token_id)
        null_scores[index] = min(null_scores[index], float(start[cls] + end[cls]))
        spans[index] += _best_spans(start, end, feature["offset_mapping"], n_best, max_answer_length)
    predictions = []
    for example, found, null_score in zip(examples, spans, null_scores, strict=True):
        found = sorted(found, key=lambda span: -span[0])[:n_best]
        named = [(score, example["context"][begin:end]) for score, begin, end in found]
        score, text = named[0] if named else (float("-inf"), "")
        place = found[0][1:] if found else None
        if no_answer and null_score - score > null_threshold:
            text, place = "", None
        best = {"id": example["id"], "text": text, "score": score, "place": place}
        predictions.append({**best, "null_score": null_score, "n_best": named})
    return predictions


def _best_spans(
    start: np.ndarray,
    end: np.ndarray,
    offsets: Sequence[tuple[int, int] | None],
    n_best: int,
    max_answer_length: int,
) -> list[tuple[float, int, int]]:
    inside = np.array([i for i, offset in enumerate(offsets) if offset is not None], dtype=int)
    first = inside[np.argsort(-start[inside], kind="stable")[:n_best]]
    last = inside[np.argsort(-end[inside], kind="stable")[:n_best]]
    spans = [(i, j) for i in first for j in last if i <= j < i + max_answer_length]
    if not spans:
        # No good end follows a good start: the best of all spans.
        every = ((i, j) for at, i in enumerate(inside) for j in inside[at : at + max_answer_length])
        spans = sorted(every, key=lambda span: -(start[span[0]] + end[span[1]]))[:1]
    return [(float(start[i] + end[j]), int(offsets[i][0]), int(offsets[j][1])) for i, j in spans]


def encode_language_model(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_length: int = 512, quiet: bool = False
) -> list[dict[str, Any]]:
    """Inputs and labels of CAUSAL_LM examples; an end-of-text token follows every text.

    A text longer than max_length becomes several windows that overlap by the one token that the
    next window predicts from, so that each token but the first is predicted exactly once. In a
    prompt with a completion only the completion is predicted; if both are too long, the prompt is
    cut on its left, then the completion on its right, and the example is counted in a warning, unless `quiet`.
    Of a chat the assistant's turns are predicted; windows without any are left out.

    Raises:
        ValueError: the tokenizer is not fast, max_length < 2, an example has nothing to predict, or the chat template
            does not take one.
    """
    check_fast(tokenizer)
    if max_length < 2:
        raise ValueError(f"max_length: must be at least 2; got {max_length!r}")
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    features, cut = [], 0
    for index, example in enumerate(examples):
        prompt: list[int] = []
        if is_chat(example):
            for ids, targets in encode_chat(example, tokenizer, f"examples[{index}]"):
                windows = _windows(ids, targets, max_length)
                features += [one for one in windows if any(label != IGNORED_LABEL for label in one["labels"])]
            continue
        if "prompt" in example:
            prompt = list(tokenizer(example["prompt"])["input_ids"])
            text = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
            cut += len(prompt) + len(text) + len(ending) > max_length
            # Room for one prompt token to predict the completion from.
            text = (list(text) + ending)[: max_length - 1]
            prompt = prompt[max(0, len(prompt) + len(text) - max_length) :]
        else:
            text = list(tokenizer(example["text"])["input_ids"]) + ending
        if len(prompt) + len(text) < 2 or not text:
            raise ValueError(f"examples[{index}]: expected at least two tokens; got {example!r}")
        features += _windows(prompt + text, [IGNORED_LABEL] * len(prompt) + text, max_length)
    if not quiet and any(map(is_chat, examples)):
        say_template(tokenizer)
    if not quiet:
        say_cut(cut, f"{len(examples)} examples", max_length, "; of a prompt its end is kept")
    return features


def _windows(input_ids: list[int], labels: list[int], max_length: int) -> list[dict[str, Any]]:
    """Windows that share the one token that the next predicts from."""
    features = []
    for begin in range(0, len(input_ids) - 1, max_length - 1):
        ids, targets = input_ids[begin : begin + max_length], labels[begin : begin + max_length]
        if begin:
            targets[0] = IGNORED_LABEL
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": targets})
    return features
