"""Regression and several labels a row: from a file to predictions, for heads that solve more than one class a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptv2_fast.training.codec import Codec
from ptv2_fast.training.columns import LABEL_COLUMNS, Table, Wanted, classified
from ptv2_fast.training.decoding import Prediction, Rows
from ptv2_fast.training.examples import check_known, check_text, class_example, refuse_two_spellings, value_of
from ptv2_fast.training.formats import Row
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.texts import texts_in
from ptv2_fast.training.tokens import encode_classification

# Between the labels of a row, where they stand in one cell: `news|sport`. No label can hold it.
LABEL_SEPARATOR = "|"
# Labels are trained on in float32.
_LARGEST = float(np.finfo(np.float32).max)
# A label is predicted where it is more probable than not.
_THRESHOLD = 0.5


def number_columns(table: Table, wanted: Wanted) -> dict[str, str]:
    """Text, or a pair of texts, and a number; "score" is one of the usual names too."""
    return classified(table, wanted, (*LABEL_COLUMNS, "score"))


def number_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """A text, or a pair of them, and its number as "label"."""
    example = class_example(row, {role: column for role, column in roles.items() if role != "label"}, None)
    if "label" not in roles:
        return example
    given = value_of(row, roles["label"])
    number = _number(given)
    if not abs(number) <= _LARGEST:
        more = ", which float32 cannot hold" if math.isfinite(number) else ""
        raise ValueError(f"{row.where}: expected a finite number in {roles['label']!r}; got {given!r}{more}")
    return {**example, "label": number}


def _number(given: Any) -> float:
    """A number, or a text that is one; NaN for whatever else."""
    # Python reads 1_0 as 10.
    if isinstance(given, bool) or not isinstance(given, str | int | float) or "_" in str(given):
        return math.nan
    try:
        return float(given)
    except (ValueError, OverflowError):
        return math.nan


def labels_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """A text, or a pair of them, and its labels as "labels": a list, or names in a cell between `|`."""
    example = class_example(row, {role: column for role, column in roles.items() if role != "label"}, None)
    if "label" not in roles:
        return example
    given = value_of(row, roles["label"])
    names = _names(row.where, roles["label"], given)
    for name in names:
        check_known(row.where, "label", name, labels)
    return {**example, "labels": names}


def _names(where: str, column: str, given: Any) -> list[str]:
    parts = given
    if isinstance(given, str):
        parts = _listed(given) if given.strip().startswith("[") else given.split(LABEL_SEPARATOR)
        parts = [] if not given.strip() else parts
    wrong = not isinstance(parts, list) or any(isinstance(p, bool) or not isinstance(p, str | int) for p in parts)
    names = [] if wrong else [check_text(where, str(part)).strip() for part in parts]
    if wrong or "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"{where}: expected different labels in {column!r}, as a list or between {LABEL_SEPARATOR!r}; got {given!r}"
        )
    taken = next((name for name in names if LABEL_SEPARATOR in name), None)
    if taken is not None:
        raise ValueError(
            f"{where}: a label must not hold {LABEL_SEPARATOR!r}, which stands between labels; got {taken!r}"
        )
    return sorted(names)


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_label_sets(
    name: str | Path, examples: Sequence[Mapping[str, Any]], notes: list[str], labels: LabelSet | None
) -> None:
    """Refuse a label that is spelled in two ways."""
    refuse_two_spellings(name, {label for example in examples for label in example.get("labels", ())}, notes)


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
