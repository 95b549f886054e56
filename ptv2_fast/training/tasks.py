"""What this room does for a task: one record of functions each, found by what the task's row says it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.training import decoding, multiple_choice, problems, retrieval, texts, tokens
from ptv2_fast.training.codec import Codec, Loaded
from ptv2_fast.training.data.tasks import task_row as task_row
from ptv2_fast.training.decoding import Asked, Outputs, Prediction, Rows


@dataclass(frozen=True)
class TrainingTask:
    """From examples to predictions; what is done before is a `ReadingTask` (`ptv2_fast/training/data/tasks.py`).

    Attributes:
        encode: (examples, codec, quiet) -> features.
        needs: what an example must have: all of the names of one of these.
        shows: what a record has and no other task's has: the prediction, under any of these names.
        typed: (line, where it stands, its number, context) -> an example without labels.
        line: a record -> text for a terminal.
        truth: what of an example is compared with its prediction.
        read: an output -> what decoding needs of each of its rows, on the CPU.
        decode: (rows, features, examples, codec) -> a prediction for each example.
        record: (example, prediction) -> plain values.
        score: (outputs, examples, codec) -> scores and loss, where predictions are not compared with `truth`.
        records: (loaded adapter, examples, what is asked) -> records, where they are not made of predictions.
    """

    encode: Callable[[Rows, Codec, bool], list[dict[str, Any]]]
    needs: tuple[tuple[str, ...], ...]
    shows: tuple[str, ...]
    typed: Callable[[str, str, int, str | None], dict[str, Any]]
    line: Callable[[Mapping[str, Any]], str]
    truth: str = ""
    read: Callable[[Any], list[Any]] | None = None
    decode: Callable[[Sequence[Any], Rows, Rows, Codec], list[Prediction]] | None = None
    record: Callable[[Mapping[str, Any], Prediction], dict[str, Any]] | None = None
    score: Callable[[Outputs, Rows, Codec], dict[str, float]] | None = None
    records: Callable[[Loaded, Rows, Asked], Iterator[dict[str, Any]]] | None = None


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
        encode=_encode_classes,
        needs=(("text",),),
        shows=("label",),
        typed=texts.typed_text,
        line=texts.class_line,
        truth="label",
        read=decoding.probabilities,
        decode=decoding.classes,
        record=texts.class_record,
    ),
    "number": TrainingTask(
        encode=problems.encode_numbers,
        needs=(("text",),),
        shows=("value",),
        typed=texts.typed_text,
        line=problems.number_line,
        truth="label",
        read=problems.numbers_in,
        decode=problems.numbers,
        record=problems.number_record,
    ),
    "labels": TrainingTask(
        encode=problems.encode_label_sets,
        needs=(("text",),),
        shows=("labels",),
        typed=texts.typed_text,
        line=problems.labels_line,
        truth="labels",
        read=problems.label_probabilities,
        decode=problems.label_sets,
        record=problems.labels_record,
    ),
    "tags": TrainingTask(
        encode=_encode_tags,
        needs=(("tokens",),),
        shows=("tags",),
        typed=texts.typed_sentence,
        line=texts.tags_line,
        truth="tags",
        read=decoding.best_tags,
        decode=decoding.tags,
        record=texts.tags_record,
    ),
    "answer": TrainingTask(
        encode=_encode_questions,
        needs=(("question", "context"),),
        shows=("answer",),
        typed=texts.typed_question,
        line=texts.answer_line,
        truth="answers",
        read=decoding.both_ends,
        decode=decoding.answers,
        record=texts.answer_record,
    ),
    "choice": TrainingTask(
        encode=multiple_choice.encode_choices,
        needs=(("text", "choices"),),
        shows=("choice",),
        typed=multiple_choice.typed_choice,
        line=multiple_choice.choice_line,
        truth="label",
        read=decoding.probabilities,
        decode=multiple_choice.choices,
        record=multiple_choice.choice_record,
    ),
    "text": TrainingTask(
        encode=_encode_texts,
        needs=(("text",), ("messages",), ("prompt", "completion")),
        shows=("prompt",),
        typed=texts.typed_prompt,
        line=texts.text_line,
        score=decoding.language_scores,
        records=texts.text_records,
    ),
    "embedding": TrainingTask(
        encode=retrieval.encode_pairs,
        needs=(("text",), *((part,) for part in retrieval.PARTS)),
        shows=("hits", "embedding"),
        typed=texts.typed_text,
        line=retrieval.pair_line,
        score=retrieval.pair_scores,
        records=retrieval.pair_records,
    ),
}
