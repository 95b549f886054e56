"""HTML in which nothing of the data can be markup: text is escaped wherever it is not made by `el` itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Characters of a text that are shown.
LONGEST = 600


class Html(str):
    """Markup. Any other text is escaped where it becomes part of it."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its title and what stands below it."""

    title: str
    body: Html


def el(tag: str, *children: object, **attributes: object) -> Html:
    """An element; children that are no `Html` are escaped, None is left out.

    Args:
        attributes: `class_` is class, `stroke_width` is stroke-width; None is left out.
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    given = "".join(f' {name}="{html.escape(str(value))}"' for name, value in names.items())
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one behind the other, escaped where they are no markup."""
    return Html("".join(str(p) if isinstance(p, Html) else html.escape(str(p)) for p in parts if p is not None))


def note(*words: object) -> Html:
    """A sentence that says what the numbers do not."""
    return el("p", *words, class_="note")


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= longest else text[:longest].rstrip() + " …"


def number(value: Any, digits: int = 4) -> str:
    """A number for people: thousands apart, `digits` behind the point; a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 0.5 * 10.0**-digits or abs(value) >= 1e9):
        return f"{value:.2e}"
    return f"{value:,.{digits}f}"


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, words: int = 1, caption: str = "") -> Html:
    """A table that scrolls by itself where it is too wide.

    Args:
        words: how many columns on the left are words; the others are numbers, on the right side of their cells.
    """

    def line(cells: Sequence[object], tag: str) -> Html:
        classes = [None if index < words else "n" for index in range(len(cells))]
        made = [cell if is_cell(cell) else el(tag, cell, class_=c) for cell, c in zip(cells, classes, strict=True)]
        return el("tr", *made)

    head = el("thead", line(header, "th"))
    body = el("tbody", *(line(row, "td") for row in rows))
    title = el("caption", caption) if caption else None
    return el("div", el("table", title, head, body), class_="scroll")


def shown_rows(rows: Iterable[tuple[object, object]]) -> Html:
    """Rows of the data below one another: what is said of each, in small letters, and the row."""
    items = (el("li", el("span", said, class_="said"), el("div", row)) for said, row in rows)
    return el("ul", *items, class_="rows")


def is_cell(cell: object) -> bool:
    """Whether it is a cell of a table already, with attributes of its own."""
    return isinstance(cell, Html) and cell.startswith(("<td", "<th"))


def facts(pairs: Mapping[str, object]) -> Html:
    """Names and values, one beside the other; what is None is left out."""
    shown = [el("div", el("dt", name), el("dd", value)) for name, value in pairs.items() if value is not None]
    return el("dl", *shown, class_="facts")
