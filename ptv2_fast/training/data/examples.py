"""Rows as examples: what a file says of one, checked value by value."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet, differing_by_case, same_spelled_twice

# Up to so many classes may have an example each without a word.
_FEW_CLASSES = 20
_BYTES = frozenset(map(chr, range(0xDC80, 0xDD00)))
# What programs write for a cell that was empty.
MISSING = ("nan", "null", "<na>", "#n/a")


@dataclass(frozen=True)
class Given:
    """What the caller says of labels.

    Attributes:
        labels: those of training; others are refused.
        label_names: what the numbers 0, 1, ... of a file are called.
        tag_scheme: how tags say where entities begin and end, as `tags.SCHEMES` has it.
    """

    labels: LabelSet | None = None
    label_names: tuple[str, ...] = ()
    tag_scheme: str | None = None

    def named(self, where: str, label: Any) -> Any:
        """A label, by its name where it is a number and names are given.

        Raises:
            ValueError: names are given, and the label is no number that has one.
        """
        if not self.label_names:
            return label
        if isinstance(label, str) and label in self.label_names:
            return label
        text = str(label).strip()
        if isinstance(label, bool) or not text.isdecimal() or int(text) >= len(self.label_names):
            raise ValueError(
                f"{where}: expected a number from 0 to {len(self.label_names) - 1}, which label_names (--label-names)"
                f" names; got {label!r}"
            )
        return self.label_names[int(text)]


def value_of(row: Row, column: str) -> Any:
    """A row's value; ValueError where it has no such column."""
    if column not in row.values:
        raise ValueError(f"{row.where}: expected the column {column!r}; the columns are {list(row.values)}")
    return row.values[column]


def text_of(row: Row, column: str) -> str:
    """A row's value, which must be a text that is not blank."""
    value = value_of(row, column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.where}: expected text in {column!r}; got {value!r}")
    return check_text(row.where, value)


def check_text(where: str, text: str) -> str:
    """The text itself, if it is one that can be written.

    Raises:
        ValueError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start]
        # What Python makes of a byte that is no UTF-8, of standard input for instance.
        byte = f", as the byte 0x{ord(found) - 0xDC00:02x} is read, which is no UTF-8" if found in _BYTES else ""
        raise ValueError(
            f"{where}: expected text; character {error.start} is half of a surrogate pair: {found!a}{byte}"
        ) from error
    return text


def check_known(where: str, what: str, name: str, labels: LabelSet | None) -> None:
    """Refuse a label that was not seen in training."""
    if labels is not None and name not in labels:
        raise ValueError(f"{where}: {what} {name!r} was not seen in training; known: {list(labels.names)}")


def class_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """A text, or a pair of them, and its class."""
    example = {role: text_of(row, column).strip() for role, column in roles.items() if role != "label"}
    if "label" not in roles:
        return example
    label = value_of(row, roles["label"])
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    if isinstance(label, list) and len(label) > 1:
        raise ValueError(
            f"{row.where}: expected one label in {roles['label']!r}; got {label!r}; --problem-type"
            " multi_label_classification (problem_type) reads several"
        )
    if isinstance(label, str):
        label = check_text(row.where, label).strip()
    if not isinstance(label, str | int) or label == "":
        more = "; --problem-type regression (problem_type) reads numbers" if isinstance(label, float) else ""
        raise ValueError(
            f"{row.where}: expected a label (text or an integer) in {roles['label']!r}; got {label!r}{more}"
        )
    example["label"] = str(label)
    return example


def settle_classes(
    name: str | Path, rows: Sequence[Row], examples: list[dict[str, Any]], given: Given, notes: list[str]
) -> None:
    """Give numbers their names, in place, and refuse a class that training did not have."""
    for row, example in zip(rows, examples, strict=True):
        if "label" in example:
            example["label"] = given.named(row.where, example["label"])
            check_known(row.where, "label", example["label"], given.labels)


def question_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """A question about a text, and its answers."""
    context = text_of(row, "context")
    example: dict[str, Any] = {
        # Without the file's name: an id is the same wherever the file lies.
        "id": str(row.values.get("id", row.where.rpartition(", ")[2])),
        "question": text_of(row, "question"),
        "context": context,
    }
    if "answers" not in roles:
        return example
    texts, starts = _answers(row)
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int:
            raise ValueError(
                f"{row.where}: expected an answer's text and an integer answer_start; got {text!r} and {start!r}"
            )
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            raise ValueError(
                f"{row.where}: answer_start {start} must point at the answer {text!r}; the context has {found!r} there"
            )
    impossible = row.values.get("is_impossible")
    if impossible not in (None, True, False):
        raise ValueError(f"{row.where}: is_impossible must be true or false; got {impossible!r}")
    if impossible and texts:
        raise ValueError(f"{row.where}: is_impossible is true; expected no answers, got {texts}")
    if impossible is False and not texts:
        raise ValueError(f"{row.where}: is_impossible is false; expected answers, got none")
    example["answers"] = {"text": texts, "answer_start": starts}
    return example


def _answers(row: Row) -> tuple[list[Any], list[Any]]:
    """Texts and starts from {"text": [...], "answer_start": [...]} or a list of such pairs."""
    answers = value_of(row, "answers")
    texts: Any
    starts: Any
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        texts = [answer.get("text") for answer in answers]
        starts = [answer.get("answer_start") for answer in answers]
    elif isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
    else:
        texts = starts = None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(f"{row.where}: expected answers with as many 'text' as 'answer_start'; got {answers!r}")
    return texts, starts


def check_ids(
    name: str | Path, examples: Sequence[Mapping[str, Any]], notes: list[str], labels: LabelSet | None
) -> None:
    """Refuse two questions of one id."""
    seen: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        earlier = seen.setdefault(example["id"], number)
        if earlier != number:
            raise ValueError(f"{name}: ids must differ; questions {earlier} and {number} have {example['id']!r}")


def check_classes(
    name: str | Path, examples: Sequence[Mapping[str, Any]], notes: list[str], labels: LabelSet | None
) -> None:
    """Refuse a class that is spelled in two ways; note what looks odd about the classes."""
    found = {example["label"] for example in examples if "label" in example}
    missing = [label for label in sorted(found) if label.lower() in MISSING]
    if missing and labels is None:
        notes.append(f"{name}: a class is called {missing[0]!r}; is that a label, or a cell that was empty?")
    refuse_two_spellings(name, found, notes)
    if labels is None and len(found) == 1 < len(examples):
        notes.append(
            f"{name}: all {len(examples)} examples are of one class, {found.pop()!r}; two are learned at least"
        )
    if labels is None and len(found) > max(_FEW_CLASSES, len(examples) / 2):
        some = ", ".join(sorted(found)[:3])
        notes.append(
            f"{name}: {len(found)} classes in {len(examples)} examples ({some}, ...); is label_column"
            " (--label-column) the one that is meant?"
        )


def refuse_two_spellings(name: str | Path, found: Collection[str], notes: list[str]) -> None:
    """Refuse a label that is spelled in two ways; note those that differ by case alone."""
    twice = same_spelled_twice(found)
    if twice:
        raise ValueError(f"{name}: labels must be spelled in one way; {twice[0]!r} and {twice[1]!r} are the same")
    cased = differing_by_case(found)
    if cased:
        notes.append(f"{name}: classes that differ by upper and lower case alone: {', '.join(map(repr, cased))}")


def json_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line is; None where it is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
