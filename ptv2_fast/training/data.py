"""Data: examples of the tasks from files and datasets, checked one by one.

Examples are plain dicts of plain values:

    SEQ_CLS       {"text", "text_pair" (pairs only), "label"}; for regression "label" is a float, for
                  several labels a row there is "labels", a list: a JSON list, or `a|b` in a cell
    TOKEN_CLS     {"tokens", "tags"}                        tags are IOB2: O, B-x, I-x
    QUESTION_ANS  {"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}
    MULTIPLE_CHOICE {"text", "choices": [...], "label"}     the label is an index; COPA's own fields are read too
    SENTENCE_RETRIEVAL {"query", "positive", "negative" (if the file has them)}; {"text"} without labels
    CAUSAL_LM     {"text"} or {"prompt", "completion"}

Nothing is dropped on the way: a record that cannot be used is an error that names file and line,
columns that are not read are named in one warning, and so are IOB1 tags, which become IOB2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ptv2_fast.task_types import TRAINED_TASKS
from ptv2_fast.training import formats
from ptv2_fast.training.columns import Wanted, choose_columns
from ptv2_fast.training.conll import conll_rows
from ptv2_fast.training.delimited import delimited_rows
from ptv2_fast.training.formats import Row
from ptv2_fast.training.labels import LabelSet as LabelSet
from ptv2_fast.training.tasks import training_task

logger = logging.getLogger(__name__)

TASKS = TRAINED_TASKS


def read_examples(
    path_or_name: str | Path,
    task: str,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    split: str | None = None,
    max_examples: int | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    labelled: bool = True,
    problem_type: str | None = None,
) -> list[dict[str, Any]]:
    """The examples of a file, a folder of `datasets` or a named dataset, all checked.

    The suffix chooses the format: .csv, .tsv, .jsonl, .json, .conll (.iob, .iob2, .bio), .txt; for
    TOKEN_CLS .tsv and .txt are CoNLL too. Anything else is a `datasets` folder or `name[:config]`.
    Columns of a CSV or TSV without a header, and of CoNLL, are named by their numbers, from "1".

    Args:
        path_or_name: the file, folder or dataset.
        task: one of `TASKS`; see the module for their examples.
        text_column: the column with the text (two names: a pair); found by its usual names if None.
        label_column: the column with the label or the tags; found by its usual names if None.
        prompt_column, completion_column: the two of CAUSAL_LM; "prompt" and "completion" if None.
        split: the split of a dataset; may stay None when there is only one.
        max_examples: stop reading after so many.
        labels: the labels of training; a label outside them is refused where it stands.
        labelled: False reads text for prediction: labels, tags, answers and completions are not read.
        problem_type: "regression" or "multi_label_classification" for what else a SEQ_CLS head solves; None is one
            class for each row.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: an argument or a record is not as expected, or it cannot be told which columns are
            meant; the message has file and line, and the argument that decides.
    """
    if task not in TASKS:
        raise ValueError(f"task: must be one of {TASKS}; got {task!r}")
    if max_examples is not None and (not isinstance(max_examples, int) or max_examples < 1):
        raise ValueError(f"max_examples: must be a positive integer or None; got {max_examples!r}")
    if labels is not None and not isinstance(labels, LabelSet):
        labels = LabelSet(tuple(labels))
    texts = (text_column,) if isinstance(text_column, str) else tuple(text_column or ())
    wanted = Wanted(texts, label_column, prompt_column, completion_column, labelled)
    handled = training_task(task, problem_type)
    wanted.check(task, handled.most_texts, handled.options)
    if not labelled:
        wanted = replace(wanted, texts=texts[: handled.unlabelled_texts])
    notes: list[str] = []
    rows = list(islice(_rows(path_or_name, task, split, wanted, notes, handled.headers), max_examples))
    if not rows:
        raise ValueError(f"{path_or_name}, line 1: expected at least one example; found none")
    roles = choose_columns(str(path_or_name), rows, handled.columns, wanted, notes)
    examples = [handled.example(row, roles, labels) for row in rows]
    if handled.check is not None:
        handled.check(path_or_name, examples, notes, labels)
    for note in notes:
        logger.warning("%s", note)
    return examples


def _rows(
    path_or_name: str | Path,
    task: str,
    split: str | None,
    wanted: Wanted,
    notes: list[str],
    headers: Sequence[str],
) -> Iterator[Row]:
    path = Path(path_or_name)
    suffix = path.suffix.lower()
    is_file = path.is_file() or (suffix in formats.FILE_SUFFIXES and not path.is_dir())
    if not is_file:
        yield from formats.dataset_rows(str(path_or_name), split)
        return
    if split is not None:
        raise ValueError(f"split: must be None for a file ({path}); got {split!r}")
    if suffix in formats.JSON_SUFFIXES:
        yield from formats.json_rows(path)
    elif suffix in formats.CONLL_SUFFIXES or (task == "TOKEN_CLS" and suffix in (".tsv", ".txt")):
        if task != "TOKEN_CLS":
            raise ValueError(f"{path}: {suffix} files are for TOKEN_CLS; got the task {task}")
        token_column = next(iter(wanted.texts), None)
        columns = {"token_column": token_column, "tag_column": wanted.label if wanted.labelled else None}
        yield from conll_rows(path, wanted.labelled, **columns, notes=notes)
    elif suffix in formats.TEXT_SUFFIXES:
        yield from formats.text_rows(path)
    elif suffix in formats.DELIMITED_SUFFIXES and task == "TOKEN_CLS":
        raise ValueError(f"{path}: tokens and their tags are read from CoNLL files and JSON; got a table ({suffix})")
    elif suffix in formats.DELIMITED_SUFFIXES:
        options: dict[str, Any] = {"task": task, "headers": headers, "labelled": wanted.labelled, "notes": notes}
        yield from delimited_rows(path, wanted.named, **options)
    else:
        raise ValueError(f"{path}: expected a file with a suffix of {', '.join(formats.FILE_SUFFIXES)}; got {suffix!r}")


def read_rows(
    path_or_name: str | Path, tasks: Sequence[str], *, named: Sequence[str] = (), split: str | None = None
) -> list[Row]:
    """The rows of a file or dataset as they stand, for adapters of several tasks; labels need not be there.

    Formats are those of `read_examples`. A .txt is a text a line, and a .tsv a table, unless all tasks are TOKEN_CLS.

    Args:
        tasks: all that rows are for.
        named: columns that somebody asks for, by which the header of a table is known.
        split: of a dataset.

    Raises:
        FileNotFoundError, ValueError: as `read_examples`.
    """
    headers = [name for task in tasks for name in training_task(task).headers]
    # Tables and texts are no files of tagged words: those come into question where nothing else is read.
    task = next((task for task in tasks if task != "TOKEN_CLS"), "TOKEN_CLS")
    wanted = Wanted(tuple(named), labelled=False)
    notes: list[str] = []
    rows = list(_rows(path_or_name, task, split, wanted, notes, headers))
    if not rows:
        raise ValueError(f"{path_or_name}, line 1: expected at least one example; found none")
    for note in notes:
        logger.warning("%s", note)
    return rows
