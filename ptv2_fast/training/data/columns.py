"""Columns: which of a table are read, decided once for all of its rows.

A column is read because the caller names it, or because it alone has one of the usual names. Where two could be meant,
or another column holds text as well, the table is refused with the option that decides; what is left out is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ptv2_fast.training.data.delimited import TEXT_WORDS
from ptv2_fast.training.data.rows import Row

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXT_COLUMNS = ("text", "sentence", "review", "comment", "content")
LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "target")
TAG_COLUMNS = ("tags", "ner_tags", "labels")
TOKEN_COLUMNS = ("tokens", "words")
QUESTION_COLUMNS = ("id", "question", "context", "answers", "is_impossible")
# What no model is meant to read.
MARKS = frozenset(("id", "idx", "index", "guid", *LABEL_COLUMNS))
_TEXT_NAMES = frozenset((*TEXT_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair), "prompt", "completion"))


@dataclass(frozen=True)
class Wanted:
    """The columns that the caller names, and whether labels (tags, answers, completions) are read.

    `flags` are columns of 0 and 1, one for each label, where there are several in the place of `label`.
    """

    texts: tuple[str, ...] = ()
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    labelled: bool = True
    flags: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that must be there; what is not read need not."""
        more = (self.label, *self.flags, self.completion) if self.labelled else ()
        return tuple(name for name in (*self.texts, self.prompt, *more) if name is not None)

    def check(self, task: str, most_texts: int, options: Sequence[str]) -> None:
        """Refuse names of columns that the task does not have.

        Args:
            most_texts: how many columns of texts the task takes.
            options: which other columns it has: "label_column", "prompt_column", "completion_column".

        Raises:
            ValueError: see above.
        """
        if len(self.texts) > most_texts:
            raise ValueError(f"text_column: {task} takes at most {most_texts} column names; got {self.texts}")
        if self.label is not None and "label_column" not in options:
            raise ValueError(f"label_column: {task} has no label column; got {self.label!r}")
        if self.flags and "label_columns" not in options:
            raise ValueError(
                "label_column: several columns, of 0 and 1, are for multi_label_classification alone (--problem-type);"
                f" got {self.flags}"
            )
        for argument, name in (("prompt_column", self.prompt), ("completion_column", self.completion)):
            if name is not None and argument not in options:
                raise ValueError(f"{argument}: only CAUSAL_LM has one, not {task}; got {name!r}")
            if name is not None and self.texts:
                raise ValueError(f"{argument}: must be None beside text_column {self.texts[0]!r}; got {name!r}")
        every = [
            name for name in (*self.texts, self.label, *self.flags, self.prompt, self.completion) if name is not None
        ]
        if len(set(every)) < len(every):
            raise ValueError(f"text_column, label_column, prompt_column, completion_column must differ; got {every}")


def choose_columns(
    source: str, rows: Sequence[Row], choose: Chooser, wanted: Wanted, notes: list[str]
) -> dict[str, str]:
    """What an example has (text, text_pair, label; tokens, tags; prompt, completion; ...) -> the column that it is in.

    Args:
        source: the file's or dataset's name, for the notes.
        rows: all rows; a column is there if one of them has it.
        choose: finds a task's columns among those of the table.
        notes: is given a line that names the columns left out.

    Raises:
        ValueError: a column is missing, or it cannot be told which one is meant.
    """
    table = Table(rows)
    roles = choose(table, wanted)
    unread = (
        ()
        if wanted.labelled
        else (*LABEL_COLUMNS, *TAG_COLUMNS, "answers", wanted.label, *wanted.flags, wanted.completion)
    )
    left = [name for name in table.names if name not in roles.values() and name not in unread]
    if left:
        notes.append(f"{source}: columns left out: {len(left)} ({', '.join(map(repr, left))})")
    return roles


