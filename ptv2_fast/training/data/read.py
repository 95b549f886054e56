"""Files and data sets as examples: recognised, read, checked; what is left out or guessed is said in a warning each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ptv2_fast.task_types import TRAINED_TASKS
from ptv2_fast.training.data.columns import Wanted, choose_columns
from ptv2_fast.training.data.examples import Given
from ptv2_fast.training.data.formats import Reading, chosen_split, splits_in
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.data.tasks import ReadingTask, reading_task
from ptv2_fast.training.labels import LabelSet

logger = logging.getLogger("ptv2_fast.training.data")

TASKS = TRAINED_TASKS


@dataclass(frozen=True)
class Source:
    """What is read, and for which task.

    Attributes:
        place: the file, folder or data set.
        task, problem_type, labelled, format: as in `read_examples`.
    """

    place: str | Path
    task: str
    problem_type: str | None = None
    labelled: bool = True
    format: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.place, str | os.PathLike):
            kind = type(self.place).__name__
            raise ValueError(
                f"path_or_name must be a file, a folder or the name of a data set; got a {kind}: what save_to_disk of a"
                " datasets.Dataset writes is such a folder"
            )

    @property
    def handled(self) -> ReadingTask:
        """How the task's examples are read."""
        return reading_task(self.task, self.problem_type)

    def wanted(
        self,
        texts: str | Sequence[str] | None = None,
        label: str | Sequence[str] | None = None,
        prompt: str | None = None,
        completion: str | None = None,
    ) -> Wanted:
        """The columns that the caller names.

        Raises:
            ValueError: the task has no such column, or two have one name.
        """
        texts = (texts,) if isinstance(texts, str) else tuple(texts or ())
        several = () if isinstance(label, str) else tuple(label or ())
        flags = several if len(several) > 1 else ()
        single = label if isinstance(label, str) else None if flags else next(iter(several), None)
        wanted = Wanted(texts, single, prompt, completion, self.labelled, flags)
        wanted.check(self.task, self.handled.most_texts, self.handled.options)
        return wanted if self.labelled else replace(wanted, texts=texts[: self.handled.unlabelled_texts])

    def check(self, given: Given) -> None:
        """Refuse what is said of labels that the task does not have.

        Raises:
            ValueError: see above.
        """
        said = (("label_names", given.label_names), ("tag_scheme", given.tag_scheme))
        for name, value in said:
            if value and name not in self.handled.options:
                flag = name.replace("_", "-")
                raise ValueError(f"{name} (--{flag}): {self.task} has none; got {value!r}")

    def reading(self, wanted: Wanted) -> Reading:
        """What a format's reader is told."""
        return Reading(self.task, wanted, self.handled.headers, [], self.format)

    def examples(self, rows: list[Row], wanted: Wanted, given: Given, notes: list[str]) -> list[dict[str, Any]]:
        """Rows as examples, checked one by one and together.

        Raises:
            ValueError: as `read_examples`.
        """
        if not rows:
            raise ValueError(f"{self.place}, line 1: expected at least one example; found none")
        roles = choose_columns(str(self.place), rows, self.handled.columns, wanted, notes)
        examples = [self.handled.example(row, roles, given.labels) for row in rows]
        if self.handled.settle is not None:
            self.handled.settle(self.place, rows, examples, given, notes)
        if self.handled.check is not None:
            self.handled.check(self.place, examples, notes, given.labels)
        return examples


