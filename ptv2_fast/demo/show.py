"""What the demo prints: scores in a table, sentences with their mood and their entities in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptv2_fast.training.records import words_of

_COLOURS = {"PER": "bold cyan", "LOC": "bold green", "ORG": "bold magenta"}


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a task: the held-out metric before and after, and what it cost."""
    table = Table(title="held-out test sentences", box=SIMPLE)
    for heading in ("task", "metric", "before", "after", "trained", "share", "tokens/s", "s"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in rows:
        share = row["trained_parameters"] / row["total_parameters"]
        table.add_row(
            row["task"],
            row["metric"],
            f"{row['before']:.3f}",
            f"[bold]{row['after']:.3f}[/bold]",
            f"{row['trained_parameters']:,}",
            f"{100 * share:.2f} %",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.0f}",
        )
    return table


def print_sentence(console: Console, sentence: str, tags: Sequence[str], mood: str, score: float) -> None:
    """A sentence as it was written, after its mood, with entities coloured and named.

    Args:
        tags: one IOB2 tag for each of `words_of(sentence)`.
    """
    line = Text(f"  {mood} {score:.2f}  ", style="bold green" if mood == "positive" else "bold red")
    written = 0
    for index, (word, tag) in enumerate(zip(words_of(sentence), tags, strict=True)):
        start = sentence.index(word, written)
        side, _, kind = tag.partition("-")
        # The blanks within an entity are the entity's own.
        style = _COLOURS.get(kind, "bold") if kind else "default"
        line.append(sentence[written:start], style=style if side == "I" else "default")
        line.append(word, style=style)
        written = start + len(word)
        goes_on = index + 1 < len(tags) and tags[index + 1] == f"I-{kind}"
        if kind and not goes_on:
            line.append(f" [{kind}]", style="dim")
    line.append(sentence[written:], style="default")
    console.print(line)
