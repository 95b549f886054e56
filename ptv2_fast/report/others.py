"""Numbers, several labels, answers, choices and texts: what is worst, beside what would have been right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ptv2_fast.report.calibration import calibration_chart
from ptv2_fast.report.classes import mistakes, quality, quality_table, text_of
from ptv2_fast.report.html import Html, clipped, el, join, note, number, shown_rows, table
from ptv2_fast.report.judged import Judged
from ptv2_fast.report.svg import scatter
from ptv2_fast.training.metrics import answer_f1

# Points that a picture has room for.
_MOST_POINTS = 1000


def number_body(judged: Judged, most: int) -> Html:
    """Predicted against true numbers, and the rows that are furthest off."""
    pairs = [(float(e["label"]), p.value) for e, p in zip(judged.examples, judged.predictions or (), strict=True)]
    step = -(-len(pairs) // _MOST_POINTS)
    points = [pair for pair in pairs[::step] if math.isfinite(pair[1])]
    if not points:
        return note("The model gives no finite number.")
    worst = sorted(range(len(pairs)), key=lambda i: -abs(pairs[i][0] - pairs[i][1]))[:most]
    rows = [
        (f"predicted {number(pairs[i][1])}, true {number(pairs[i][0])}", text_of(judged.examples[i])) for i in worst
    ]
    shown = note(f"Every {step}th row is drawn.") if step > 1 else None
    return join(
        [
            el("div", scatter("Predicted against true", "true", "predicted", points), class_="charts"),
            shown,
            el("h3", "Furthest off"),
            shown_rows(rows),
        ]
    )


def labels_body(judged: Judged, most: int) -> Html:
    """How good each label is found, and the rows with the most wrong decisions."""
    pairs = [(set(e["labels"]), set(p.value)) for e, p in zip(judged.examples, judged.predictions or (), strict=True)]
    true, guessed = (Counter(name for pair in pairs for name in pair[side]) for side in (0, 1))
    right = Counter(name for one, other in pairs for name in one & other)
    qualities = [(name, quality(right[name], guessed[name], true[name])) for name in judged.labels]
    wrong = [index for index, (one, other) in enumerate(pairs) if one != other]
    wrong.sort(key=lambda index: -len(pairs[index][0] ^ pairs[index][1]))
    rows = [
        (", ".join(f"{what} {_set(side)}" for what, side in zip(("true", "predicted"), pairs[i], strict=True)), i)
        for i in wrong[:most]
    ]
    return join(
        [
            el("h3", "Each label"),
            quality_table(qualities),
            el("h3", "Rows with the most wrong labels"),
            shown_rows((said, text_of(judged.examples[i])) for said, i in rows) if rows else note("There is none."),
            note(f"{len(rows)} of {len(wrong):,} rows with a wrong label, of {len(pairs):,}.") if rows else None,
        ]
    )


def _set(names: Collection[str]) -> str:
    return " + ".join(sorted(names)) or "none"


def _quoted(answer: str) -> str:
    return f"“{clipped(answer, 200)}”" if answer else "no answer"


def answer_body(judged: Judged, most: int) -> Html:
    """The answers that share the fewest words with a right one, the surest first."""
    scored = []
    for index, (example, prediction) in enumerate(zip(judged.examples, judged.predictions or (), strict=True)):
        texts = example["answers"]["text"] or [""]
        best = max(answer_f1(prediction.value, text) for text in texts)
        scored.append((best, -prediction.score, index))
    wrong = [one for one in sorted(scored) if one[0] < 1.0]
    rows = []
    for best, _, index in wrong[:most]:
        example, given = judged.examples[index], (judged.predictions or ())[index].value
        truth = " | ".join(dict.fromkeys(example["answers"]["text"]))
        said = f"F1 {number(best, 2)}: predicted {_quoted(given)}, true {_quoted(truth)}"
        asked = join([el("div", clipped(example["question"])), el("small", clipped(example["context"], 300))])
        rows.append((said, asked))
    if not rows:
        return note("Every answer is right.")
    count = f"{len(rows)} of {len(wrong):,} answers that are not wholly right, of {len(scored):,}."
    return join([el("h3", "Worst answers"), shown_rows(rows), note(count)])


def choice_body(judged: Judged, most: int) -> Html:
    """Calibration, and the most confident mistakes."""
    predictions = judged.predictions or ()
    right = [bool(e["label"] == p.value) for e, p in zip(judged.examples, predictions, strict=True)]
    chart = calibration_chart([prediction.score for prediction in predictions], right)
    return join([el("div", chart, class_="charts apart"), mistakes(judged, right, most)])


def texts_body(records: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Html:
    """Prompts, what the model went on with, and what stands in the data."""
    if not records:
        return note("The rows have no prompts to go on from, so nothing was generated.")
    rows = [
        [clipped(record["prompt"], 300), clipped(record["text"], 300), clipped(text, 300)]
        for record, text in zip(records, wanted, strict=True)
    ]
    return join([el("h3", "Continued greedily"), table(("prompt", "generated", "in the data"), rows, words=3)])
