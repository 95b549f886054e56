"""The tasks' scores of what Trainer collects: arrays of predictions and labels, padded with -100."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptv2_fast.model import PTuningV2Model
from ptv2_fast.task_types import IGNORED_LABEL, SINGLE_LABEL, TASKS
from ptv2_fast.training.metrics import (
    METRICS,
    choice_scores,
    classification_scores,
    entity_scores,
    label_set_scores,
    number_scores,
)

# What data sets call labels; the first is what models call them.
LABELS = ("labels", "label", "label_ids")
_TAG = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class ArrayMetric:
    """How Trainer scores a task.

    Attributes:
        name: what epochs are compared by.
        compute: an `EvalPrediction` -> scores by name, of rows without any label none; Trainer's `compute_metrics`.
        keep: (logits, labels) -> what is kept of a batch's logits; Trainer's `preprocess_logits_for_metrics`.
    """

    name: str
    compute: Callable[[Any], dict[str, float]]
    greater_is_better: bool = True
    keep: Callable[[Any, Any], Any] | None = None


def problem_of(model: PTuningV2Model, row: Mapping[str, Any] | None = None) -> str:
    """What the head over rows of a model's active adapter solves.

    A base's own head that says nothing solves what its loss takes it for, as transformers has it: one output is a
    number, and lists of floating-point labels are several labels.

    Args:
        row: of the data set, where one can be looked at.
    """
    said = getattr(model.config, "problem_type", None)
    task, heads = TASKS[str(model.task_type)], model.adapters[model.active_adapter].heads
    if said or len(heads) or not (task.has_head and task.solves_others):
        return said or SINGLE_LABEL
    if model.config.num_labels == 1:
        return "regression"
    labels = np.asarray(next((row[name] for name in LABELS if row.get(name) is not None), 0)) if row else np.zeros(0)
    return "multi_label_classification" if labels.ndim and labels.dtype.kind == "f" and labels.size else SINGLE_LABEL


def metric_of(model: PTuningV2Model, problem: str | None = None) -> ArrayMetric | None:
    """The metric of a model's active task; None where the loss is all that is compared.

    Args:
        problem: as `problem_of` gives it; None asks the model alone.
    """
    task = TASKS[str(model.task_type)]
    if task.gives == "span":
        return ArrayMetric("f1", _span_scores)
    if task.in_groups and task.has_head:
        return ArrayMetric("accuracy", _choice_scores)
    if not task.has_head:
        return None
    if task.gives == "token":
        names = dict(model.config.id2label)
        tagged = all(_TAG.fullmatch(str(name)) for name in names.values())
        name = "f1" if tagged else "accuracy"
        return ArrayMetric(name, lambda found: _tag_scores(found, names, tagged), keep=_first_of_argmax)
    problem = problem_of(model) if problem is None else problem
    if task.solves_others and problem != SINGLE_LABEL:
        solved = METRICS[str(TASKS["SEQ_CLS"].solving(problem).metric)]
        scores = _number_scores if problem == "regression" else _label_set_scores
        return ArrayMetric(solved.name, scores)
    return ArrayMetric("accuracy", _class_scores)


def _choice_scores(found: Any) -> dict[str, float]:
    guess, truth = _best_and_true(found)
    return choice_scores(guess, truth) if truth else {}


def _class_scores(found: Any) -> dict[str, float]:
    guess, truth = _best_and_true(found)
    return classification_scores(guess, truth) if truth else {}


def _logits(found: Any) -> np.ndarray:
    """The logits, also where a model gives more than those."""
    logits: np.ndarray = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return logits


def _best_and_true(found: Any) -> tuple[list[int], list[int]]:
    """The best class and the right one of each row that has a label."""
    truth = np.asarray(found.label_ids).reshape(-1)
    kept = truth != IGNORED_LABEL
    return _logits(found).argmax(-1)[kept].tolist(), truth[kept].tolist()


def _first_of_argmax(logits: Any, labels: Any) -> Any:
    """(B, N) the best tags of logits (B, N, C)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _tag_scores(found: Any, names: Mapping[int, str], tagged: bool) -> dict[str, float]:
    """Scores of the tokens that have a label, of each row a sentence."""
    guess, truth = [], []
    best = _logits(found)
    if best.ndim > np.ndim(found.label_ids):  # of a Trainer whose preprocess_logits_for_metrics is somebody's own
        best = best.argmax(-1)
    for tags, labels in zip(best, found.label_ids, strict=True):
        kept = labels != IGNORED_LABEL
        guess.append([names[int(tag)] for tag in tags[kept]])
        truth.append([names[int(label)] for label in labels[kept]])
    if not any(truth):
        return {}
    if tagged:
        return entity_scores(guess, truth)
    return classification_scores([tag for row in guess for tag in row], [tag for row in truth for tag in row])


def _span_scores(found: Any) -> dict[str, float]:
    """`f1` and `exact_match` of the tokens of answers, in percent; the first and last token of an answer count in it.

    A span whose end stands before its start is none. Rows are compared as they are: windows of one context by
    themselves, where an answer that a window lacks is its first token.
    """
    true_starts, true_ends = map(np.asarray, found.label_ids[:2])
    kept = (true_starts != IGNORED_LABEL) & (true_ends != IGNORED_LABEL)
    if not kept.any():
        return {}
    starts, ends = (np.asarray(logits).argmax(-1)[kept] for logits in found.predictions[:2])
    true_starts, true_ends = true_starts[kept], true_ends[kept]
    overlap = np.minimum(ends, true_ends) - np.maximum(starts, true_starts) + 1
    lengths = (ends - starts + 1).clip(min=0) + (true_ends - true_starts + 1)
    f1 = np.where(ends >= starts, 2 * overlap.clip(min=0) / lengths.clip(min=1), 0.0)
    exact = (starts == true_starts) & (ends == true_ends)
    return {"f1": 100.0 * float(f1.mean()), "exact_match": 100.0 * float(exact.mean())}


def _number_scores(found: Any) -> dict[str, float]:
    return number_scores(_logits(found).reshape(-1).tolist(), np.asarray(found.label_ids).reshape(-1).tolist())


def _label_set_scores(found: Any) -> dict[str, float]:
    """A label is predicted where it is more probable than not."""
    guess, truth = _logits(found) > 0, np.asarray(found.label_ids) > 0.5
    return label_set_scores(*([set(np.flatnonzero(row).tolist()) for row in rows] for rows in (guess, truth)))
