"""Rows that the adapters of one folder answer: which of them each, and as what example of its task.

A row is what somebody typed or a file has: a text, or a JSON object with columns as `data` describes them. Its column
"adapter" names the adapter that alone answers it; without one all do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptv2_fast.training.data.columns import TOKEN_COLUMNS, Table, Wanted
from ptv2_fast.training.data.examples import check_text, json_object
from ptv2_fast.training.data.read import Source, read_rows
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.data.text_files import typed_lines
from ptv2_fast.training.flags import source_of
from ptv2_fast.training.plans import Reader

# Which adapter a row is for.
ADAPTER = "adapter"


@dataclass(frozen=True)
class Requests:
    """What is to be answered.

    Attributes:
        rows: as they were given.
        examples: adapter -> row -> the example that the row is for it.
    """

    rows: list[dict[str, Any]]
    examples: dict[str, dict[int, dict[str, Any]]]


def typed_requests(
    members: Mapping[str, Reader], lines: Iterable[str], *, where: str = "text", context: str | None = None
) -> Requests:
    """Requests from lines of text, blank ones left out; a line that is a JSON object is a row of columns.

    Args:
        context: what questions are about that are a text alone (QUESTION_ANS).

    Raises:
        ValueError: there is no line with text, or one is no example for an adapter that it is for.
    """
    rows = []
    for _, place, line in typed_lines(lines, where):
        values = json_object(line)
        rows.append(Row(place, {"text": line.rstrip("\r\n")} if values is None else values))
    return _requests(members, rows, where, {name: Wanted(labelled=False) for name in members}, context)


def read_requests(members: Mapping[str, Reader], path: str, flags: Mapping[str, Any]) -> Requests:
    """Requests from a file or dataset, whose rows all adapters read, each by the columns of its training.

    Args:
        flags: columns and split that are named for all adapters whose task has such a column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read_examples`, or a row is no example for an adapter that it is for.
    """
    wanted = {name: _wanted(member, path, flags) for name, member in members.items()}
    named = list(dict.fromkeys(column for one in wanted.values() for column in one.named))
    tasks = list(dict.fromkeys(member.task_type for member in members.values()))
    rows = read_rows(path, tasks, named=named, split=flags.get("split"), format=flags.get("format"))
    return _requests(members, rows, path, wanted, None)


def _wanted(member: Reader, path: str, flags: Mapping[str, Any]) -> Wanted:
    """The columns that an adapter's task reads of a file."""
    task = member.reading
    has = {"text_column": task.most_texts > 0, "split": True, "format": True, **dict.fromkeys(task.options, True)}
    source = source_of(path, {name: value for name, value in flags.items() if has.get(name)}, member.columns)
    asked = Source(path, member.task_type, member.problem_type, labelled=False)
    return asked.wanted(source.text_column, source.label_column, source.prompt_column, source.completion_column)


def _requests(
    members: Mapping[str, Reader],
    rows: Sequence[Row],
    where: str,
    wanted: Mapping[str, Wanted],
    context: str | None,
) -> Requests:
    answering = [_answering(row, members) for row in rows]
    examples = {}
    for name, member in members.items():
        own = [index for index, names in enumerate(answering) if name in names]
        try:
            made = _examples(member, [rows[index] for index in own], wanted[name], context)
            check = member.reading.check
            if check is not None:
                check(where, made, [], None)
            member.check_parts(where, made)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error} (a row's {ADAPTER!r} says who alone answers it)") from error
        examples[name] = dict(zip(own, made, strict=True))
    return Requests([row.values for row in rows], examples)


def _answering(row: Row, members: Mapping[str, Reader]) -> list[str]:
    """Who answers a row."""
    taken = sorted(set(members) & set(row.values))
    if taken:
        raise ValueError(
            f"{row.where}: columns must not be named like adapters, whose answers stand beside them; got {taken[0]!r}"
        )
    name = row.values.get(ADAPTER)
    if name is None or name == "":
        return list(members)
    if name not in list(members):
        raise ValueError(f"{row.where}: expected one of {', '.join(members)} in {ADAPTER!r}; got {name!r}")
    return [name]


def _examples(member: Reader, rows: Sequence[Row], wanted: Wanted, context: str | None) -> list[dict[str, Any]]:
    """Rows as an adapter's task has them: a text alone as a typed line, others by their columns."""
    task = member.task
    made: dict[int, dict[str, Any]] = {}
    rest: dict[int, Row] = {}
    for index, row in enumerate(rows):
        values = {column: value for column, value in row.values.items() if column != ADAPTER}
        line = _line(values, wanted, member.row.predicts == "tags")
        if line is None:
            rest[index] = replace(row, values=values)
        else:
            if not check_text(row.where, line).strip():
                raise ValueError(f"{row.where}: expected text; got {line!r}")
            made[index] = task.typed(line, row.where, index + 1, context)
    if rest:
        reading = member.reading
        roles = reading.columns(Table(list(rest.values())), wanted)
        made |= {index: reading.example(row, roles, None) for index, row in rest.items()}
    return [made[index] for index in range(len(rows))]


def _line(values: Mapping[str, Any], wanted: Wanted, tags: bool) -> str | None:
    """The text of a row that is nothing else; of one that is to be tagged, the sentence that has no words yet."""
    if tags:
        named = wanted.texts or tuple(name for name in TOKEN_COLUMNS if name in values) or ("text",)
        text = values.get(named[0])
    else:
        text = values.get("text") if set(values) == {"text"} and not wanted.named else None
    return text if isinstance(text, str) else None
