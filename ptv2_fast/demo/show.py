"""What the demo prints: scores in a table, sentences with their mood and their entities in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptv2_fast.demo.words import ReadSentence
from ptv2_fast.training.records import words_of

_COLOURS = {"PER": "bold cyan", "LOC": "bold green", "ORG": "bold magenta"}
# The methods, by their entry of results.json.
_WAYS = {"commonest": "commonest answer", "head": "head alone", "deep": "head and prompts"}


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Three lines a task: the commonest answer, the head alone, head and prompts; each with its score and its cost."""
    table = Table(title="held-out test sentences", box=SIMPLE)
    for heading in ("task", "method", "score", "parameters", "share", "seconds"):
        table.add_column(heading, justify="left" if heading in ("task", "method") else "right")
    for row in rows:
        about = (row["task"], row["metric"], f"{row['test_sentences']:,} sentences")
        for text, way in zip(about, _WAYS, strict=True):
            cost = ["–", "–", "–"]
            if way != "commonest":
                trained = row[way]["trained_parameters"]
                share = trained / row["total_parameters"]
                cost = [f"{trained:,}", f"{100 * share:.3f} %", f"{row[way]['seconds']:.0f}"]
            last = way == "deep"
            table.add_row(
                text, _WAYS[way], f"{row[way]['score']:.3f}", *cost, style="bold" if last else "", end_section=last
            )
    return table


def print_sentence(console: Console, sentence: ReadSentence) -> None:
    """A sentence as it was written, after its mood, with entities coloured and named."""
    line = Text(
        f"  {sentence.mood} {sentence.chance:.2f}  ",
        style="bold green" if sentence.mood == "positive" else "bold red",
    )
    text, tags, written = sentence.text, sentence.tags, 0
    for index, (word, tag) in enumerate(zip(words_of(text), tags, strict=True)):
        start = text.index(word, written)
        side, _, kind = tag.partition("-")
        # The blanks within an entity are the entity's own.
        style = _COLOURS.get(kind, "bold") if kind else "default"
        line.append(text[written:start], style=style if side == "I" else "default")
        line.append(word, style=style)
        written = start + len(word)
        goes_on = index + 1 < len(tags) and tags[index + 1] == f"I-{kind}"
        if kind and not goes_on:
            line.append(f" [{kind}]", style="dim")
    line.append(text[written:], style="default")
    console.print(line)
