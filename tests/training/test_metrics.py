"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from ptv2_fast.training.metrics import (
    answer_f1,
    answer_scores,
    classification_scores,
    entity_scores,
    metric_for,
    normalize_answer,
    perplexity,
)


@pytest.mark.parametrize(
    ("task", "name", "greater", "predictions", "references", "value"),
    [
        ("SEQ_CLS", "accuracy", True, ["a", "b"], ["a", "a"], 0.5),
        ("TOKEN_CLS", "f1", True, [["B-x", "O"]], [["B-x", "B-x"]], 2 / 3),
        ("QUESTION_ANS", "f1", True, ["red car"], [["car"]], 100 * 2 / 3),
        ("CAUSAL_LM", "perplexity", False, [2.0, 4.0], [1, 2], math.exp(2.0)),
    ],
)
def test_metric_of_each_task(task, name, greater, predictions, references, value):
    if task == "TOKEN_CLS":
        pytest.importorskip("seqeval")
    metric = metric_for(task)
    assert (metric.name, metric.greater_is_better) == (name, greater)
    assert metric.compute(predictions, references)[metric.name] == pytest.approx(value)


def test_unknown_task():
    with pytest.raises(ValueError, match="'CAUSAL_LM'.*got 'FEATURE_EXTRACTION'"):
        metric_for("FEATURE_EXTRACTION")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
def test_lengths_must_agree(task):
    compute = metric_for(task).compute
    with pytest.raises(ValueError, match=r"references \(2\); got 1"):
        compute(["x"], ["x", "y"])
    with pytest.raises(ValueError, match="at least one"):
        compute([], [])


def test_classification():
    guess, truth = [1, 1, 0, 1], [1, 0, 0, 1]
    scores = classification_scores(guess, truth)
    # Class 1: precision 2/3, recall 1; class 0: precision 1, recall 1/2.
    assert scores == pytest.approx({"accuracy": 0.75, "f1": (0.8 + 2 / 3) / 2})
    assert classification_scores(guess, truth, positive_label=1)["f1"] == pytest.approx(0.8)
    assert classification_scores(["a"], ["b"]) == {"accuracy": 0.0, "f1": 0.0}


class TestEntities:
    @pytest.fixture(autouse=True)
    def _needs_seqeval(self):
        pytest.importorskip("seqeval")

    def test_whole_entities_count(self):
        truth = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-ORG"]]
        # One right, one too short, one of the wrong type.
        guess = [["B-PER", "O", "O"], ["B-LOC", "O", "B-LOC"]]
        scores = entity_scores(guess, truth)
        assert scores == pytest.approx({"f1": 1 / 3, "precision": 1 / 3, "recall": 1 / 3, "accuracy": 4 / 6})

    def test_stray_inside_tags(self):
        truth, guess = [["O", "B-PER"]], [["O", "I-PER"]]
        assert entity_scores(guess, truth)["f1"] == 0.0
        assert entity_scores(guess, truth, strict=False)["f1"] == 1.0

    def test_iob1_references_are_read_as_such(self):
        truth = [["I-PER", "I-PER", "O", "I-LOC", "O"]]
        assert entity_scores(truth, truth)["f1"] == 1.0
        assert entity_scores([["B-PER", "I-PER", "O", "B-LOC", "O"]], truth)["f1"] == 1.0
        # One of four found: precision 1, recall 1/4; "B-LOC" alone begins with a B in IOB1.
        truth = [["I-PER", "O", "I-ORG", "O", "I-LOC", "B-LOC"]]
        guess = [["O", "O", "O", "O", "O", "B-LOC"]]
        assert entity_scores(guess, truth)["f1"] == pytest.approx(0.4)
        assert entity_scores([["O"] * 6], truth)["f1"] == 0.0

    def test_a_sentence_of_iob1_among_others(self):
        truth, guess = [["B-PER", "O"], ["I-LOC", "O"]], [["B-PER", "O"], ["O", "O"]]
        assert entity_scores(truth, truth)["f1"] == 1.0
        assert entity_scores(guess, truth)["recall"] == 0.5

    def test_neighbours_of_one_type_are_two(self):
        truth, guess = [["B-PER", "B-PER"]], [["B-PER", "I-PER"]]
        assert entity_scores(guess, truth)["f1"] == 0.0
        assert entity_scores(truth, truth)["f1"] == 1.0

    def test_no_entity_at_all(self):
        assert entity_scores([["O"]], [["O"]])["f1"] == 0.0

    def test_unequal_sentence(self):
        with pytest.raises(ValueError, match=r"predictions\[1\]: expected 2 tags; got 1"):
            entity_scores([["O"], ["O"]], [["O"], ["O", "O"]])


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("The  Cat!", "cat"),
            ("an apple, a day", "apple day"),
            ("Theory of anarchy", "theory of anarchy"),
            ("U.S.", "us"),
            ("the", ""),
        ],
    )
    def test_normalisation(self, text, normal):
        assert normalize_answer(text) == normal

    @pytest.mark.parametrize(
        ("guess", "truth", "value"),
        [
            ("red red car", "red car", 0.8),
            ("the car", "Car.", 1.0),
            ("boat", "car", 0.0),
            ("", "car", 0.0),
            ("car", "", 0.0),
            ("", "", 1.0),
        ],
    )
    def test_f1_of_words(self, guess, truth, value):
        assert answer_f1(guess, truth) == pytest.approx(value)

    def test_best_reference_and_no_answer(self):
        predictions = ["red car", "", "boat", {"text": "the Seine", "score": 1.0}]
        references = [["car", "Red car!"], [], {"text": [], "answer_start": []}, {"text": ["seine"]}]
        assert answer_scores(predictions, references) == {"f1": 75.0, "exact_match": 75.0}

    def test_reference_of_an_article_is_no_reason_for_an_empty_answer(self):
        assert answer_scores([""], [["the", "car"]])["exact_match"] == 0.0
        assert answer_scores([""], [["the"]])["exact_match"] == 100.0


class TestPerplexity:
    def test_weighs_by_tokens(self):
        scores = perplexity([10.0, 2.0], [2, 4])
        assert scores == pytest.approx({"perplexity": math.exp(2.0), "loss": 2.0})

    def test_overflow_is_infinite(self):
        assert perplexity([1e6], [1])["perplexity"] == math.inf

    @pytest.mark.parametrize("counts", [[0], [-1]])
    def test_counts(self, counts):
        with pytest.raises(ValueError, match="token_counts"):
            perplexity([1.0], counts)
