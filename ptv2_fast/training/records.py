"""Predictions as records: from text that people type to dictionaries of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptv2_fast.training.data.examples import check_text
from ptv2_fast.training.data.tasks import reading_task
from ptv2_fast.training.data.words import words_of as words_of
from ptv2_fast.training.decoding import Asked
from ptv2_fast.training.loading import LoadedAdapter
from ptv2_fast.training.predict import predict
from ptv2_fast.training.tasks import BY_PREDICTION, training_task
from ptv2_fast.training.texts import entities_of as entities_of


def examples_of(
    lines: Iterable[str], task_type: str, *, where: str = "text", context: str | None = None
) -> list[dict[str, Any]]:
    """Unlabelled examples from lines of text, blank ones left out.

    A line is a text (SEQ_CLS), a sentence (TOKEN_CLS), a prompt (CAUSAL_LM), or a question about
    `context` (QUESTION_ANS); without a context it is a JSON object with "question" and "context", and with "text" and
    "choices" in any case (MULTIPLE_CHOICE).

    Raises:
        ValueError: there is no line with text, a line is not such an object, or the lines do not go together.
    """
    task = training_task(task_type)
    examples: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{where}, line {number}"
            examples.append(task.typed(check_text(place, line), place, number, context))
    if not examples:
        raise ValueError(f"{where}: expected at least one line with text; got none")
    check = reading_task(task_type).check
    if check is not None:
        check(where, examples, [], None)
    return examples


def records_of(
    loaded: LoadedAdapter,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    candidates: Sequence[str] | None = None,
    top: int = 10,
) -> Iterator[dict[str, Any]]:
    """One record for each example, in order.

    SEQ_CLS {"text", "label", "score"}, of other problems {"text", "value"} or {"text", "labels", "scores"};
    TOKEN_CLS {"tokens", "tags", "entities"}; QUESTION_ANS {"question", "answer", "score"};
    MULTIPLE_CHOICE {"text", "choices", "choice", "index", "score", "scores"}; CAUSAL_LM {"prompt", "text"}, continued
    greedily; SENTENCE_RETRIEVAL {"text", "embedding"}, or {"query", "hits"} with the `top` of the candidates.
    """
    task = loaded.codec.task
    if task.record is None:
        assert task.records is not None
        yield from task.records(loaded, examples, Asked(batch_size, max_new_tokens, candidates, top))
        return
    found = predict(loaded.model, loaded.codec, examples, batch_size=batch_size, head=loaded.head)
    for example, prediction in zip(examples, found, strict=True):
        yield task.record(example, prediction)


def line_of(record: Mapping[str, Any]) -> str:
    """A record as text for a terminal: columns, or one `token<TAB>tag` a line and a blank line."""
    task = next(task for task in BY_PREDICTION.values() if any(key in record for key in task.shows))
    return task.line(record)
