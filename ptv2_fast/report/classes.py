"""One class a row: what is taken for what, how good each class is, how sure the model is, where it errs most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.report.calibration import calibration_chart
from ptv2_fast.report.html import Html, clipped, el, join, note, number, shown_rows, table
from ptv2_fast.report.judged import Judged

# Classes of a confusion matrix that a page has room for; the others are one.
MOST_CLASSES = 16
# Classes of a table.
MOST_ROWS = 60
OTHERS = "(others)"
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Quality:
    """How good a class is found: precision, recall, F1 in [0, 1], and how many rows are of it."""

    precision: float
    recall: float
    f1: float
    support: int


def quality(right: int, guessed: int, true: int) -> Quality:
    """Of how many are right, predicted and there; a share of nothing is 0."""
    f1 = 2 * right / (guessed + true) if guessed + true else 0.0
    return Quality(right / guessed if guessed else 0.0, right / true if true else 0.0, f1, true)


def quality_row(name: str, one: Quality) -> list[object]:
    """The same as cells of a table."""
    return [
        clipped(name, _LONGEST_NAME),
        number(one.precision),
        number(one.recall),
        number(one.f1),
        number(one.support),
    ]


QUALITY_HEADER = ("", "precision", "recall", "F1", "support")


def quality_table(qualities: Sequence[tuple[str, Quality]]) -> Html:
    """Classes and how good each is found; of very many the most frequent."""
    kept = sorted(range(len(qualities)), key=lambda i: -qualities[i][1].support)[:MOST_ROWS]
    rows = [quality_row(*qualities[index]) for index in sorted(kept)]
    left = len(qualities) - len(rows)
    return join([table(QUALITY_HEADER, rows), note(f"{left:,} rarer ones are left out.") if left else None])


def confusion(truth: Sequence[str], guess: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """counts[i][j]: rows of class i that are taken for class j."""
    pairs = Counter(zip(truth, guess, strict=True))
    return [[pairs[one, other] for other in labels] for one in labels]


def class_body(judged: Judged, most: int) -> Html:
    """Confusion matrix, quality of each class, calibration, and the most confident mistakes."""
    predictions = judged.predictions or ()
    truth = [str(example["label"]) for example in judged.examples]
    guess = [str(prediction.value) for prediction in predictions]
    right = [one == other for one, other in zip(truth, guess, strict=True)]
    chart = calibration_chart([prediction.score for prediction in predictions], right)
    return join(
        [
            el("h3", "Confusion"),
            _confusion_table(truth, guess, judged.labels),
            el("h3", "Each class"),
            quality_table(_qualities(truth, guess, judged.labels)),
            el("div", chart, class_="charts apart"),
            mistakes(judged, right, most),
        ]
    )


def _qualities(truth: Sequence[str], guess: Sequence[str], labels: Sequence[str]) -> list[tuple[str, Quality]]:
    there, said = Counter(truth), Counter(guess)
    found = Counter(one for one, other in zip(truth, guess, strict=True) if one == other)
    return [(name, quality(found[name], said[name], there[name])) for name in labels]


def _confusion_table(truth: Sequence[str], guess: Sequence[str], labels: Sequence[str]) -> Html:
    shown = list(labels)
    if len(shown) > MOST_CLASSES:
        common = {name for name, _ in Counter(truth).most_common(MOST_CLASSES - 1)}
        shown = [*(name for name in labels if name in common), OTHERS]
        truth, guess = ([name if name in common else OTHERS for name in side] for side in (truth, guess))
    counts = confusion(truth, guess, shown)
    rows = []
    for name, row in zip(shown, counts, strict=True):
        # Of the others nobody sees which is taken for which, so none of them is called right.
        cells = [_share(n, sum(row), name == other, name in labels) for other, n in zip(shown, row, strict=True)]
        rows.append([el("th", clipped(name, _LONGEST_NAME), scope="row"), *cells])
    header = [el("th", "true \\ predicted"), *(el("th", clipped(name, _LONGEST_NAME), class_="n") for name in shown)]
    return join([table(header, rows), note("Rows of each true class: how many, and the share of the class.")])


def _share(count: int, rows: int, right: bool, single: bool) -> Html:
    """A cell, the darker the more of its row is in it: blue on the diagonal, red off it, grey where both are mixed."""
    share = count / rows if rows else 0.0
    colour = "220, 60, 40" if not right else "37, 99, 235" if single else "128, 128, 128"
    style = f"background: rgba({colour}, {0.6 * share:.3f})"
    return el("td", f"{count:,}", el("small", f"{100 * share:.0f} %"), class_="n cell", style=style)


def mistakes(judged: Judged, right: Sequence[bool], most: int) -> Html:
    """The wrong predictions of which the model is most sure, with their texts."""
    predictions = judged.predictions or ()
    wrong = sorted((i for i, good in enumerate(right) if not good), key=lambda i: -predictions[i].score)
    title = el("h3", "Most confident mistakes")
    if not wrong:
        return join([title, note("There is no mistake.")])
    rows = []
    for index in wrong[:most]:
        example, prediction = judged.examples[index], predictions[index]
        guess, true = _named(example, prediction.value), _named(example, example["label"])
        rows.append((f"predicted {guess} ({number(prediction.score, 3)}), true {true}", text_of(example)))
    count = f"{min(most, len(wrong))} of {len(wrong):,} wrong rows, of {len(right):,}, each with its probability."
    return join([title, shown_rows(rows), note(count)])


def _named(example: Mapping[str, Any], label: Any) -> str:
    """A class by its name, a choice by its text."""
    return f"“{clipped(example['choices'][label], 120)}”" if "choices" in example else clipped(str(label), 120)


def text_of(example: Mapping[str, Any]) -> Html:
    """What a row says, its parts below one another."""
    names = ("text", "text_pair", "question")
    return join(el("div", clipped(str(example[name]))) for name in names if name in example)
