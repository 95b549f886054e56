"""Guesses: what a file is most likely for, by its format and its columns, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.task_types import TRAINED_TASKS
from ptv2_fast.training.data.columns import LABEL_COLUMNS, TAG_COLUMNS, Table, Wanted
from ptv2_fast.training.data.examples import MISSING
from ptv2_fast.training.data.folders import file_parts, saved_parts
from ptv2_fast.training.data.formats import FORMATS, Reading, chosen_split, is_conll, splits_in
from ptv2_fast.training.data.read import Source
from ptv2_fast.training.data.rows import Row, lines_of, read_text, suffix_of
from ptv2_fast.training.data.spans import SPAN_COLUMNS
from ptv2_fast.training.data.tags import look_like_iob
from ptv2_fast.training.data.tasks import reading_task, task_row

# What tasks predict: the more their columns say, the earlier they are tried.
_SAYING_MOST = ("tags", "answer", "choice", "embedding", "class", "text")
_ORDER = sorted(TRAINED_TASKS, key=lambda task: _SAYING_MOST.index(str(task_row(task).predicts)))
_LINES = 200  # looked at in a file that may be of tagged words


@dataclass(frozen=True)
class Guess:
    """A task, what its head would solve, why, and which other tasks could read the same columns."""

    task: str
    problem_type: str | None
    because: str
    others: tuple[str, ...] = ()


def guess_task(
    place: str | Path, named: dict[str, Any], *, split: str | None = None, format: str | None = None
) -> Guess:
    """What a file, a folder or a data set is most likely for.

    Args:
        named: the columns that the caller names, as arguments of `Source.wanted`.
        split: which one to look at, where there are several; None looks at the first.
        format: of a file, where its suffix does not say it.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: no task has such columns; the message has what each lacks.
    """
    file = _first_file(Path(place))
    if is_conll(str(file), format) or (format is None and _is_tagged(file)):
        return Guess("TOKEN_CLS", None, "a token a line with its tag")
    rows = _rows(place, named, split, format)
    failed: dict[str, str] = {}
    fitting: dict[str, tuple[str | None, dict[str, str]]] = {}
    for task in _ORDER:
        for problem in (None, "multi_label_classification", "regression") if task == "SEQ_CLS" else (None,):
            try:
                wanted = Source(place, task, problem, True, format).wanted(**named)
                roles = reading_task(task, problem).columns(Table(rows), wanted)
            except ValueError as error:
                failed.setdefault(task, str(error))
                continue
            unread = _unread_labels(rows, roles) if task == "CAUSAL_LM" else None
            if unread is not None:
                failed.setdefault(task, f"{unread!r} holds lists or objects, which look like labels of a text")
                continue
            fitting.setdefault(task, (problem, roles))
    if not fitting:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in failed.items())
        raise ValueError(f"{place}: no task reads these columns; --task says which one is meant. {reasons}")
    task = next(iter(fitting))
    if task == "SEQ_CLS" and "CAUSAL_LM" in fitting and {"messages", "instruction"} & set(fitting["CAUSAL_LM"][1]):
        task = "CAUSAL_LM"
    problem, roles = fitting[task]
    if task == "SEQ_CLS" and problem is None:
        problem = _problem(rows, roles["label"])
    because = "the columns " + ", ".join(dict.fromkeys(map(repr, roles.values())))
    return Guess(task, problem, because, tuple(name for name in fitting if name != task))


def _unread_labels(rows: Sequence[Row], roles: Mapping[str, str]) -> str | None:
    """A column of a usual name for labels, with lists or objects in it that nobody would read beside a bare text."""
    if list(roles) != ["text"]:
        return None
    usual = dict.fromkeys((*SPAN_COLUMNS, *LABEL_COLUMNS, *TAG_COLUMNS, "cats"))
    return next((name for name in usual if any(_is_full(row.values.get(name)) for row in rows)), None)


def _is_full(value: Any) -> bool:
    return isinstance(value, list | dict) and bool(value)


def _first_file(place: Path) -> Path:
    """A file itself, the first data file of a folder of such, else what it is."""
    if not place.is_dir() or saved_parts(place) is not None:
        return place
    suffixes = [suffix for kind in FORMATS.values() for suffix in kind.suffixes]
    return next(iter(file_parts(place, suffixes).values()))[0]


def _rows(place: str | Path, named: dict[str, Any], split: str | None, format: str | None) -> list[Row]:
    texts, label = named.get("texts") or (), named.get("label")
    labels = (label,) if isinstance(label, str) else tuple(label or ())
    every = (*texts, *labels, named.get("prompt"), named.get("completion"))
    wanted = Wanted(tuple(name for name in every if name is not None))
    headers = tuple(name for task in TRAINED_TASKS for name in reading_task(task).headers)
    splits = splits_in(place, Reading("SEQ_CLS", wanted, headers, [], format))
    first = next(iter(splits)) if split is None else split
    rows = list(chosen_split(place, splits, first)())
    if not rows:
        raise ValueError(f"{place}, line 1: expected at least one example; found none")
    return rows


def _is_tagged(path: Path) -> bool:
    """Whether a `.txt` or `.tsv` has a word and its IOB tag in each of its first lines."""
    if not path.is_file() or suffix_of(path) not in (".txt", ".tsv"):
        return False
    lines = [line.split() for _, line in lines_of(path, read_text(path))][:_LINES]
    words = [cells for cells in lines if cells and cells[0] != "-DOCSTART-" and not cells[0].startswith("#")]
    tags = {cells[-1] for cells in words if len(cells) > 1}
    return all(len(cells) > 1 for cells in words) and look_like_iob(tags)


def _problem(rows: Sequence[Row], column: str) -> str | None:
    """What a head would solve whose labels are the values of a column."""
    values = [row.values.get(column) for row in rows]
    values = [value for value in values if str(value).strip().lower() not in ("", "none", *MISSING)]
    lists = [len(value) for value in values if isinstance(value, list)]
    if any(count != 1 for count in lists) or any(isinstance(value, str) and "|" in value for value in values):
        return "multi_label_classification"
    numbers = [_number(value) for value in values]
    whole = [number is not None and number.is_integer() for number in numbers]
    return "regression" if None not in numbers and values and not all(whole) else None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
