"""Reports: what reading has understood of data, and what looks wrong in it, row by row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.columns import Wanted, choose_columns
from ptv2_fast.training.data.examples import Given
from ptv2_fast.training.data.formats import chosen_split, format_of, splits_in
from ptv2_fast.training.data.read import Source
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.data.tags import TAG

# Parts of an example that are no input of a model.
_ANSWERS = ("label", "labels", "tags", "answers", "id", "completion")
# Roles of columns that no row may have empty.
_TEXTS = frozenset("text text_pair tokens question context query positive prompt instruction output".split())


@dataclass
class Part:
    """One split of what was read.

    Attributes:
        rows, examples: of those that can be used, side by side.
        refused: what is wrong with each of the others, with its place.
        empty: how many of these have no text.
        unusable: why no row can be used, though each is as expected: their labels do not go together.
    """

    rows: list[Row] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    empty: int = 0
    unusable: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is looked at, as the caller names it: the task, the columns, what labels are called."""

    source: Source
    wanted: Wanted
    given: Given


def read_parts(asked: Asked, split: str | None, notes: list[str]) -> tuple[str, dict[str, str], dict[str | None, Part]]:
    """The format, the columns of each role, and the parts of a place: one split, or all of them.

    Raises:
        FileNotFoundError, ValueError: nothing of it can be read.
    """
    place = asked.source.place
    reading = asked.source.reading(asked.wanted)
    splits = splits_in(place, reading)
    if split is not None or None in splits:
        splits = {split: chosen_split(place, splits, split)}
    roles: dict[str, str] = {}
    parts = {}
    for name, rows in splits.items():
        label = str(place) if name is None else f"{place}[{name}]"
        found = list(rows())
        if not found:
            raise ValueError(f"{label}, line 1: expected at least one example; found none")
        roles = choose_columns(label, found, asked.source.handled.columns, asked.wanted, reading.notes)
        parts[name] = _part(asked, label, found, roles, reading.notes)
    notes += dict.fromkeys(reading.notes)
    path = Path(place)
    kind = format_of(path, asked.source.task, asked.source.format) if path.is_file() else _kind_of(path)
    return kind, roles, parts


def _kind_of(path: Path) -> str:
    if not path.is_dir():
        return "a data set's name"
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return "a folder of datasets.save_to_disk" if saved else "a folder of files"


def _part(asked: Asked, name: str, rows: Sequence[Row], roles: dict[str, str], notes: list[str]) -> Part:
    part, handled = Part(), asked.source.handled
    for row in rows:
        try:
            example = handled.example(row, roles, asked.given.labels)
        except ValueError as error:
            part.refused.append(str(error))
            texts = [row.values.get(column) for role, column in roles.items() if role in _TEXTS]
            part.empty += any(text is None or text != text or not str(text).strip() for text in texts)
            continue
        part.rows.append(row)
        part.examples.append(example)
    try:
        if handled.settle is not None and part.examples:
            handled.settle(name, part.rows, part.examples, asked.given, notes)
        if handled.check is not None and part.examples:
            handled.check(name, part.examples, notes, asked.given.labels)
    except ValueError as error:
        part.unusable = str(error)
    return part


def inputs_of(example: dict[str, Any]) -> str:
    """What a model reads of an example, as one text."""
    if "messages" in example or isinstance(example.get("prompt"), list):
        messages = example.get("messages") or [*example["prompt"], *example.get("completion", ())]
        return "\n".join(message["content"] for message in messages)
    if "tokens" in example:
        return " ".join(example["tokens"])
    parts = [value for name, value in example.items() if name not in _ANSWERS or name == "completion"]
    return "\n".join(item for part in parts for item in (part if isinstance(part, list) else [part]))


def _answer(example: dict[str, Any]) -> str:
    return json.dumps({name: example[name] for name in _ANSWERS[:4] if name in example}, sort_keys=True)


def label_counts(part: Part) -> dict[str, int]:
    """How often each label occurs: of tags the entities of each type, or the words of each class."""
    counts: Counter[str] = Counter()
    iob = all(TAG.fullmatch(str(tag)) for example in part.examples for tag in example.get("tags", ()))
    for example in part.examples:
        if "tags" in example:
            # Numbers that nobody has named are still themselves.
            tags = [str(tag) for tag in example["tags"]]
            counts.update(tag[2:] for tag in tags if tag.startswith("B-")) if iob else counts.update(tags)
        elif "labels" in example:
            counts.update(example["labels"])
        elif isinstance(example.get("label"), str | int):
            counts.update([str(example["label"])])
    return dict(counts.most_common())


def lengths(part: Part, count: Callable[[str], int]) -> dict[str, Any]:
    """Least, median, 95 of 100, most, and where the longest stands."""
    found = sorted((count(inputs_of(example)), index) for index, example in enumerate(part.examples))
    if not found:
        return {}
    at = [found[round(share * (len(found) - 1))][0] for share in (0, 0.5, 0.95, 1)]
    return {**dict(zip(("min", "median", "p95", "max"), at, strict=True)), "longest": part.rows[found[-1][1]].where}


def duplicates(part: Part) -> dict[str, Any]:
    """Rows that repeat an earlier one's texts: how many, how many with another label, and the first of each."""
    seen: dict[str, tuple[str, str]] = {}
    again: list[str] = []
    differing: list[str] = []
    for row, example in zip(part.rows, part.examples, strict=True):
        where, answer = seen.setdefault(inputs_of(example), (row.where, _answer(example)))
        if where != row.where:
            again.append(f"{row.where} repeats {where}")
            if answer != _answer(example):
                differing.append(again[-1])
    return {"rows": len(again), "first": again[:3], "differing": len(differing), "first_differing": differing[:3]}


def shared(first: Part, second: Part) -> dict[str, Any]:
    """Rows of the second part whose texts are in the first too."""
    seen = {inputs_of(example): row.where for row, example in zip(first.rows, first.examples, strict=True)}
    both = [
        f"{row.where} is {seen[text]}"
        for row, example in zip(second.rows, second.examples, strict=True)
        if (text := inputs_of(example)) in seen
    ]
    return {"rows": len(both), "first": both[:3]}


def unseen_labels(first: Part, others: Iterable[Part]) -> list[str]:
    """Labels of other parts that the first one, which is trained on, does not have."""
    known = label_counts(first)
    return sorted({label for part in others for label in label_counts(part) if label not in known})
