"""CoNLL-U: ten columns a word, by name; of a treebank the words and one column of tags are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ptv2_fast.training.data.rows import Row, lines_of, read_text

COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
# Tokens of several words ("1-2"), and words that no text has ("1.1").
_BETWEEN = re.compile(r"\d+[-.]\d+")


def conllu_rows(
    path: Path, tagged: bool = True, *, token_column: str | None = None, tag_column: str | None = None, notes: list[str]
) -> Iterator[Row]:
    """Sentences of a CoNLL-U file as rows with `tokens`, `tags` and the line of each word.

    Comments, ranges of several words and empty words are counted in a note and left out.

    Args:
        tagged: False reads the words alone.
        token_column, tag_column: names as of `COLUMNS`, in any case, or numbers from "1"; None reads form and upos. The
            row's values are named by them.
        notes: is given lines of what is left out.

    Raises:
        ValueError: a line has not ten columns, words are not counted from 1, or a column is not one.
    """
    token = _index(path, token_column or "form")
    tag = _index(path, tag_column or "upos")
    left = {"comments": 0, "ranges and empty words": 0}
    sentence: list[tuple[int, str, str]] = []
    for number, line in (*lines_of(path, read_text(path)), (0, "")):
        content = line.strip(" \t")
        where = f"{path}, line {number}"
        if content.startswith("#") and "\t" not in content:
            left["comments"] += 1
        elif content:
            cells = line.rstrip(" ").split("\t")
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{where}: expected the {len(COLUMNS)} columns of CoNLL-U; got {len(cells)}: {line!r}")
            if _BETWEEN.fullmatch(cells[0].strip()):
                left["ranges and empty words"] += 1
                continue
            if cells[0].strip() != str(len(sentence) + 1):
                raise ValueError(f"{where}: expected the word's number {len(sentence) + 1}; got {cells[0]!r}")
            sentence.append((number, cells[token].strip(" "), cells[tag].strip(" ")))
        elif sentence:
            first = sentence[0][0]
            values = {token_column or "tokens": [word for _, word, _ in sentence]}
            if tagged:
                values[tag_column or "tags"] = [name for _, _, name in sentence]
            yield Row(f"{path}, line {first}", values, tuple(place for place, _, _ in sentence))
            sentence = []
    notes.extend(f"{path}: left out: {count} {what}" for what, count in left.items() if count)


def _index(path: Path, name: str) -> int:
    if name.lower() in COLUMNS:
        return COLUMNS.index(name.lower())
    if name.isdecimal() and 1 <= int(name) <= len(COLUMNS):
        return int(name) - 1
    raise ValueError(f"{path}: expected one of the columns {', '.join(COLUMNS)}, or its number from 1; got {name!r}")
