"""What the sections compute, against small cases that can be counted by hand and against other programs."""

from __future__ import annotations

import random

import pytest
import torch

from ptv2_fast.report.asked import _names
from ptv2_fast.report.calibration import bins_of, expected_error
from ptv2_fast.report.classes import MOST_CLASSES, OTHERS, _confusion_table, confusion, quality
from ptv2_fast.report.compare import told_apart
from ptv2_fast.report.html import clipped, el, number
from ptv2_fast.report.judged import Judged
from ptv2_fast.report.prompts import nearest
from ptv2_fast.report.svg import labels, ticks
from ptv2_fast.report.tags import Error, Span, errors_of, spans_of, tag_body
from ptv2_fast.training.decoding import Prediction
from ptv2_fast.training.metrics import entity_scores


def test_calibration_error_is_the_mean_gap_of_the_bins():
    bins = bins_of([0.95, 0.91, 0.62, 0.7, 0.0], [True, False, True, True, False])
    # 0.7 is the upper end of its bin; nothing is lost at 0.
    assert [(one.low, one.count) for one in bins] == [(0.0, 1), (0.6, 2), (0.9, 2)]
    assert [one.accuracy for one in bins] == [0.0, 1.0, 0.5]
    assert expected_error(bins) == pytest.approx((0 + 2 * (1 - 0.66) + 2 * (0.93 - 0.5)) / 5)


def test_confusion_counts_true_rows_and_predicted_columns():
    assert confusion(["a", "a", "b"], ["b", "a", "b"], ["a", "b", "c"]) == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    one = quality(right=1, guessed=2, true=4)
    assert (one.precision, one.recall, one.f1, one.support) == (0.5, 0.25, pytest.approx(1 / 3), 4)
    assert quality(0, 0, 0).f1 == 0.0


def test_rare_classes_are_one_that_is_never_called_right():
    names = [f"c{index}" for index in range(MOST_CLASSES + 2)]
    truth = [*names, *names[: MOST_CLASSES - 1]]
    guess = [*names[:-1], names[-2], *names[: MOST_CLASSES - 1]]
    rows = _confusion_table(truth, guess, names).split("<tr>")
    assert OTHERS in rows[-1] and "37, 99, 235" not in rows[-1] and "128, 128, 128" in rows[-1]
    assert "37, 99, 235" in rows[-2]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/bert", "a/bert"], ["bert", "bert"]),
        (["a/bert", "b/bert", "c"], ["a/bert", "b/bert", "c"]),
        (["x/a/bert", "y/a/bert"], ["x/a/bert", "y/a/bert"]),
        (["–"], ["–"]),
    ],
)
def test_paths_are_told_apart_by_as_little_as_that_takes(paths, names):
    assert told_apart(paths) == names


def test_entities_are_those_that_the_score_counts():
    generator = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    guess = [generator.choices(tags, k=6) for _ in range(60)]
    # A reference without a stray I-x is IOB2, and read strictly.
    truth = [[tag for tag in generator.choices(["O", "B-A", "B-B"], k=6)] for _ in range(60)]
    pairs = [(set(spans_of(one)), set(spans_of(other))) for one, other in zip(truth, guess, strict=True)]
    right = sum(len(one & other) for one, other in pairs)
    found = quality(right, sum(len(other) for _, other in pairs), sum(len(one) for one, _ in pairs))
    scores = entity_scores(guess, truth)
    assert (found.f1, found.precision, found.recall) == pytest.approx(
        (scores["f1"], scores["precision"], scores["recall"])
    )


def test_errors_are_missed_spurious_of_another_type_or_border():
    true = [Span(0, 2, "PER"), Span(3, 4, "LOC"), Span(6, 9, "ORG"), Span(12, 13, "PER")]
    guess = [Span(0, 2, "PER"), Span(3, 4, "ORG"), Span(6, 7, "ORG"), Span(7, 9, "ORG"), Span(10, 11, "LOC")]
    assert errors_of(true, guess) == [
        Error("wrong type", Span(3, 4, "LOC"), Span(3, 4, "ORG")),
        Error("spurious", None, Span(6, 7, "ORG")),
        Error("wrong border", Span(6, 9, "ORG"), Span(7, 9, "ORG")),
        Error("spurious", None, Span(10, 11, "LOC")),
        Error("missed", Span(12, 13, "PER"), None),
    ]
    assert errors_of(true, true) == []


def test_nearest_words_have_the_largest_cosines():
    words = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 5.0]])
    (first, second) = nearest(torch.tensor([[10.0, 0.1], [0.0, -1.0]]), words, 2)
    assert [index for index, _ in first] == [0, 3] and first[0][1] == pytest.approx(1.0, abs=1e-3)
    assert second[0][1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.612, 0.688, ["0.62", "0.64", "0.66", "0.68"]),
        (-3.0, 120.0, ["0", "20", "40", "60", "80", "100", "120"]),
        (1.2e7, 1.9e7, ["1.2e+07", "1.3e+07", "1.4e+07", "1.5e+07", "1.6e+07", "1.7e+07", "1.8e+07", "1.9e+07"]),
    ],
)
def test_ticks_are_round_numbers_that_can_be_told_apart(low, high, shown):
    assert labels(ticks(low, high)) == shown


def test_text_is_escaped_and_markup_of_our_own_is_not():
    assert el("p", "a<b", el("b", "&"), None, title='"x"') == '<p title="&quot;x&quot;">a&lt;b<b>&amp;</b></p>'
    assert clipped("long text", 5) == "long …"
    assert [number(value) for value in (None, 1234, 0.5, 1e-7, float("nan"))] == [
        "–",
        "1,234",
        "0.5000",
        "1.00e-07",
        "nan",
    ]
    assert _names(["a/x", "b/x"]) == ("a/x", "b/x") and _names(["a/x", "b/y"]) == ("x", "y")


def test_tags_of_no_entities_are_compared_word_by_word():
    judged = Judged("f", "tags", [{"tokens": ["a", "dog", "runs"], "tags": ["DET", "NOUN", "VERB"]}],
                    [Prediction(["DET", "NOUN", "NOUN"], 0.9)], {})  # fmt: skip
    body = str(tag_body(judged, 5))
    assert "Tags" in body and "Entities" not in body
    assert "wrong type: true VERB, predicted NOUN" in body
