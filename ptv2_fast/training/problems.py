"""Regression and several labels a row: from examples to predictions, for heads that solve more than one class a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_fast.training.codec import Codec
from ptv2_fast.training.data.problems import LABEL_SEPARATOR
from ptv2_fast.training.decoding import Prediction, Rows
from ptv2_fast.training.texts import texts_in
from ptv2_fast.training.tokens import encode_classification

# A label is predicted where it is more probable than not.
_THRESHOLD = 0.5


def encode_numbers(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    """Features with `labels`, a float."""
    features = _encode_texts(rows, codec, quiet)
    return [
        {**feature, "labels": float(row["label"])} if "label" in row else feature
        for feature, row in zip(features, rows, strict=True)
    ]


def encode_label_sets(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    """Features with `labels`, (C,) floats: 1.0 where the row has the label."""
    features = _encode_texts(rows, codec, quiet)
    for feature, row in zip(features, rows, strict=True):
        if "labels" in row:
            has = {codec.known_labels.to_id(name) for name in row["labels"]}
            feature["labels"] = [float(index in has) for index in range(len(codec.known_labels))]
    return features


def _encode_texts(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    return encode_classification(list(map(texts_in, rows)), codec.tokenizer, max_length=codec.max_length, quiet=quiet)


def numbers_in(output: Any) -> list[float]:
    """The number of each row."""
    numbers: list[float] = output.logits.float().squeeze(-1).tolist()
    return numbers


def label_probabilities(output: Any) -> list[Any]:
    """(C,) of each row, on the CPU: how probable each label is by itself."""
    return list(output.logits.float().sigmoid().cpu())


def numbers(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The number of each row, which is its score too."""
    return [Prediction(number, number) for number in rows]


def label_sets(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The labels of each row that are more probable than not; the score is that of the least certain decision."""
    found = []
    for row in rows:
        scores = dict(zip(codec.known_labels.names, row.tolist(), strict=True))
        chosen = sorted(name for name, score in scores.items() if score > _THRESHOLD)
        found.append(Prediction(chosen, min(max(score, 1 - score) for score in scores.values()), scores))
    return found


def number_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"text", "text_pair" (pairs only), "value"}."""
    return {**texts_in(example), "value": round(prediction.value, 6)}


def labels_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"text", "text_pair" (pairs only), "labels", "scores" of all labels}."""
    scores = {name: round(score, 6) for name, score in (prediction.scores or {}).items()}
    return {**texts_in(example), "labels": prediction.value, "scores": scores}


def number_line(record: Mapping[str, Any]) -> str:
    """The number and the text, between tabs."""
    return "\t".join((f"{record['value']:.4f}", *texts_in(record).values()))


def labels_line(record: Mapping[str, Any]) -> str:
    """The labels, their scores and the text, between tabs."""
    scores = (f"{record['scores'][name]:.4f}" for name in record["labels"])
    separated = LABEL_SEPARATOR.join
    return "\t".join((separated(record["labels"]), separated(scores), *texts_in(record).values()))
