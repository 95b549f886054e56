"""What reading does for a task: one record of functions each, found by what the task's row says it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.task_types import SINGLE_LABEL, TASKS, TRAINED_TASKS, TaskType
from ptv2_fast.training.data import choices, columns, examples, language, pairs, problems, tagged
from ptv2_fast.training.data.examples import Given
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet


@dataclass(frozen=True)
class ReadingTask:
    """From rows to examples.

    Attributes:
        columns: which columns are read, as role -> column.
        example: (row, roles, known labels) -> an example.
        most_texts: how many columns of texts the caller may name.
        options: the other columns that the caller may name.
        settle: (file, rows, examples, what the caller says of labels, notes): brings the labels of all examples of a
            file to one form, in place.
        check: (file, examples, notes, known labels): refuses or notes what no example shows alone.
        headers: usual names of columns that are this task's alone, by which the header of a table is known too.
        unlabelled_texts: how many of the named columns of texts are read where labels are not; None means all.
    """

    columns: columns.Chooser
    example: Callable[[Row, Mapping[str, str], LabelSet | None], dict[str, Any]]
    most_texts: int = 1
    options: tuple[str, ...] = ()
    settle: Callable[[str | Path, Sequence[Row], list[dict[str, Any]], Given, list[str]], None] | None = None
    check: Callable[[str | Path, list[dict[str, Any]], list[str], LabelSet | None], None] | None = None
    headers: tuple[str, ...] = ()
    unlabelled_texts: int | None = None


def task_row(task_type: str, problem_type: str | None = None) -> TaskType:
    """A task's row, for what its head solves.

    Raises:
        ValueError: training does not serve the task, or no head of it solves that.
    """
    if task_type not in TRAINED_TASKS:
        raise ValueError(f"task_type must be one of {', '.join(TRAINED_TASKS)}; got {task_type!r}")
    return TASKS[task_type].solving(problem_type or SINGLE_LABEL)


def reading_task(task_type: str, problem_type: str | None = None) -> ReadingTask:
    """How a task's examples are read.

    Raises:
        ValueError: as `task_row`.
    """
    return _BY_PREDICTION[str(task_row(task_type, problem_type).predicts)]


_BY_PREDICTION: Mapping[str, ReadingTask] = {
    "class": ReadingTask(
        columns=columns.classified,
        example=examples.class_example,
        most_texts=2,
        options=("label_column", "label_names"),
        settle=examples.settle_classes,
        check=examples.check_classes,
    ),
    "number": ReadingTask(
        columns=problems.number_columns,
        example=problems.number_example,
        most_texts=2,
        options=("label_column",),
    ),
    "labels": ReadingTask(
        columns=problems.label_set_columns,
        example=problems.labels_example,
        most_texts=2,
        options=("label_column", "label_columns"),
        check=problems.check_label_sets,
    ),
    "tags": ReadingTask(
        columns=tagged.tagged,
        example=tagged.tokens_example,
        options=("label_column", "label_names", "tag_scheme"),
        settle=tagged.settle_tags,
    ),
    "answer": ReadingTask(
        columns=columns.asked,
        example=examples.question_example,
        most_texts=0,
        check=examples.check_ids,
    ),
    "choice": ReadingTask(
        columns=choices.choice_columns,
        example=choices.choice_example,
        options=("label_column",),
        check=choices.check_choices,
        headers=choices.HEADERS,
    ),
    "text": ReadingTask(
        columns=language.continued,
        example=language.language_example,
        options=("prompt_column", "completion_column"),
        headers=language.HEADERS,
    ),
    "embedding": ReadingTask(
        columns=pairs.pair_columns,
        example=pairs.pair_example,
        most_texts=3,
        headers=pairs.PARTS,
        unlabelled_texts=1,
    ),
}
