"""Metrics: accuracy, entity F1, exact match and F1 of answers, perplexity; one way to choose."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptv2_fast.task_types import SINGLE_LABEL, TASKS, TRAINED_TASKS
from ptv2_fast.training.data.tags import Scheme, UnclearTags, scheme_of, stray_insides, to_entities

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Texts that a query's ranking is judged by.
RANKED = 10
# Of all scores that a run may have, those of which less is better.
SMALLER_IS_BETTER = ("loss", "perplexity", "mse")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Metric:
    """How a task is scored: `compute` gives scores by name, `name` is the one to choose by."""

    name: str
    compute: Callable[..., dict[str, float]]
    greater_is_better: bool


def metric_for(task: str, problem_type: str | None = None) -> Metric:
    """The metric of a task.

    SEQ_CLS: accuracy (regression: Pearson's correlation; several labels a row: micro F1); TOKEN_CLS: entity F1;
    QUESTION_ANS: F1; MULTIPLE_CHOICE: accuracy; SENTENCE_RETRIEVAL: MRR@10; CAUSAL_LM: perplexity (smaller is better).
    Every `compute` takes (predictions, references).

    Raises:
        ValueError: the task has no metric.
    """
    if task not in TRAINED_TASKS:
        raise ValueError(f"task: must be one of {sorted(TRAINED_TASKS)}; got {task!r}")
    return METRICS[str(TASKS[task].solving(problem_type or SINGLE_LABEL).metric)]


def _check_lengths(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"predictions: expected as many as references ({len(references)}); got {len(predictions)}")
    if len(references) == 0:
        raise ValueError("references: expected at least one; got none")


def classification_scores(
    predictions: Sequence[Any], references: Sequence[Any], *, positive_label: Any = None
) -> dict[str, float]:
    """`accuracy` and `f1` of single labels, in [0, 1].

    F1 is the mean over the classes that occur, or, with positive_label, of that class alone.
    """
    _check_lengths(predictions, references)
    from sklearn.metrics import accuracy_score, f1_score

    truth, guess = list(references), list(predictions)
    chosen = None if positive_label is None else [positive_label]
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, labels=chosen, average="macro", zero_division=0.0)),
    }


def choice_scores(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """`accuracy` of chosen indices, in [0, 1]."""
    _check_lengths(predictions, references)
    right = (bool(guess == truth) for guess, truth in zip(predictions, references, strict=True))
    return {"accuracy": sum(right) / len(references)}


def entity_scores(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    strict: bool = True,
) -> dict[str, float]:
    """`f1`, `precision` and `recall` of whole entities, and `accuracy` of single tags, in [0, 1].

    An entity counts when its type and both of its ends are right. Strict IOB2: only B-x begins an
    entity, a stray I-x is none. With strict=False a stray I-x begins one, as in the script of the
    CoNLL-2003 task, by which most published numbers are computed. References in which an entity
    begins with I-x are IOB1, and both sides are read in that way. BIOES, BILUO and BMES are scored as
    the entities that they say; tags of no entities, such as parts of speech, by `word_scores`.

    Raises:
        ValueError: not as many sentences, or not as many tags in a sentence.
    Source: seqeval.
    """
    _check_lengths(predictions, references)
    for index, (guessed, true) in enumerate(zip(predictions, references, strict=True)):
        if len(guessed) != len(true):
            raise ValueError(f"predictions[{index}]: expected {len(true)} tags; got {len(guessed)}")
    guess, truth, has_entities = comparable_tags(predictions, references)
    if not has_entities:
        return word_scores(guess, truth)
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    options: dict[str, Any] = {"zero_division": 0}
    if strict and not any(map(stray_insides, truth)):
        options |= {"mode": "strict", "scheme": IOB2}
    return {
        "f1": float(f1_score(truth, guess, **options)),
        "precision": float(precision_score(truth, guess, **options)),
        "recall": float(recall_score(truth, guess, **options)),
        "accuracy": float(accuracy_score(truth, guess)),
    }


def comparable_tags(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[str]], bool]:
    """Predictions and references as IOB1 or IOB2, and whether their tags are of entities; if not, as they are."""
    truth, guess = [list(tags) for tags in references], [list(tags) for tags in predictions]
    scheme = _scheme(truth)
    if scheme.name not in ("BIO", "IOB1", "plain"):
        # seqeval parts entities of these schemes where their letters do not fit; as IOB2 they are whole.
        truth, guess = ([to_entities(tags, scheme)[0] for tags in side] for side in (truth, guess))
    return guess, truth, scheme.name != "plain"


def _scheme(references: Sequence[Sequence[str]]) -> Scheme:
    try:
        return scheme_of(references, few=True)
    except UnclearTags:
        # Of labels that are somebody's own.
        return Scheme("plain", {})


def word_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1`, `precision` and `recall` of words that have another tag than O, and `accuracy` of all, in [0, 1]."""
    pairs = [pair for sides in zip(predictions, references, strict=True) for pair in zip(*sides, strict=True)]
    right = sum(guess == true != "O" for guess, true in pairs)
    guessed, wanted = (sum(pair[side] != "O" for pair in pairs) for side in (0, 1))
    return {
        "f1": 2.0 * right / (guessed + wanted) if guessed + wanted else 0.0,
        "precision": right / guessed if guessed else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "accuracy": sum(guess == true for guess, true in pairs) / len(pairs),
    }


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space (SQuAD's equality)."""
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def answer_f1(prediction: str, reference: str) -> float:
    """F1 of the words that two answers share; an empty answer agrees with an empty one only."""
    guess, truth = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not guess or not truth:
        return float(guess == truth)
    shared = sum((Counter(guess) & Counter(truth)).values())
    return 2.0 * shared / (len(guess) + len(truth))


def answer_scores(
    predictions: Sequence[str | Mapping[str, Any]],
    references: Sequence[Sequence[str] | Mapping[str, Any]],
) -> dict[str, float]:
    """`f1` and `exact_match` of answers, each the best over the references, in percent.

    Args:
        predictions: texts (or the dicts of `decode_answers`); "" means that there is no answer.
        references: for each question its right answers (texts, or the `answers` of an example);
            none means that the question has no answer.

    Source: SQuAD 2.0 (Rajpurkar et al., 2018), evaluation.
    """
    _check_lengths(predictions, references)
    exact = f1 = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        guess = prediction["text"] if isinstance(prediction, Mapping) else prediction
        texts = reference["text"] if isinstance(reference, Mapping) else reference
        # An answer that normalises to nothing ("the") cannot be told from no answer.
        truths = [text for text in texts if normalize_answer(text)] or [""]
        exact += max(float(normalize_answer(guess) == normalize_answer(text)) for text in truths)
        f1 += max(answer_f1(guess, text) for text in truths)
    count = len(references)
    return {"f1": 100.0 * f1 / count, "exact_match": 100.0 * exact / count}


def perplexity(loss_sums: Sequence[float], token_counts: Sequence[int]) -> dict[str, float]:
    """`perplexity` = exp(sum of token losses / tokens) and that mean `loss` in nats.

    Args:
        loss_sums: cross-entropy summed over the predicted tokens of each batch, in nats.
        token_counts: how many tokens each batch predicted.

    Raises:
        ValueError: no tokens, or a count below zero.
    """
    _check_lengths(loss_sums, token_counts)
    tokens = sum(int(count) for count in token_counts)
    if tokens <= 0 or any(count < 0 for count in token_counts):
        raise ValueError(f"token_counts: expected positive counts; got {list(token_counts)}")
    loss = math.fsum(float(value) for value in loss_sums) / tokens
    try:
        value = math.exp(loss)
    except OverflowError:
        value = math.inf
    return {"perplexity": value, "loss": loss}


def number_scores(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """`pearson` and `spearman`, the correlations of numbers and of their ranks, and `mse`, the mean squared error.

    Where all numbers of a side are the same there is no correlation: it counts as 0.
    """
    _check_lengths(predictions, references)
    guess, truth = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    return {
        "pearson": _correlation(guess, truth),
        "spearman": _correlation(_ranks(guess), _ranks(truth)),
        "mse": float(np.mean((guess - truth) ** 2)),
    }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    left, right = left - left.mean(), right - right.mean()
    # Scaled first, so that no square leaves the range of numbers.
    left, right = left / np.abs(left).max(), right / np.abs(right).max()
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks


def label_set_scores(predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]) -> dict[str, float]:
    """`micro_f1` over all decisions and `macro_f1`, the mean over the labels that occur, in [0, 1]."""
    _check_lengths(predictions, references)
    pairs = [(set(guess), set(truth)) for guess, truth in zip(predictions, references, strict=True)]
    right = Counter(label for guess, truth in pairs for label in guess & truth)
    # 2 TP + FP + FN
    all_of = Counter(label for guess, truth in pairs for label in (*guess, *truth))
    if not all_of:
        return {"micro_f1": 0.0, "macro_f1": 0.0}
    return {
        "micro_f1": 2.0 * right.total() / all_of.total(),
        "macro_f1": sum(2.0 * right[label] / count for label, count in all_of.items()) / len(all_of),
    }


def retrieval_scores(predictions: Sequence[Sequence[str]], references: Sequence[Collection[str]]) -> dict[str, float]:
    """`mrr@10`, the mean of 1 / rank of a query's first right text (0 beyond ten), and `accuracy@1`.

    Args:
        predictions: for each query the texts that are ranked, the best first.
        references: for each query the right ones.
    """
    _check_lengths(predictions, references)
    reciprocal = first = 0.0
    for ranked, right in zip(predictions, references, strict=True):
        rank = next((rank for rank, text in enumerate(ranked[:RANKED], start=1) if text in right), None)
        reciprocal += 0.0 if rank is None else 1.0 / rank
        first += rank == 1
    return {f"mrr@{RANKED}": reciprocal / len(references), "accuracy@1": first / len(references)}


# By the names that the tasks' rows say.
METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", classification_scores, True),
    "choice_accuracy": Metric("accuracy", choice_scores, True),
    "pearson": Metric("pearson", number_scores, True),
    "micro_f1": Metric("micro_f1", label_set_scores, True),
    "mrr": Metric(f"mrr@{RANKED}", retrieval_scores, True),
    "entity_f1": Metric("f1", entity_scores, True),
    "answer_f1": Metric("f1", answer_scores, True),
    "perplexity": Metric("perplexity", perplexity, False),
}
