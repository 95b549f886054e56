"""A run's predictions for labelled rows: its own development data, or data that is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.report.run import Run
from ptv2_fast.training.decoding import Prediction
from ptv2_fast.training.flags import COLUMNS, source_of
from ptv2_fast.training.loading import LoadedAdapter
from ptv2_fast.training.predict import evaluate, predict


@dataclass(frozen=True)
class Judged:
    """What a model says about rows whose answers are known.

    Attributes:
        source: where the rows come from, for people.
        kind: what the task predicts, as its row says it.
        examples: the rows.
        predictions: one for each row; None where the task has none that are compared (language models, retrieval).
        scores: the task's scores over the rows.
        labels: the names of the classes, labels or tags, in the order of the outputs; empty for other tasks.
    """

    source: str
    kind: str
    examples: Sequence[Mapping[str, Any]]
    predictions: Sequence[Prediction] | None
    scores: Mapping[str, float]
    labels: tuple[str, ...] = ()


def judge(loaded: LoadedAdapter, run: Run, data: str | None, *, batch_size: int = 32) -> Judged | str:
    """Predictions and scores, or a sentence that says why there are none.

    Args:
        data: a file or a `datasets` name; None means the run's own development data.

    Raises:
        OSError, ValueError: `data` is given and cannot be read, or does not fit the task.
    """
    if data is None:
        if run.dev is None:
            return "The run had no development data, so no rows are judged here; --data names some."
        try:
            source = source_of(str(run.dev.get("path")), {"split": run.dev.get("split")}, _columns(run.dev))
            return _judged(loaded, source, str(run.dev.get("path")), batch_size)
        except (OSError, ValueError) as error:
            return f"The run's development data cannot be read, so no rows are judged here: {error}"
    return _judged(loaded, source_of(data, {}, loaded.columns), data, batch_size)


def _columns(source: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a source as settings have written them."""
    given = {name: source.get(name) for name in COLUMNS if source.get(name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _judged(loaded: LoadedAdapter, source: Any, where: str, batch_size: int) -> Judged:
    codec, head = loaded.codec, loaded.head
    examples = loaded.read(source)
    loaded.check_parts(where, examples)
    names = () if codec.labels is None else codec.labels.names
    kind = str(codec.row.predicts)
    if codec.task.decode is None:
        scores = evaluate(loaded.model, codec, examples, batch_size=batch_size, head=head)
        return Judged(where, kind, examples, None, scores, names)
    predictions = predict(loaded.model, codec, examples, batch_size=batch_size, head=head)
    truth = [example[codec.task.truth] for example in examples]
    scores = codec.metric.compute([prediction.value for prediction in predictions], truth)
    return Judged(where, kind, examples, predictions, scores, names)
