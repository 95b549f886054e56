"""Predictions as records: dictionaries of plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptv2_fast.training.data.words import words_of as words_of
from ptv2_fast.training.decoding import Asked
from ptv2_fast.training.lines import line_of as line_of
from ptv2_fast.training.loading import LoadedAdapter
from ptv2_fast.training.predict import predict
from ptv2_fast.training.texts import entities_of as entities_of
from ptv2_fast.training.typed import examples_of as examples_of


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

    SEQ_CLS {"text", "label", "score", "scores"}, of other problems {"text", "value"} or {"text", "labels", "scores"};
    TOKEN_CLS {"text", "tokens", "tags", "entities": [{"text", "label", "start", "end", "score"}, ...]}, in characters;
    QUESTION_ANS {"question", "answer", "start", "end", "score"};
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