class Table:
    """The columns of all rows, in the order in which they come."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.where = rows, rows[0].where
        self.names = list(dict.fromkeys(name for row in rows for name in row.values))

    def need(self, name: str, argument: str) -> str:
        """A column that must be there."""
        if name not in self.names:
            raise self.missing(f"the column {name!r}", argument)
        return name

    def missing(self, what: str, argument: str) -> ValueError:
        """What to raise where something is not."""
        return ValueError(f"{self.where}: expected {what} ({argument}); the columns are {self.names}")

    def one_of(self, usual: Sequence[str], argument: str) -> str | None:
        """The one column of the usual names; None where there is none."""
        found = [name for name in usual if name in self.names]
        self.refuse_several([(name,) for name in found], argument)
        return found[0] if found else None

    def refuse_several(self, found: Sequence[tuple[str, ...]], argument: str) -> None:
        """Refuse a table in which several columns could be meant."""
        if len(found) > 1:
            each = ", ".join(" and ".join(map(repr, names)) for names in found)
            raise ValueError(
                f"{self.where}: any of {each} could be meant; {_option(argument)} decides; the columns are {self.names}"
            )

    def refuse_other_texts(self, read: Sequence[str], argument: str, words: int) -> None:
        """Refuse a table in which a column that is not read holds texts of so many words."""
        others = [n for n in self.names if n not in read and n not in MARKS and self._holds_text(n, words)]
        if others:
            raise ValueError(
                f"{self.where}: {' and '.join(map(repr, read))} would be read, and {others} hold text as well;"
                f" {_option(argument)} decides; the columns are {self.names}"
            )

    def values(self, name: str) -> Iterable[object]:
        """What the rows have in a column, of those that have it."""
        return (row.values[name] for row in self.rows if name in row.values)

    def _holds_text(self, name: str, words: int) -> bool:
        words = 1 if name in _TEXT_NAMES else words
        values = (row.values.get(name) for row in self.rows)
        return any(
            isinstance(value, str) and len(value.split()) >= words and any(map(str.isalpha, value)) for value in values
        )


def _option(argument: str) -> str:
    return " or ".join(f"{name} (--{name.replace('_', '-')})" for name in argument.split(", "))


def classified(table: Table, wanted: Wanted, usual_labels: Sequence[str] = LABEL_COLUMNS) -> dict[str, str]:
    """A text, or a pair of texts, and a label."""
    texts = tuple(table.need(name, "text_column") for name in wanted.texts)
    label = label_column(table, wanted, usual_labels)
    if not texts:
        usual: list[tuple[str, ...]] = [pair for pair in PAIR_COLUMNS if all(name in table.names for name in pair)]
        usual = usual or [(name,) for name in TEXT_COLUMNS if name in table.names and name != label]
        table.refuse_several(usual, "text_column")
        if not usual:
            raise table.missing(f"a column of {list(TEXT_COLUMNS)}", "text_column")
        texts = usual[0]
        table.refuse_other_texts([*texts, *filter(None, (label, wanted.label))], "text_column", TEXT_WORDS)
    roles = dict(zip(("text", "text_pair"), texts, strict=False))
    return roles if label is None else {**roles, "label": label}


def label_column(table: Table, wanted: Wanted, usual: Sequence[str]) -> str | None:
    """The column of the labels; None where they are not read."""
    if not wanted.labelled:
        return None
    if wanted.label is not None:
        return table.need(wanted.label, "label_column")
    found = table.one_of([name for name in usual if name not in wanted.texts], "label_column")
    if found is None:
        raise table.missing(f"a column of {list(usual)}", "label_column")
    return found


def asked(table: Table, wanted: Wanted) -> dict[str, str]:
    """Questions, contexts and answers."""
    needed = ("question", "context", "answers") if wanted.labelled else ("question", "context")
    for name in needed:
        table.need(name, name)
    return {name: name for name in QUESTION_COLUMNS if name in table.names}


# (the table, what the caller names) -> role of an example: the column that it is in.
Chooser: TypeAlias = Callable[[Table, Wanted], dict[str, str]]
