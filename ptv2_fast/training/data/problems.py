"""Numbers and sets of labels: from columns to examples of SEQ_CLS whose head solves more than one class a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.columns import LABEL_COLUMNS, MARKS, Table, Wanted, classified
from ptv2_fast.training.data.examples import (
    check_known,
    check_text,
    class_example,
    refuse_two_spellings,
    value_of,
)
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet

# Between the labels of a row, where they stand in one cell: `news|sport`. No label can hold it.
LABEL_SEPARATOR = "|"
# Signs that stand between labels elsewhere, and in labels.
_OTHER_SEPARATORS = (",", ";")
# Labels are trained on in float32, of which this is the largest.
_LARGEST = (2 - 2**-23) * 2.0**127
# Role of a column of 0 and 1, with the label's name behind it.
_FLAG = "flag:"
_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


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


def label_set_columns(table: Table, wanted: Wanted) -> dict[str, str]:
    """Text, or a pair of texts, and labels: in one column, or in columns of 0 and 1, one for each label.

    Columns are such where the caller names several, or where no column has a usual name and two or more hold 0 and 1
    alone; empty cells, which `labels_example` refuses, decide nothing.
    """
    flags = tuple(table.need(name, "label_column") for name in wanted.flags) if wanted.labelled else ()
    usual = any(name in table.names for name in LABEL_COLUMNS)
    if wanted.labelled and not flags and wanted.label is None and not usual:
        others = [name for name in table.names if name not in wanted.texts and name not in MARKS]
        flags = tuple(name for name in others if _holds_flags(table, name))
    if len(flags) < 2:
        return classified(table, wanted)
    texts = classified(table, replace(wanted, labelled=False))
    return {**texts, **{_FLAG + name: name for name in flags}}


def _holds_flags(table: Table, name: str) -> bool:
    values = [value for value in table.values(name) if value is not None and str(value).strip()]
    return bool(values) and all(_flag(value) is not None for value in values)


def _flag(value: Any) -> bool | None:
    return _FLAGS.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None


def labels_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """A text, or a pair of them, and its labels as "labels": a list, or names in a cell between `|`."""
    texts = {role: column for role, column in roles.items() if role != "label" and not role.startswith(_FLAG)}
    example = class_example(row, texts, None)
    flags = [column for role, column in roles.items() if role.startswith(_FLAG)]
    if flags:
        names = sorted(column for column in flags if _is_set(row, column))
        for name in names:
            check_known(row.where, "label", name, labels)
        return {**example, "labels": names}
    if "label" not in roles:
        return example
    given = value_of(row, roles["label"])
    names = _names(row.where, roles["label"], given)
    for name in names:
        check_known(row.where, "label", name, labels)
    return {**example, "labels": names}


def _is_set(row: Row, column: str) -> bool:
    flag = _flag(value_of(row, column))
    if flag is None:
        raise ValueError(f"{row.where}: expected 0 or 1 in {column!r}; got {row.values[column]!r}")
    return flag


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
    """Refuse a label that is spelled in two ways; note one that looks like several."""
    found = {label for example in examples for label in example.get("labels", ())}
    refuse_two_spellings(name, found, notes)
    alone = all(len(example.get("labels", ())) < 2 for example in examples)
    joined = sorted(label for label in found if any(sign in label for sign in _OTHER_SEPARATORS))
    if alone and joined:
        notes.append(
            f"{name}: each row has one label at most, and {len(joined)} of them hold ',' or ';' ({joined[0]!r}); labels"
            f" are parted by {LABEL_SEPARATOR!r} alone, or are lists"
        )
