"""Multiple choice: from a file (COPA's own fields among others) to the chosen text and the scores of all.

An example is {"text", "choices": [...], "label"}, the label the index of the right choice, from 0; each choice is a row
of its own, behind the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.training.codec import Codec
from ptv2_fast.training.columns import LABEL_COLUMNS, Table, Wanted, label_column
from ptv2_fast.training.decoding import Prediction, Rows
from ptv2_fast.training.examples import check_text, text_of, value_of
from ptv2_fast.training.formats import Row
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.texts import json_object
from ptv2_fast.training.tokens import check_fast, check_room, say_cut, splits_differ

_TEXTS = ("text", "premise", "question", "context", "sentence")
_CHOICE = re.compile(r"choice(\d+)")
# Names in the header of a table; choices of higher numbers stand beside these.
HEADERS = ("choices", *(f"choice{number}" for number in range(10)))
# What stands between COPA's premise and a choice: the paper's code reads it so.
_JOINED_BY = {"cause": "because", "effect": "so"}


def choice_columns(table: Table, wanted: Wanted) -> dict[str, str]:
    """The text, the choices (a list, or columns choice1, choice2, ...), the label, and COPA's question."""
    roles = {}
    numbered = sorted((int(found[1]), name) for name in table.names if (found := _CHOICE.fullmatch(name)))
    if "choices" in table.names and numbered:
        table.refuse_several([("choices",), tuple(name for _, name in numbered)], "text_column")
    if "choices" not in table.names and len(numbered) < 2:
        raise table.missing("the column 'choices', or 'choice1' and 'choice2'", "choices")
    if wanted.texts:
        roles["text"] = table.need(wanted.texts[0], "text_column")
    elif numbered and all(name in table.names for name in ("premise", "question")):
        roles |= {"text": "premise", "asked": "question"}
    else:
        text = table.one_of(_TEXTS, "text_column")
        if text is None:
            raise table.missing(f"a column of {list(_TEXTS)}", "text_column")
        roles["text"] = text
    roles |= {name: name for _, name in numbered} or {"choices": "choices"}
    label = label_column(table, wanted, LABEL_COLUMNS)
    return roles if label is None else {**roles, "label": label}


def choice_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """The text, the choices, and the index of the right one."""
    text = text_of(row, roles["text"]).strip()
    if "asked" in roles:
        asked = value_of(row, roles["asked"])
        if asked not in _JOINED_BY:
            raise ValueError(f"{row.where}: expected 'cause' or 'effect' in {roles['asked']!r}; got {asked!r}")
        text = f"{text} {_JOINED_BY[asked]}"
    names = [role for role in roles if _CHOICE.fullmatch(role)]
    choices = [text_of(row, name).strip() for name in names] or _choices(row, roles["choices"])
    example: dict[str, Any] = {"text": text, "choices": choices}
    if "label" in roles:
        example["label"] = _index(row, roles["label"], names, len(choices))
    return example


def _choices(row: Row, column: str) -> list[str]:
    choices = value_of(row, column)
    if isinstance(choices, str):
        choices = (json_object(f'{{"choices": {choices}}}') or {}).get("choices")
    whole = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not whole or len(choices) < 2:
        raise ValueError(
            f"{row.where}: expected a list of two or more texts in {column!r}; got {value_of(row, column)!r}"
        )
    return [check_text(row.where, choice).strip() for choice in choices]


def _index(row: Row, column: str, names: Sequence[str], count: int) -> int:
    """A label as an index: a number from 0, as a text too, or the name of the choice's column."""
    label = value_of(row, column)
    found = names.index(label) if label in names else label
    if isinstance(found, str) and found.strip().isdecimal():
        found = int(found)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < count:
        raise ValueError(
            f"{row.where}: expected the right choice's number, 0 to {count - 1}, in {column!r}; got {label!r}"
        )
    return found


def check_choices(
    name: str | Path, examples: Sequence[Mapping[str, Any]], notes: list[str], labels: LabelSet | None
) -> None:
    """Refuse examples of which one has more choices than another: a batch is one tensor (B, C, N)."""
    counts = [len(example["choices"]) for example in examples]
    other = next((index for index, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        raise ValueError(
            f"{name}: every example must have as many choices; example 1 has {counts[0]}, example {other + 1} has "
            f"{counts[other]}"
        )


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
