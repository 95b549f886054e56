"""JSON: lines of objects, a list of them, SQuAD's nested questions, and what annotation tools write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.label_studio import is_task, task_values
from ptv2_fast.training.data.prodigy import answered_values, is_answered
from ptv2_fast.training.data.rows import Row, lines_of, read_text, suffix_of

_LINES = (".jsonl", ".ndjson")


def json_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """Rows of JSON lines (.jsonl, .ndjson), else of a JSON list of objects or of SQuAD's nested JSON where it is one.

    Args:
        notes: is given a line for whatever is left out.

    Raises:
        ValueError: a line is not JSON or not an object; the message has line and column.
    """
    text = read_text(path)
    if suffix_of(path) not in _LINES:
        try:
            root = _parsed(text)
        except json.JSONDecodeError as error:
            # "Extra data" after a whole object: JSON lines under the suffix .json.
            if not error.msg.startswith("Extra data"):
                raise ValueError(
                    f"{path}, line {error.lineno}: expected JSON; {error.msg} at column {error.colno}"
                ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected JSON; {error}") from error
        else:
            yield from _kept(_document_rows(path, root), path, notes)
            return
    yield from _kept(_line_rows(path, text), path, notes)


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in lines_of(path, text):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = _parsed(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: expected one JSON object a line; {error.msg} at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            # What JSON allows and Python does not read: numbers of thousands of digits, endless nesting.
            raise ValueError(f"{where}: expected one JSON object a line; {error}") from error
        yield Row(where, _json_object(where, values))


def _parsed(text: str) -> Any:
    """JSON, with a name twice in one object refused: one of its two values would be lost."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names in an object must differ; repeated: {repeated}")
    return values


def _kept(rows: Iterator[Row], path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows, those of annotation tools as their values; what nobody labelled or accepted is counted in a note."""
    skipped: dict[str, list[str]] = {}
    for row in rows:
        values: dict[str, Any] | None = row.values
        if is_task(row.values):
            values, why = task_values(row.where, row.values), "tasks without a submitted annotation"
        elif is_answered(row.values):
            values, why = answered_values(row.where, row.values), "examples that were rejected or ignored"
        if values is None:
            skipped.setdefault(why, []).append(row.where)
        else:
            yield Row(row.where, values)
    notes += [f"{path}: {len(where)} {why} are left out, {where[0]} the first" for why, where in skipped.items()]


def _json_object(where: str, values: object) -> dict[str, Any]:
    if isinstance(values, list) and len(values) == 2 and isinstance(values[0], str) and isinstance(values[1], dict):
        # spaCy's training data: a text and what is known of it.
        return {"text": values[0], **values[1]}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object; got {type(values).__name__}")
    return values


def _document_rows(path: Path, root: object) -> Iterator[Row]:
    """Rows of one JSON document; the place of a record is its index, as JSON keeps no lines."""
    if isinstance(root, dict) and isinstance(root.get("data"), list):
        yield from _squad_rows(path, root["data"])
    elif isinstance(root, list):
        for index, values in enumerate(root):
            where = f"{path}, record [{index}]"
            yield Row(where, _json_object(where, values))
    else:
        # A file of JSON lines with a single line.
        yield Row(f"{path}, line 1", _json_object(f"{path}, line 1", root))


def _squad_rows(path: Path, articles: list[Any]) -> Iterator[Row]:
    for a, article in enumerate(articles):
        place = f"{path}, data[{a}]"
        for p, paragraph in enumerate(_member(place, article, "paragraphs")):
            inner = f"{place}.paragraphs[{p}]"
            for q, question in enumerate(_member(inner, paragraph, "qas")):
                where = f"{inner}.qas[{q}]"
                values = _json_object(where, question)
                if "context" in values:
                    raise ValueError(f"{where}: 'context' must stand in the paragraph alone, not in the question too")
                yield Row(where, {"context": paragraph.get("context"), **values})


def _member(where: str, values: object, key: str) -> list[Any]:
    member = _json_object(where, values).get(key)
    if not isinstance(member, list):
        raise ValueError(f"{where}: expected a list {key!r}; got {member!r}")
    return member
