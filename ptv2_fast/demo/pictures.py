"""Two pictures: how both tasks were learned, and which words moved the mood of a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ptv2_fast.demo.words import ReadSentence
from ptv2_fast.storage.files import write_whole
from ptv2_fast.training.records import words_of

# The colours of the terminal's cyan, green and magenta that can be read on white.
_KINDS = {"PER": "#0b7285", "LOC": "#2b8a3e", "ORG": "#a61e94"}
_FOR, _AGAINST = "#4263eb", "#e8590c"
# More sentences make a picture that nobody looks at.
_MOST_SENTENCES = 6
_CAPTION = (
    "Which words moved the decision: leave one word out\n"
    "Each bar is what the decision's log-odds lose when the frozen encoder, with the sentiment prompt,\n"
    "reads the sentence without that word. The tags are those of the other prompt."
)


def draw_curves(
    rows: Sequence[Mapping[str, Any]], histories: Sequence[Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """A PNG with a line of panels for each task: the training loss, and the dev metric beside the head's alone.

    Args:
        rows: a task each, as results.json has them.
        histories: the records of its training with prompts, which have "epoch".
    """
    figure = Figure(figsize=(11, 3.6 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), row, history in zip(panels, rows, histories, strict=True):
        losses = [(record["epoch"], record["loss"]) for record in history if "loss" in record]
        scores = [(record["epoch"], record[key]) for record in history if (key := f"eval_{row['key']}") in record]
        left.plot(*zip(*losses, strict=True), color=_FOR)
        left.set(title=f"{row['task']}: training loss, deep prompts", ylabel="cross-entropy (nats)", ylim=(0, None))
        right.plot(*zip(*scores, strict=True), color=_FOR, marker="o", label="deep prompts")
        right.axhline(row["head"]["dev"], color=_AGAINST, linestyle="--", label="head alone, after its training")
        title = f"{row['task']}: dev {row['metric']} ({row['dev_sentences']} sentences)"
        right.set(title=title, ylabel=f"{row['metric']} (0 to 1)", ylim=(0, 1))
        right.legend(loc="lower right")
        for panel in (left, right):
            panel.set_xlabel("epoch (times that all training sentences were seen)")
            panel.set_xlim(0, None)
            panel.grid(alpha=0.3)
    write_whole(path, lambda place: figure.savefig(place, format="png"))


def draw_words(sentences: Sequence[ReadSentence], path: Path) -> None:
    """A PNG of the first sentences: their words with their tags, and a bar for what each does to the mood."""
    shown = sentences[:_MOST_SENTENCES]
    longest = max(len(words_of(sentence.text)) for sentence in shown)
    figure = Figure(figsize=(max(8.0, 0.62 * longest), 2.9 * len(shown) + 1.0), dpi=110, layout="constrained")
    figure.suptitle(_CAPTION, fontsize=10)
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for panel, sentence in zip(panels, shown, strict=True):
        colours = [_FOR if effect > 0 else _AGAINST for effect in sentence.effects]
        panel.bar(range(len(sentence.effects)), sentence.effects, color=colours)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{sentence.mood}, probability {sentence.chance:.2f}", loc="left")
        panel.set_ylabel("change of log-odds (nats)")
        panel.set_xlim(-0.6, longest - 0.4)
        words = [
            word if tag == "O" else f"{word} [{tag[2:]}]"
            for word, tag in zip(words_of(sentence.text), sentence.tags, strict=True)
        ]
        panel.set_xticks(range(len(words)), words, rotation=40, ha="right")
        for label, tag in zip(panel.get_xticklabels(), sentence.tags, strict=True):
            label.set(color=_KINDS.get(tag[2:], "black"), fontweight="normal" if tag == "O" else "bold")
    marks = [Patch(color=_FOR, label="the word speaks for the decision"), Patch(color=_AGAINST, label="against it")]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9)
    write_whole(path, lambda place: figure.savefig(place, format="png"))
