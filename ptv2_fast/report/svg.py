"""Charts as inline SVG: axes with readable ticks, lines, points, bars and a map of heat.

A chart is 360 wide, which is a phone's width, so that its letters are as large as the text's. Colours are the page's
variables: one chart is right on light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptv2_fast.report.html import Html, el, join

WIDTH, HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
COLOURS = 8  # --c0 to --c7 of the page

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve: its name, its points, its colour, how it is drawn, and a point with a ring around it."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    marked: bool = False
    ring: Point | None = None


def colour(index: int) -> str:
    """The page's colour of a number."""
    return f"var(--c{index % COLOURS})"


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in [low, high], at most `most` + 1 of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many digits as tell them apart."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    largest = max(map(abs, values))
    if largest >= 1e6 or (largest and largest < 1e-4):
        return [f"{value:.1e}" for value in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:.{digits}f}" for value in values]


def widened(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest with some room around; never the same number twice."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


@dataclass(frozen=True)
class Axes:
    """Where numbers are in a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: Point) -> Point:
        """A point's place in the picture."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = _LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    def drawn(self, x_label: str, y_label: str, *, whole: bool = False) -> Html:
        """Grid, ticks and the names of both axes.

        Args:
            whole: x counts something, and has no ticks between whole numbers.
        """
        across = [tick for tick in ticks(*self.x) if not whole or abs(tick - round(tick)) < 1e-9]
        upward = ticks(*self.y)
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = []
        for tick, text in zip(upward, labels(upward), strict=True):
            height = self.at((self.x[0], tick))[1]
            parts += [line((_LEFT, height), (right, height), "grid"), word((_LEFT - 5, height + 4), text, "end")]
        for tick, text in zip(across, labels(across), strict=True):
            place = self.at((tick, self.y[0]))[0]
            parts += [line((place, bottom), (place, bottom + 4), "axis"), word((place, bottom + 16), text, "middle")]
        parts += [line((_LEFT, bottom), (right, bottom), "axis")]
        parts += [word(((_LEFT + right) / 2, HEIGHT - 4), x_label, "middle")]
        turned = f"rotate(-90 10 {(_TOP + bottom) / 2})"
        parts += [word((10, (_TOP + bottom) / 2), y_label, "middle", transform=turned)]
        return join(parts)


def line(start: Point, end: Point, class_: str, **attributes: object) -> Html:
    """A straight line."""
    return el("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_, **attributes)


def word(place: Point, text: str, anchor: str, **attributes: object) -> Html:
    """A text at a place."""
    return el("text", text, x=place[0], y=place[1], text_anchor=anchor, **attributes)


def dot(place: Point, index: int, radius: float = 2.5, *, title: str | None = None, **attributes: object) -> Html:
    """A filled point; `title` is shown where a mouse rests on it."""
    said = None if title is None else el("title", title)
    return el("circle", said, cx=place[0], cy=place[1], r=radius, fill=colour(index), **attributes)


def drawing(*parts: object, name: str, height: float = HEIGHT) -> Html:
    """A whole picture; `name` is read to who cannot see it."""
    return el("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=name)


def figure(title: str, picture: Html, legend: Html | None = None, below: object = None) -> Html:
    """A picture with its title above, and what explains it."""
    small = None if below is None else el("p", below, class_="note")
    return el("figure", el("figcaption", title), legend, picture, small)


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], below: object = None) -> Html:
    """Curves in the same axes, with a legend where there are several."""
    points = [point for one in series for point in one.points]
    x = [point[0] for point in points]
    right = max(x) if max(x) > min(x) else min(x) + 1
    axes = Axes((min(0.0, *x), right * 1.02), widened([point[1] for point in points]))
    parts: list[Html] = [axes.drawn(x_label, y_label, whole=True)]
    for one in series:
        places = [axes.at(point) for point in one.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        dashes = "5 3" if one.dashed else None
        parts.append(el("polyline", points=path, class_="curve", stroke=colour(one.colour), stroke_dasharray=dashes))
        for place, point in zip(places, one.points, strict=True):
            if one.marked or len(places) == 1:
                parts.append(dot(place, one.colour, title=f"{one.name}: {point[1]:.4g} at {point[0]:.3g}"))
        if one.ring is not None:
            x_place, y_place = axes.at(one.ring)
            parts.append(el("circle", cx=x_place, cy=y_place, r=6, class_="ring", stroke=colour(one.colour)))
    return figure(title, drawing(*parts, name=title), legend_of(series) if len(series) > 1 else None, below)


def legend_of(series: Sequence[Series]) -> Html:
    """Names with their colours and dashes."""

    def sample(one: Series) -> Html:
        style = f"border-top: 2px {'dashed' if one.dashed else 'solid'} {colour(one.colour)}"
        return el("li", el("span", style=style, class_="sample"), one.name)

    return el("ul", *map(sample, series), class_="legend")


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> Html:
    """Points, and as much as there is of the diagonal on which both numbers are the same."""
    axes = Axes(*(widened(side) for side in zip(*points, strict=True)))
    dots = (dot(axes.at(point), 0, fill_opacity=0.55) for point in points)
    low, high = max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])
    diagonal = line(axes.at((low, low)), axes.at((high, high)), "diagonal") if low < high else None
    return figure(title, drawing(axes.drawn(x_label, y_label), diagonal, *dots, name=title))


def heat(title: str, rows: Sequence[str], values: Sequence[Sequence[float]], below: object = None) -> Html:
    """A map of numbers: a row for each name, a column for each virtual token, the stronger the larger."""
    columns = len(values[0])
    lowest, highest = min(map(min, values)), max(map(max, values))
    spread = (highest - lowest) or 1.0
    width, height = (WIDTH - _LEFT - _RIGHT) / columns, min(18.0, max(6.0, 200 / len(rows)))
    bottom = 4 + height * len(rows)
    parts: list[Html] = []
    for row, (name, numbers) in enumerate(zip(rows, values, strict=True)):
        if row % max(1, math.ceil(11 / height)) == 0:
            parts.append(word((_LEFT - 5, 4 + height * (row + 0.5) + 4), name, "end"))
        for column, value in enumerate(numbers):
            cell = {"x": round(_LEFT + column * width, 2), "y": 4 + row * height, "width": round(width + 0.2, 2)}
            strength = round(0.06 + 0.94 * (value - lowest) / spread, 3)
            said = el("title", f"{name}, token {column}: {value:.3g}")
            parts.append(el("rect", said, **cell, height=height, fill="var(--c0)", fill_opacity=strength))
    for column in range(0, columns, max(1, math.ceil(columns / 8))):
        parts.append(word((round(_LEFT + (column + 0.5) * width, 1), bottom + 14), str(column), "middle"))
    parts.append(word(((_LEFT + WIDTH - _RIGHT) / 2, bottom + 30), "virtual token", "middle"))
    said = join([f"From {lowest:.3g} (faint) to {highest:.3g} (strong). ", below])
    return figure(title, drawing(*parts, name=title, height=bottom + 34), below=said)
