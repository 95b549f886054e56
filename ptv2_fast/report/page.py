"""The page: its style, its contents, its sections in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ptv2_fast.report.asked import GENERATOR
from ptv2_fast.report.html import Html, Section, el, join

STYLE = "style.css"


@dataclass(frozen=True)
class Part:
    """What the page says of one run."""

    name: str
    sections: Sequence[Section]


def page(shared: Sequence[Section], parts: Sequence[Part]) -> str:
    """A whole HTML document: what several runs share stands before the runs, of a single one behind its facts."""
    if len(parts) == 1:
        (part,) = parts
        title, body = part.name, _one(part, shared)
    else:
        title, body = ", ".join(part.name for part in parts), _several(shared, parts)
    style = Html(resources.files("ptv2_fast.report").joinpath(STYLE).read_text(encoding="utf-8"))
    head = el(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta name="generator" content="{GENERATOR}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", f"{title} – {GENERATOR}"),
        el("style", style),
    )
    return "<!doctype html>\n" + el("html", head, el("body", el("main", el("h1", title), body)), lang="en") + "\n"


def _one(part: Part, shared: Sequence[Section]) -> Html:
    first, *others = part.sections
    return join(_section(section) for section in (first, *shared, *others))


def _several(shared: Sequence[Section], parts: Sequence[Part]) -> Html:
    links = (el("a", part.name, href=f"#run-{index}") for index, part in enumerate(parts))
    below = (
        el("article", el("h2", part.name, class_="run"), *map(_section, part.sections), id=f"run-{index}")
        for index, part in enumerate(parts)
    )
    return join([el("nav", *links), *map(_section, shared), *below])


def _section(section: Section) -> Html:
    return el("section", el("h2", section.title), section.body)
