"""Predictions and scores of a trained model: one loop over sorted batches for every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.task_types import TRAINED_TASKS
from ptv2_fast.training.batches import length_of
from ptv2_fast.training.decoding import Prediction as Prediction
from ptv2_fast.training.decoding import Rows, loss_of
from ptv2_fast.training.task_data import TaskCodec
from ptv2_fast.training.tasks import training_task


def predict(
    model: nn.Module,
    codec: TaskCodec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    head: str | None = None,
) -> list[Prediction]:
    """Predictions in the order of the examples (SEQ_CLS, TOKEN_CLS, QUESTION_ANS, MULTIPLE_CHOICE).

    Args:
        model: returns logits (or start_logits and end_logits) for the codec's features.
        codec: how examples become features.
        examples: as `read_examples` gives them; they need no labels.
        batch_size: rows of a batch.
        head: which of a model's heads; None where it has a single one.

    Raises:
        ValueError: the task gives no predictions (CAUSAL_LM generates, SENTENCE_RETRIEVAL embeds), or an example is
            unusable.

    Example:
        ```python
        from transformers import BertConfig, BertModel, BertTokenizer

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.data import LabelSet
        from ptv2_fast.training.predict import predict
        from ptv2_fast.training.task_data import TaskCodec

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"opinion": 2}))
        codec = TaskCodec("SEQ_CLS", tokenizer, LabelSet(("bad", "good")))
        (prediction,) = predict(model, codec, [{"text": "fine film"}])
        assert prediction.value in ("bad", "good")
        ```
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
    """The task's scores on labelled examples, and `loss`, the mean over labels: in nats, of numbers the squared error.

    Of SENTENCE_RETRIEVAL it is the mean over the examples, and depends on batch_size: a batch's texts are compared.

    Args:
        model: returns a loss and logits for the codec's features.
        codec: how examples become features.
        examples: labelled ones, as `read_examples` gives them.
        batch_size: rows of a batch.
        head: which of a model's heads; None where it has a single one.
        features: `codec.encode(examples)` where the caller has it at hand.

    Raises:
        ValueError: an example has no label, or is unusable.

    Example:
        ```python
        from transformers import BertConfig, BertModel, BertTokenizer

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.data import LabelSet
        from ptv2_fast.training.predict import evaluate
        from ptv2_fast.training.task_data import TaskCodec

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"opinion": 2}))
        codec = TaskCodec("SEQ_CLS", tokenizer, LabelSet(("bad", "good")))
        scores = evaluate(model, codec, [{"text": "fine film", "label": "good"}])
        assert set(scores) == {"accuracy", "f1", "loss"}
        ```
    """
    features = codec.encode(examples) if features is None else features
    task = codec.task
    if task.score is not None:
        return task.score(_batches(model, codec, features, batch_size, head), examples, codec)
    truth = [_truth(example, task.truth) for example in examples]
    predictions, loss = _predict(model, codec, examples, features, batch_size, head)
    values = [prediction.value for prediction in predictions]
    return {**codec.metric.compute(values, truth), "loss": loss}


def _truth(example: Mapping[str, Any], key: str) -> Any:
    if key not in example:
        raise ValueError(f"examples: expected {key!r} in each example; got {sorted(example)}")
    return example[key]


def _predict(
    model: nn.Module, codec: TaskCodec, examples: Rows, features: Rows, batch_size: int, head: str | None
) -> tuple[list[Prediction], float]:
    task = codec.task
    if task.decode is None or task.read is None:
        served = [name for name in TRAINED_TASKS if training_task(name).decode is not None]
        raise ValueError(f"task_type must be one of {', '.join(served)}; got {codec.task_type!r}")
    rows: list[Any] = [None] * len(features)
    total = count = 0.0
    for indices, batch, output in _batches(model, codec, features, batch_size, head):
        for index, row in zip(indices, task.read(output), strict=True):
            rows[index] = row
        mean, labels = loss_of(output, batch)
        total, count = total + mean * labels, count + labels
    loss = total / count if count else float("nan")
    return task.decode(rows, features, examples, codec), loss


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
    order = sorted(range(len(features)), key=lambda index: -length_of(features[index]))
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
