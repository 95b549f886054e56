"""Choices: a text and what could follow it, from columns (COPA's own among others) to examples of MULTIPLE_CHOICE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.columns import LABEL_COLUMNS, Table, Wanted, label_column
from ptv2_fast.training.data.examples import check_text, json_object, text_of, value_of
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet

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
