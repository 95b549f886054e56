"""Whether a model is right as often as it is sure: bins of confidence, and how far they are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptv2_fast.report.html import Html, el, note, number
from ptv2_fast.report.svg import Axes, drawing, figure, line

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Predictions that are about equally sure: (low, high] of the probability, how many, and both means."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def bins_of(confidences: Sequence[float], right: Sequence[bool], count: int = BINS) -> list[Bin]:
    """Bins of equal width over (0, 1]; empty ones are left out."""
    found = []
    for index in range(count):
        low, high = index / count, (index + 1) / count
        inside = [(c, r) for c, r in zip(confidences, right, strict=True) if low < c <= high or (c == 0 == index)]
        if inside:
            sure, good = sum(c for c, _ in inside), sum(r for _, r in inside)
            found.append(Bin(low, high, len(inside), sure / len(inside), good / len(inside)))
    return found


def expected_error(bins: Sequence[Bin]) -> float:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b|, in [0, 1].

    Source: Guo et al., 2017, "On Calibration of Modern Neural Networks".
    """
    rows = sum(one.count for one in bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / rows


def calibration_chart(confidences: Sequence[float], right: Sequence[bool]) -> Html:
    """The reliability diagram: how often predictions of a bin are right, against how sure they are."""
    bins = bins_of(confidences, right)
    if not bins:
        return note("The model gives no probabilities.")
    axes = Axes((0.0, 1.0), (0.0, 1.0))
    most = max(one.count for one in bins)
    bars = []
    for one in bins:
        left, top = axes.at((one.low, one.accuracy))
        across, bottom = axes.at((one.high, 0.0))
        said = el("title", f"{one.count} rows, {one.confidence:.2f} sure, {one.accuracy:.2f} right")
        box = {"x": left + 1, "y": top, "width": round(across - left - 2, 1), "height": round(bottom - top, 1)}
        # The fewer rows there are, the paler the bar is.
        bars.append(el("rect", said, **box, fill="var(--c0)", fill_opacity=round(0.2 + 0.65 * one.count / most, 2)))
        bars.append(line(axes.at((one.low, one.confidence)), axes.at((one.high, one.confidence)), "sure"))
    diagonal = line(axes.at((0.0, 0.0)), axes.at((1.0, 1.0)), "diagonal")
    title = "Calibration: right as often as sure?"
    picture = drawing(axes.drawn("probability of the prediction", "share that is right"), *bars, diagonal, name=title)
    error = number(expected_error(bins))
    below = (
        f"Expected calibration error {error} ({BINS} bins). Bars: how often a bin is right, darker where it has more"
        " rows; a short line: how sure it is on average. Bars below their lines are too sure."
    )
    return figure(title, picture, below=below)
