"""Loss and scores by epoch, of one run or of several in the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ptv2_fast.report.html import Html, Section, el, join, note
from ptv2_fast.report.run import Run
from ptv2_fast.report.svg import Point, Series, line_chart


def curves_section(runs: Sequence[Run]) -> Section:
    """A chart of the losses and one for each metric that epochs are chosen by; runs of other tasks have their own."""
    parts: list[Html] = []
    for task in dict.fromkeys(run.task for run in runs):
        own = [(index, run) for index, run in enumerate(runs) if run.task == task]
        charts = [chart for chart in (_losses(own), *_metrics(own)) if chart is not None]
        if charts and len({run.task for run in runs}) > 1:
            parts.append(el("h3", task))
        parts.append(el("div", *charts, class_="charts"))
    without = [run.name for run in runs if not curve(run, "loss") and not curve(run, "eval_loss")]
    if without:
        parts.append(note(f"No curves were written down for {', '.join(without)}."))
    return Section("Curves", join(parts))


def curve(run: Run, name: str) -> list[Point]:
    """(epoch, value) of each record that has both as finite numbers, in order."""
    pairs = [(record.get("epoch"), record.get(name)) for record in run.history]
    points = [(float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
    return [point for point in points if all(map(math.isfinite, point))]


def best_point(run: Run, points: Sequence[Point]) -> Point | None:
    """The point of the best epoch."""
    return next((point for point in points if round(point[0]) == run.metrics.get("best_epoch")), None)


def _losses(runs: Sequence[tuple[int, Run]]) -> Html | None:
    series = []
    for index, run in runs:
        before = f"{run.name}, " if len(runs) > 1 else ""
        training, dev = curve(run, "loss"), curve(run, "eval_loss")
        if training:
            series.append(Series(f"{before}training", training, index))
        if dev:
            # Of a single run the two kinds differ by colour too.
            own = index if len(runs) > 1 else index + 1
            series.append(Series(f"{before}dev", dev, own, dashed=True, marked=True, ring=best_point(run, dev)))
    if not series:
        return None
    said = "A ring marks the best epoch." if any(one.ring for one in series) else None
    return line_chart("Loss (mean over labels)", "epoch", "loss", series, said)


def _metrics(runs: Sequence[tuple[int, Run]]) -> list[Html]:
    charts = []
    for metric in dict.fromkeys(run.metric for _, run in runs if run.metric):
        series = []
        for index, run in runs:
            points = curve(run, f"eval_{metric}")
            if points:
                series.append(Series(run.name, points, index, marked=True, ring=best_point(run, points)))
        if series:
            charts.append(line_chart(f"Dev {metric}", "epoch", metric, series, "A ring marks the best epoch."))
    return charts
