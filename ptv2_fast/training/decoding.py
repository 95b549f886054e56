"""Outputs as predictions: what is kept of each batch's output, and what the rows of all batches say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ptv2_fast.task_types import IGNORED_LABEL
from ptv2_fast.training.codec import Codec
from ptv2_fast.training.metrics import perplexity
from ptv2_fast.training.tokens import decode_answers, decode_tags

if TYPE_CHECKING:  # tasks are looked up before torch is needed
    from torch import Tensor

Rows: TypeAlias = Sequence[Mapping[str, Any]]
# The indices of a batch's features, the batch, and the model's output.
Outputs: TypeAlias = Iterable[tuple[Sequence[int], Mapping[str, "Tensor"], Any]]


@dataclass(frozen=True)
class Asked:
    """How records are to be made: what some tasks read.

    Attributes:
        batch_size: rows of a batch.
        max_new_tokens: of generated text.
        candidates: texts to rank for each query.
        top: how many of them at most.
    """

    batch_size: int = 32
    max_new_tokens: int = 64
    candidates: Sequence[str] | None = None
    top: int = 10


@dataclass(frozen=True)
class Prediction:
    """What a model says about one example.

    Attributes:
        value: the class (SEQ_CLS; of other problems the number, or the labels), the tag of each word (TOKEN_CLS) or
            the answer (QUESTION_ANS) or the index of the choice (MULTIPLE_CHOICE).
        score: probability of the class or choice, of the least certain tag or label, the answer's logit sum, or the
            number.
        scores: probabilities of all classes or labels by name, of all choices by index, of the tags by their words'
            numbers (a word that was cut off has none); None elsewhere.
        place: the answer's first character in its context, and the one behind it; None where there is no answer.
    """

    value: Any
    score: float
    scores: Mapping[Any, float] | None = None
    place: tuple[int, int] | None = None


def loss_of(output: Any, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """The batch's mean loss and over how many labels it is the mean; (0, 0) without labels."""
    if getattr(output, "loss", None) is None:
        return 0.0, 0
    labels = batch.get("labels")
    if labels is None:
        return float(output.loss), len(batch["start_positions"])
    if labels.is_floating_point():
        return float(output.loss), labels.numel()
    # A language model predicts each token from the ones before it: nothing predicts the first.
    shifts = output.logits.dim() == 3 and output.__class__.__name__.startswith("CausalLM")
    kept = (labels[:, 1:] if shifts else labels) != IGNORED_LABEL
    return float(output.loss), int(kept.sum())


def probabilities(output: Any) -> list[Any]:
    """(C,) of each row, on the CPU."""
    return list(output.logits.float().softmax(-1).cpu())


def best_tags(output: Any) -> list[Any]:
    """Probabilities (N,) and numbers (N,) of each row's best tags, on the CPU."""
    best = output.logits.float().softmax(-1).max(-1)
    return list(zip(best.values.cpu(), best.indices.cpu(), strict=True))


def both_ends(output: Any) -> list[Any]:
    """Logits (N,) of each row's starts and ends, on the CPU."""
    return list(zip(output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True))


def classes(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The most probable class of each row."""
    names = codec.known_labels.names
    return [
        Prediction(names[int(row.argmax())], float(row.max()), dict(zip(names, row.tolist(), strict=True)))
        for row in rows
    ]


def tags(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The tags of each row's words."""
    predictions = []
    for (scores, tag_ids), feature in zip(rows, features, strict=True):
        found = decode_tags(tag_ids.tolist(), feature, codec.known_labels)
        pairs = zip(feature["word_ids"], scores.tolist(), strict=False)  # padding has scores too
        kept = [(word, score) for word, score in pairs if word is not None]
        least = min((score for _, score in kept), default=0.0)
        # Read backwards, a word's first sub-word is the last to be written down.
        predictions.append(Prediction(found, least, dict(reversed(kept))))
    return predictions


def answers(rows: Sequence[Any], features: Rows, examples: Rows, codec: Codec) -> list[Prediction]:
    """The answer of each question, over all windows of its context."""
    starts, ends = [row[0].tolist() for row in rows], [row[1].tolist() for row in rows]
    found = decode_answers(starts, ends, features, examples, codec.tokenizer, no_answer=codec.no_answer)
    return [Prediction(answer["text"], answer["score"], place=answer["place"]) for answer in found]


def language_scores(outputs: Outputs, examples: Rows, codec: Codec) -> dict[str, float]:
    """Perplexity and mean loss of a language model."""
    losses = [loss_of(output, batch) for _, batch, output in outputs]
    return perplexity([mean * count for mean, count in losses], [count for _, count in losses])
