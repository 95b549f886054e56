"""Multiple choice: from examples to the chosen text and the scores of all.

An example is {"text", "choices": [...], "label"}, the label the index of the right choice, from 0; each choice is a row
of its own, behind the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_fast.training.codec import Codec
from ptv2_fast.training.data.choices import choice_columns, choice_example
from ptv2_fast.training.data.columns import Table, Wanted
from ptv2_fast.training.data.examples import json_object
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.decoding import Prediction, Rows
from ptv2_fast.training.tokens import check_fast, check_room, say_cut, splits_differ


def encode_choices(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    """Features whose inputs are lists of C lists, one for each choice, and `labels`, an int.

    Each choice stands behind the text as the second of a pair; what is too long is cut from the longer of the two.
    """
    check_fast(codec.tokenizer)
    check_room(codec.tokenizer, codec.max_length, pair=True)
    # Where a space is part of the word behind it, the choice needs the one that separates it from the text.
    space = " " if splits_differ(codec.tokenizer) else ""
    features, cut = [], 0
    for index, row in enumerate(rows):
        if not row["choices"]:
            raise ValueError(f"examples[{index}]: expected at least one choice; got none")
        pairs = [(row["text"], space + choice) for choice in row["choices"]]
        encoding = codec.tokenizer(pairs, truncation=True, max_length=codec.max_length)
        cut += any(bool(one.overflowing) for one in encoding.encodings)
        feature = {name: encoding[name] for name in codec.tokenizer.model_input_names if name in encoding}
        features.append({**feature, "labels": row["label"]} if "label" in row else feature)
    if not quiet:
        say_cut(cut, f"{len(rows)} examples", codec.max_length)
    return features


def choices(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The index of each example's most probable choice, and the probabilities of all."""
    return [Prediction(int(row.argmax()), float(row.max()), dict(enumerate(row.tolist()))) for row in rows]


def typed_choice(line: str, where: str, number: int, context: str | None) -> dict[str, Any]:
    """A line is a JSON object with what a line of a file has."""
    values = json_object(line)
    if values is None:
        raise ValueError(f"{where}: expected a JSON object with 'text' and 'choices'; got {line.strip()!r}")
    row = Row(where, values)
    return choice_example(row, choice_columns(Table([row]), Wanted(labelled=False)), None)


def choice_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"text", "choices", "choice" (its text), "index", "score", "scores" of all}."""
    return {
        "text": example["text"],
        "choices": list(example["choices"]),
        "choice": example["choices"][prediction.value],
        "index": prediction.value,
        "score": round(prediction.score, 6),
        "scores": [round(score, 6) for score in (prediction.scores or {}).values()],
    }


def choice_line(record: Mapping[str, Any]) -> str:
    """The choice, its score and the text, between tabs."""
    return f"{record['choice']}\t{record['score']:.4f}\t{record['text']}"