def read_examples(
    path_or_name: str | Path,
    task: str,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    split: str | None = None,
    max_examples: int | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    labelled: bool = True,
    problem_type: str | None = None,
    format: str | None = None,
    tag_scheme: str | None = None,
    label_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    r"""The examples of a file, a folder or a named data set, all checked.

    The suffix chooses the format, a `.gz` behind it aside; for TOKEN_CLS .tsv and .txt are CoNLL.
    A folder is what `datasets.save_to_disk` wrote, or holds files of one format; anything else is a `name[:config]`
    that `datasets` loads. Columns of a CSV or TSV without a header, and of CoNLL, are named by their numbers, from "1".

    Args:
        path_or_name: the file, folder or dataset.
        task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, MULTIPLE_CHOICE, SENTENCE_RETRIEVAL or CAUSAL_LM.
        text_column: the column with the text (two names: a pair); found by its usual names if None.
        label_column: the column with the label or the tags; found by its usual names if None. Several are columns of
            0 and 1, one for each label (multi_label_classification).
        prompt_column: of CAUSAL_LM; "prompt" if None.
        completion_column: of CAUSAL_LM; "completion" if None.
        split: the split of a dataset; may stay None when there is only one.
        max_examples: stop reading after so many.
        labels: the labels of training; a label outside them is refused where it stands.
        labelled: False reads text for prediction: labels, tags, answers and completions are not read.
        problem_type: "regression" or "multi_label_classification" for what else a SEQ_CLS head solves; None is one
            class for each row.
        format: "csv", "tsv", "json", "conll", "conllu", "text" or "parquet", where the suffix does not say it.
        tag_scheme: "BIO", "IOB1", "BIOES", "BILUO", "BMES", "BMEWO", "IO" or "plain", where the tags do not say it.
        label_names: what the numbers 0, 1, ... are called, where labels or tags are numbers.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: an argument or a record is not as expected, or it cannot be told which columns are
            meant; the message has file and line, and the argument that decides.

    Example:
        ```python
        from pathlib import Path

        from ptv2_fast.training.data import read_examples

        Path("reviews.csv").write_text("text,label\nA fine film,good\nTwo lost hours,bad\n")
        examples = read_examples("reviews.csv", "SEQ_CLS")
        assert examples[1] == {"text": "Two lost hours", "label": "bad"}
        ```
    """
    if task not in TASKS:
        raise ValueError(f"task: must be one of {TASKS}; got {task!r}")
    if max_examples is not None and (not isinstance(max_examples, int) or max_examples < 1):
        raise ValueError(f"max_examples: must be a positive integer or None; got {max_examples!r}")
    if labels is not None and not isinstance(labels, LabelSet):
        labels = LabelSet(tuple(labels))
    source = Source(path_or_name, task, problem_type, labelled, format)
    wanted = source.wanted(text_column, label_column, prompt_column, completion_column)
    given = Given(labels, tuple(label_names or ()), tag_scheme)
    source.check(given)
    reading = source.reading(wanted)
    found = chosen_split(path_or_name, splits_in(path_or_name, reading), split)
    rows = list(islice(found(), max_examples))
    examples = source.examples(rows, wanted, given, reading.notes)
    for note in reading.notes:
        logger.warning("%s", note)
    return examples


def read_rows(
    path_or_name: str | Path,
    tasks: Sequence[str],
    *,
    named: Sequence[str] = (),
    split: str | None = None,
    format: str | None = None,
) -> list[Row]:
    """The rows of a file or dataset as they stand, for adapters of several tasks; labels need not be there.

    Formats are those of `read_examples`. A .txt is a text a line, and a .tsv a table, unless all tasks are TOKEN_CLS.

    Args:
        tasks: all that rows are for.
        named: columns that somebody asks for, by which the header of a table is known.
        split: of a folder or a data set.
        format: of a file, where its suffix does not say it.

    Raises:
        FileNotFoundError, ValueError: as `read_examples`.
    """
    headers = [name for task in tasks for name in reading_task(task).headers]
    # Tables and texts are no files of tagged words: those come into question where nothing else is read.
    task = next((task for task in tasks if task != "TOKEN_CLS"), "TOKEN_CLS")
    wanted = Wanted(tuple(named), labelled=False)
    reading = Reading(task, wanted, tuple(headers), [], format)
    rows = list(chosen_split(path_or_name, splits_in(path_or_name, reading), split)())
    if not rows:
        raise ValueError(f"{path_or_name}, line 1: expected at least one example; found none")
    for note in reading.notes:
        logger.warning("%s", note)
    return rows
