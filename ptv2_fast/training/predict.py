"""Predictions and scores of a trained model: one loop over sorted batches for every task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ptv2_fast.training.batches import IGNORED_LABEL
from ptv2_fast.training.metrics import metric_for, perplexity
from ptv2_fast.training.task_data import TaskCodec
from ptv2_fast.training.tokens import decode_answers, decode_tags

Rows: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prediction:
    """What a model says about one example.

    Attributes:
        value: the class (SEQ_CLS), the tag of each word (TOKEN_CLS) or the answer (QUESTION_ANS).
        score: probability of the class, of the least certain tag, or the answer's logit sum.
    """

    value: Any
    score: float


def predict(
    model: nn.Module,
    codec: TaskCodec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    head: str | None = None,
) -> list[Prediction]:
    """Predictions in the order of the examples (SEQ_CLS, TOKEN_CLS, QUESTION_ANS).

    Args:
        model: returns logits (or start_logits and end_logits) for the codec's features.
        codec: how examples become features.
        batch_size: rows of a batch.
        head: which of a model's heads; None where it has a single one.

    Raises:
        ValueError: the task gives no predictions (CAUSAL_LM generates), or an example is unusable.
    """
    return _predict(model, codec, examples, codec.encode(examples), batch_size, head)[0]


def evaluate(
    model: nn.Module,
    codec: TaskCodec,
    examples: Sequence[Mapping[str, Any]],
    *,
    features: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    head: str | None = None,
) -> dict[str, float]:
    """The task's scores on labelled examples, and `loss`, the mean over labels in nats.

    Args:
        features: `codec.encode(examples)` where the caller has it at hand.

    Raises:
        ValueError: an example has no label, or is unusable.
    """
    features = codec.encode(examples) if features is None else features
    if codec.task_type == "CAUSAL_LM":
        losses = [_loss(output, batch) for _, batch, output in _batches(model, codec, features, batch_size, head)]
        return perplexity([mean * count for mean, count in losses], [count for _, count in losses])
    truth = [_truth(example, codec.task_type) for example in examples]
    predictions, loss = _predict(model, codec, examples, features, batch_size, head)
    values = [prediction.value for prediction in predictions]
    return {**metric_for(codec.task_type).compute(values, truth), "loss": loss}


def _truth(example: Mapping[str, Any], task_type: str) -> Any:
    key = {"SEQ_CLS": "label", "TOKEN_CLS": "tags", "QUESTION_ANS": "answers"}[task_type]
    if key not in example:
        raise ValueError(f"examples: expected {key!r} in each example; got {sorted(example)}")
    return example[key]


def _predict(
    model: nn.Module, codec: TaskCodec, examples: Rows, features: Rows, batch_size: int, head: str | None
) -> tuple[list[Prediction], float]:
    decoders: dict[str, Callable[..., list[Prediction]]] = {
        "SEQ_CLS": _classes,
        "TOKEN_CLS": _tags,
        "QUESTION_ANS": _answers,
    }
    if codec.task_type not in decoders:
        raise ValueError(f"task_type must be one of {', '.join(decoders)}; got {codec.task_type!r}")
    rows: list[Any] = [None] * len(features)
    total = count = 0.0
    for indices, batch, output in _batches(model, codec, features, batch_size, head):
        for index, row in zip(indices, _rows(output, codec.task_type), strict=True):
            rows[index] = row
        mean, labels = _loss(output, batch)
        total, count = total + mean * labels, count + labels
    loss = total / count if count else float("nan")
    return decoders[codec.task_type](rows, features, examples, codec), loss


@torch.no_grad()
def _batches(
    model: nn.Module,
    codec: TaskCodec,
    features: Sequence[Mapping[str, Any]],
    batch_size: int,
    head: str | None,
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """(indices, inputs, output) of each batch, longest rows first so that little is padded."""
    device = next(model.parameters()).device
    options = {} if head is None else {"task": head}
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = codec.collator([features[index] for index in indices])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            yield indices, batch, model(**batch, **options)
    finally:
        model.train(was_training)


def _loss(output: Any, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """The batch's mean loss and over how many labels it is the mean; (0, 0) without labels."""
    if getattr(output, "loss", None) is None:
        return 0.0, 0
    labels = batch.get("labels")
    if labels is None:
        return float(output.loss), len(batch["start_positions"])
    # A language model predicts each token from the ones before it: nothing predicts the first.
    shifts = output.logits.dim() == 3 and output.__class__.__name__.startswith("CausalLM")
    kept = (labels[:, 1:] if shifts else labels) != IGNORED_LABEL
    return float(output.loss), int(kept.sum())


def _rows(output: Any, task_type: str) -> list[Any]:
    """What decoding needs of each row, on the CPU: probabilities, best tags, or the two ends' logits."""
    if task_type == "QUESTION_ANS":
        return list(zip(output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True))
    probabilities = output.logits.float().softmax(-1)
    if task_type == "SEQ_CLS":
        return list(probabilities.cpu())
    best = probabilities.max(-1)
    return list(zip(best.values.cpu(), best.indices.cpu(), strict=True))


def _classes(rows: Sequence[Any], features: Rows, examples: Rows, codec: TaskCodec) -> list[Prediction]:
    best = [(float(row.max()), int(row.argmax())) for row in rows]
    return [Prediction(codec.known_labels.to_name(index), score) for score, index in best]


def _tags(rows: Sequence[Any], features: Rows, examples: Rows, codec: TaskCodec) -> list[Prediction]:
    predictions = []
    for (scores, tag_ids), feature in zip(rows, features, strict=True):
        tags = decode_tags(tag_ids.tolist(), feature, codec.known_labels)
        words = [word is not None for word in feature["word_ids"]]
        kept = scores[: len(words)][torch.tensor(words, dtype=torch.bool)]
        predictions.append(Prediction(tags, float(kept.min()) if len(kept) else 0.0))
    return predictions


def _answers(rows: Sequence[Any], features: Rows, examples: Rows, codec: TaskCodec) -> list[Prediction]:
    starts, ends = [row[0].tolist() for row in rows], [row[1].tolist() for row in rows]
    answers = decode_answers(starts, ends, features, examples, codec.tokenizer, no_answer=codec.no_answer)
    return [Prediction(answer["text"], answer["score"]) for answer in answers]
