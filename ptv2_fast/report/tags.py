"""Tagged words: whole entities of each type, and the errors in their sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptv2_fast.report.classes import QUALITY_HEADER, quality, quality_row
from ptv2_fast.report.html import Html, el, join, note, number, shown_rows, table
from ptv2_fast.report.judged import Judged
from ptv2_fast.training.data.tags import stray_insides, to_iob2
from ptv2_fast.training.metrics import comparable_tags

# Words of a sentence that are shown on each side of an error.
_AROUND = 14
KINDS = {
    "missed": "no predicted entity goes with it",
    "spurious": "no true entity goes with it",
    "wrong type": "the right words, under another type",
    "wrong border": "words are shared, and it begins or ends elsewhere",
}


@dataclass(frozen=True, order=True)
class Span:
    """An entity: words [start, end) and its type."""

    start: int
    end: int
    kind: str

    def shares(self, other: Span) -> int:
        """How many words it has in common with another."""
        return max(0, min(self.end, other.end) - max(self.start, other.start))


@dataclass(frozen=True)
class Error:
    """What is wrong at one place: its kind (one of `KINDS`), the true entity, the predicted one."""

    kind: str
    true: Span | None
    guess: Span | None

    @property
    def words(self) -> tuple[int, int]:
        """The first word of both and the one behind the last."""
        spans = [span for span in (self.true, self.guess) if span is not None]
        return min(span.start for span in spans), max(span.end for span in spans)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The entities of IOB2 tags: B-x begins one, I-x of the same type goes on; an I-x that follows neither is none."""
    spans: list[Span] = []
    for index, tag in enumerate(tags):
        side, _, kind = tag.partition("-")
        last = spans[-1] if spans else None
        if side == "B":
            spans.append(Span(index, index + 1, kind))
        elif side == "I" and last is not None and (last.end, last.kind) == (index, kind):
            spans[-1] = Span(last.start, index + 1, kind)
    return spans


def tagged_words(tags: Sequence[str]) -> list[Span]:
    """The words of tags that are of no entities, each for itself; O is none."""
    return [Span(index, index + 1, tag) for index, tag in enumerate(tags) if tag != "O"]


def errors_of(true: Sequence[Span], guess: Sequence[Span]) -> list[Error]:
    """What is wrong, in the order of the text; each entity is part of one error at most.

    Of entities that overlap those belong together that share the most words.
    """
    left, found = ([span for span in one if span not in set(other)] for one, other in ((true, guess), (guess, true)))
    pairs = sorted(((one.shares(other), one, other) for one in left for other in found), key=lambda p: (-p[0], p[1:]))
    errors: list[Error] = []
    for shared, one, other in pairs:
        if shared and one in left and other in found:
            same = (one.start, one.end) == (other.start, other.end)
            errors.append(Error("wrong type" if same else "wrong border", one, other))
            left.remove(one)
            found.remove(other)
    errors += [Error("missed", span, None) for span in left] + [Error("spurious", None, span) for span in found]
    return sorted(errors, key=lambda error: error.words)


def tag_body(judged: Judged, most: int) -> Html:
    """Entities of each type, how many errors there are of each kind, and errors in their sentences."""
    guess, truth, has_entities = comparable_tags(
        [prediction.value for prediction in judged.predictions or ()], [example["tags"] for example in judged.examples]
    )
    if has_entities and any(map(stray_insides, truth)):
        truth, guess = [to_iob2(tags) for tags in truth], [to_iob2(tags) for tags in guess]
    spans = spans_of if has_entities else tagged_words
    pairs = [(spans(one), spans(other)) for one, other in zip(truth, guess, strict=True)]
    errors = [(row, error) for row, (one, other) in enumerate(pairs) for error in errors_of(one, other)]
    counts = Counter(error.kind for _, error in errors)
    kinds = [[kind, what, number(counts[kind])] for kind, what in KINDS.items()]
    shown = _chosen(errors, most)
    listed = [_sentence(judged.examples[row]["tokens"], error) for row, error in shown]
    return join(
        [
            el("h3", "Entities" if has_entities else "Tags"),
            table(QUALITY_HEADER, _types(pairs)),
            el("h3", "Errors"),
            table(("kind", "what it is", "count"), kinds, words=2),
            el("p", el("mark", "true", class_="true"), " ", el("mark", "predicted", class_="guess"), " ",
               el("mark", "both", class_="true guess"), class_="note"),
            shown_rows(listed),
            note(f"{len(shown)} of {len(errors):,} errors, as many of each kind as there is room for."),
        ]
    )  # fmt: skip


def _types(pairs: Sequence[tuple[list[Span], list[Span]]]) -> list[list[object]]:
    """A row for each type, and one over all."""
    true = Counter(span.kind for one, _ in pairs for span in one)
    guessed = Counter(span.kind for _, other in pairs for span in other)
    right = Counter(span.kind for one, other in pairs for span in set(one) & set(other))
    rows = [quality_row(kind, quality(right[kind], guessed[kind], true[kind])) for kind in sorted(true | guessed)]
    everything = quality_row("all", quality(right.total(), guessed.total(), true.total()))
    return [*rows, [el("th", everything[0], scope="row"), *(el("td", el("b", c), class_="n") for c in everything[1:])]]


def _chosen(errors: Sequence[tuple[int, Error]], most: int) -> list[tuple[int, Error]]:
    """At most so many, the kinds in turn; in the order of the kinds, then of the text."""
    by_kind = {kind: [one for one in errors if one[1].kind == kind] for kind in KINDS}
    taken = dict.fromkeys(KINDS, 0)
    while sum(taken.values()) < min(most, len(errors)):
        for kind, there in by_kind.items():
            if taken[kind] < len(there) and sum(taken.values()) < most:
                taken[kind] += 1
    return [one for kind, there in by_kind.items() for one in there[: taken[kind]]]


def _sentence(tokens: Sequence[str], error: Error) -> tuple[str, Html]:
    """What is wrong, and the sentence around it with the words of both entities marked."""
    first, last = error.words
    start, end = max(0, first - _AROUND), min(len(tokens), last + _AROUND)
    parts: list[object] = ["… "] if start else []
    for classes, words in _runs(range(start, end), error):
        text = " ".join(tokens[index] for index in words)
        parts += [el("mark", text, class_=classes) if classes else text, " "]
    parts.append("…" if end < len(tokens) else None)
    said = [f"true {error.true.kind}" if error.true else None, f"predicted {error.guess.kind}" if error.guess else None]
    return f"{error.kind}: {', '.join(filter(None, said))}", join(parts)


def _runs(words: Iterable[int], error: Error) -> list[tuple[str, list[int]]]:
    """Neighbouring words that are in the same of both entities, with the classes of their mark."""
    runs: list[tuple[str, list[int]]] = []
    for index in words:
        sides = (("true", error.true), ("guess", error.guess))
        classes = " ".join(name for name, span in sides if span is not None and span.start <= index < span.end)
        if runs and runs[-1][0] == classes:
            runs[-1][1].append(index)
        else:
            runs.append((classes, [index]))
    return runs
