"""Spans: characters [start, end) of a text with a label, as annotation tools write them, become words with tags.

A span is [start, end, label] (doccano, spaCy), or an object with "start", "end" and "label" or a list "labels" of one
(Prodigy, Label Studio); newer versions of doccano call them "start_offset" and "end_offset". Offsets count characters;
where the span's own text says so, UTF-16 units, as browsers do.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.training.data.words import places_of

SPAN_COLUMNS = ("label", "labels", "entities", "spans", "tags")
_OFFSETS = (("start", "end"), ("start_offset", "end_offset"))


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int
    label: str


def holds_spans(value: Any) -> bool:
    """Whether a value is a list of spans; an empty list may be one."""
    return isinstance(value, list | tuple) and all(_is_span(item) for item in value)


def _is_span(item: Any) -> bool:
    if isinstance(item, dict):
        return any(start in item and end in item for start, end in _OFFSETS)
    return isinstance(item, list | tuple) and len(item) == 3 and all(_is_offset(value) for value in item[:2])


def _is_offset(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def words_and_tags(
    where: str, text: str, given: Any, words: Sequence[tuple[int, int]] | None = None
) -> tuple[list[str], list[str], int]:
    """The words of a text, their IOB2 tags, and how many words a span cuts in two; these are split there.

    Args:
        words: the places of the words, one behind the other; None splits the text.

    Raises:
        ValueError: a span is not one, lies outside of the text or holds no word, or two spans or words overlap.
    """
    spans = [_span(where, text, item) for item in _checked(where, given)]
    spans = sorted(dict.fromkeys(spans), key=lambda span: (span.start, span.end))
    for first, second in zip(spans, spans[1:], strict=False):
        if second.start < first.end:
            each = " and ".join(f"[{s.start}, {s.end}) {s.label!r}" for s in (first, second))
            raise ValueError(f"{where}: expected spans that do not overlap, since a word has one tag; got {each}")
    if words is not None:
        _refuse_disorder(where, words)
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    whole = places_of(text) if words is None else list(words)
    places = [piece for start, end in whole for piece in _pieces(start, end, edges)]
    tags = ["O"] * len(places)
    starts = [start for start, _ in places]
    for span in spans:
        # No word crosses an edge, so that those that begin in a span lie in it.
        inside = range(bisect_left(starts, span.start), bisect_left(starts, span.end))
        if not inside:
            raise ValueError(f"{where}: expected a word in the span [{span.start}, {span.end}); it holds none")
        for index in inside:
            tags[index] = ("B-" if index == inside[0] else "I-") + span.label
    return [text[start:end] for start, end in places], tags, len(places) - len(whole)


def _pieces(start: int, end: int, edges: Sequence[int]) -> list[tuple[int, int]]:
    cuts = [start, *edges[bisect_right(edges, start) : bisect_left(edges, end)], end]
    return list(zip(cuts, cuts[1:], strict=False))


def _refuse_disorder(where: str, words: Sequence[tuple[int, int]]) -> None:
    for (first, end), (start, last) in zip(words, words[1:], strict=False):
        if start < end:
            each = f"[{first}, {end}) and [{start}, {last})"
            raise ValueError(f"{where}: expected words one behind the other; got {each}")


def _checked(where: str, given: Any) -> Sequence[Any]:
    if not holds_spans(given):
        raise ValueError(f"{where}: expected a list of spans [start, end, label]; got {given!r}")
    spans: Sequence[Any] = given
    return spans


def _span(where: str, text: str, item: Any) -> Span:
    start, end, label = (*_offsets(item), _label(item)) if isinstance(item, dict) else item
    if not _is_offset(start) or not _is_offset(end) or not isinstance(label, str) or not label.strip():
        raise ValueError(f"{where}: expected a span's start and end as integers and one label; got {item!r}")
    own = item.get("text") if isinstance(item, dict) else None
    if isinstance(own, str) and not _is_written(own, text[start:end]) and 0 <= start < end:
        start, end = _from_utf16(text, start), _from_utf16(text, end)
        if not _is_written(own, text[start:end]):
            raise ValueError(
                f"{where}: expected the span's text {own!r} at its place; the text has {text[start:end]!r}"
            )
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{where}: expected 0 <= start < end <= {len(text)}, the text's length; got [{start}, {end})")
    inner = text[start:end]
    start, end = start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
    return Span(start, end, "_".join(label.split()))


def _offsets(item: Mapping[str, Any]) -> tuple[Any, Any]:
    start, end = next(names for names in _OFFSETS if names[0] in item and names[1] in item)
    return item[start], item[end]


def _is_written(own: str, inner: str) -> bool:
    """Whether a span's own text is that of its place; Label Studio writes a line's end as a backslash and an n."""
    return own in (inner, re.sub(r"[\r\n]", r"\\n", inner))


def _label(item: Mapping[str, Any]) -> Any:
    labels = item.get("labels")
    if isinstance(labels, list | tuple) and len(labels) == 1:
        return labels[0]
    return item.get("label", labels)


def _from_utf16(text: str, units: int) -> int:
    """Characters in front of so many UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")[: 2 * units].decode("utf-16-le", "ignore"))
