"""What this room does for a task: one record of functions each, found by what the task's row says it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.task_types import SINGLE_LABEL, TASKS, TRAINED_TASKS, TaskType
from ptv2_fast.training import columns, decoding, examples, multiple_choice, problems, retrieval, texts, tokens
from ptv2_fast.training.codec import Codec, Loaded
from ptv2_fast.training.decoding import Asked, Outputs, Prediction, Rows
from ptv2_fast.training.formats import Row
from ptv2_fast.training.labels import LabelSet


@dataclass(frozen=True)
class TrainingTask:
    """From a file to predictions.

    Attributes:
        columns: which columns are read, as role -> column.
        example: (row, roles, known labels) -> an example.
        encode: (examples, codec, quiet) -> features.
        shows: what a record has and no other task's has: the prediction, under any of these names.
        typed: (line, where it stands, its number, context) -> an example without labels.
        line: a record -> text for a terminal.
        most_texts: how many columns of texts the caller may name.
        options: the other columns that the caller may name.
        check: (file, examples, notes, known labels): refuses or notes what no example shows alone.
        headers: usual names of columns that are this task's alone, by which the header of a table is known too.
        unlabelled_texts: how many of the named columns of texts are read where labels are not; None means all.
        truth: what of an example is compared with its prediction.
        read: an output -> what decoding needs of each of its rows, on the CPU.
        decode: (rows, features, examples, codec) -> a prediction for each example.
        record: (example, prediction) -> plain values.
        score: (outputs, examples, codec) -> scores and loss, where predictions are not compared with `truth`.
        records: (loaded adapter, examples, what is asked) -> records, where they are not made of predictions.
    """

    columns: columns.Chooser
    example: Callable[[Row, Mapping[str, str], LabelSet | None], dict[str, Any]]
    encode: Callable[[Rows, Codec, bool], list[dict[str, Any]]]
    shows: tuple[str, ...]
    typed: Callable[[str, str, int, str | None], dict[str, Any]]
    line: Callable[[Mapping[str, Any]], str]
    most_texts: int = 1
    options: tuple[str, ...] = ()
    check: Callable[[str | Path, list[dict[str, Any]], list[str], LabelSet | None], None] | None = None
    headers: tuple[str, ...] = ()
    unlabelled_texts: int | None = None
    truth: str = ""
    read: Callable[[Any], list[Any]] | None = None
    decode: Callable[[Sequence[Any], Rows, Rows, Codec], list[Prediction]] | None = None
    record: Callable[[Mapping[str, Any], Prediction], dict[str, Any]] | None = None
    score: Callable[[Outputs, Rows, Codec], dict[str, float]] | None = None
    records: Callable[[Loaded, Rows, Asked], Iterator[dict[str, Any]]] | None = None


def task_row(task_type: str, problem_type: str | None = None) -> TaskType:
    """A task's row, for what its head solves.

    Raises:
        ValueError: training does not serve the task, or no head of it solves that.
    """
    if task_type not in TRAINED_TASKS:
        raise ValueError(f"task_type must be one of {', '.join(TRAINED_TASKS)}; got {task_type!r}")
    return TASKS[task_type].solving(problem_type or SINGLE_LABEL)


def training_task(task_type: str, problem_type: str | None = None) -> TrainingTask:
    """What is done for a task.

    Raises:
        ValueError: as `task_row`.
    """
    return BY_PREDICTION[str(task_row(task_type, problem_type).predicts)]


def _encode_classes(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    return tokens.encode_classification(rows, codec.tokenizer, codec.labels, max_length=codec.max_length, quiet=quiet)


def _encode_tags(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    return tokens.encode_tokens(rows, codec.tokenizer, codec.labels, max_length=codec.max_length, quiet=quiet)


def _encode_questions(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    return tokens.encode_question_answering(
        rows, codec.tokenizer, max_length=codec.max_length, doc_stride=codec.doc_stride
    )


def _encode_texts(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    return tokens.encode_language_model(rows, codec.tokenizer, max_length=codec.max_length, quiet=quiet)


BY_PREDICTION: Mapping[str, TrainingTask] = {
    "class": TrainingTask(
        columns=columns.classified,
        example=examples.class_example,
        encode=_encode_classes,
        shows=("label",),
        typed=texts.typed_text,
        line=texts.class_line,
        most_texts=2,
        options=("label_column",),
        check=examples.check_classes,
        truth="label",
        read=decoding.probabilities,
        decode=decoding.classes,
        record=texts.class_record,
    ),
    "number": TrainingTask(
        columns=problems.number_columns,
        example=problems.number_example,
        encode=problems.encode_numbers,
        shows=("value",),
        typed=texts.typed_text,
        line=problems.number_line,
        most_texts=2,
        options=("label_column",),
        truth="label",
        read=problems.numbers_in,
        decode=problems.numbers,
        record=problems.number_record,
    ),
    "labels": TrainingTask(
        columns=columns.classified,
        example=problems.labels_example,
        encode=problems.encode_label_sets,
        shows=("labels",),
        typed=texts.typed_text,
        line=problems.labels_line,
        most_texts=2,
        options=("label_column",),
        check=problems.check_label_sets,
        truth="labels",
        read=problems.label_probabilities,
        decode=problems.label_sets,
        record=problems.labels_record,
    ),
    "tags": TrainingTask(
        columns=columns.tagged,
        example=examples.tokens_example,
        encode=_encode_tags,
        shows=("tags",),
        typed=texts.typed_sentence,
        line=texts.tags_line,
        options=("label_column",),
        check=examples.check_tags,
        truth="tags",
        read=decoding.best_tags,
        decode=decoding.tags,
        record=texts.tags_record,
    ),
    "answer": TrainingTask(
        columns=columns.asked,
        example=examples.question_example,
        encode=_encode_questions,
        shows=("answer",),
        typed=texts.typed_question,
        line=texts.answer_line,
        most_texts=0,
        check=examples.check_ids,
        truth="answers",
        read=decoding.both_ends,
        decode=decoding.answers,
        record=texts.answer_record,
    ),
    "choice": TrainingTask(
        columns=multiple_choice.choice_columns,
        example=multiple_choice.choice_example,
        encode=multiple_choice.encode_choices,
        shows=("choice",),
        typed=multiple_choice.typed_choice,
        line=multiple_choice.choice_line,
        options=("label_column",),
        check=multiple_choice.check_choices,
        truth="label",
        read=decoding.probabilities,
        decode=multiple_choice.choices,
        record=multiple_choice.choice_record,
        headers=multiple_choice.HEADERS,
    ),
    "text": TrainingTask(
        columns=columns.continued,
        example=examples.language_example,
        encode=_encode_texts,
        shows=("prompt",),
        typed=texts.typed_prompt,
        line=texts.text_line,
        options=("prompt_column", "completion_column"),
        score=decoding.language_scores,
        records=texts.text_records,
    ),
    "embedding": TrainingTask(
        columns=retrieval.pair_columns,
        example=retrieval.pair_example,
        encode=retrieval.encode_pairs,
        shows=("hits", "embedding"),
        typed=texts.typed_text,
        line=retrieval.pair_line,
        most_texts=3,
        headers=retrieval.PARTS,
        unlabelled_texts=1,
        score=retrieval.pair_scores,
        records=retrieval.pair_records,
    ),
}
