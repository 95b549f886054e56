"""CoNLL files: a token a line with its tag, sentences between blank lines; comments and counted tokens are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ptv2_fast.training.data.conllu import COLUMNS as CONLLU_COLUMNS
from ptv2_fast.training.data.rows import Row, lines_of, read_text, suffix_of
from ptv2_fast.training.data.tags import TAG


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    columns: list[str]


_Sentence: TypeAlias = list[_Line]
# What the first and the last column are called where somebody has put a header above them.
_TOKEN_HEADERS = frozenset("token tokens word words form text sentence".split())
_TAG_HEADERS = frozenset("tag tags label labels ner ner_tag ner_tags pos upos xpos iob iob_tag class".split())
# Tokens of several words, and empty ones, between those that CoNLL-U counts.
_BETWEEN = re.compile(r"\d+[-.]\d+")


def conll_rows(
    path: Path,
    tagged: bool = True,
    *,
    token_column: str | None = None,
    tag_column: str | None = None,
    notes: list[str],
) -> Iterator[Row]:
    """Sentences of a CoNLL file as rows with `tokens`, `tags` and the line of each token.

    A line is `token<TAB or spaces>...<tag>`: the first column is the token, the last the tag. A line of white space
    ends a sentence; `-DOCSTART-` lines and comments (lines in front of a sentence that begin with # and have another
    number of columns) are skipped; spaces around a column are tolerated.

    Args:
        tagged: False lets a line hold the token alone.
        token_column, tag_column: numbers of columns, from "1", which the row's values are named by; None reads the
            first and the last one.
        notes: is given a line that counts what is left out, and one where lines have other numbers of columns.

    Raises:
        ValueError: a line has no token or, when `tagged`, no tag; a column has no such number; or the first column
            counts tokens and nobody says which one they are in.
    """
    sentences, left = _sentences(path)
    _join_comments(sentences)
    width = _width([line for sentence in sentences for line in sentence])
    bare = [_without_comments(sentence, width) for sentence in sentences]
    comments = sum(map(len, sentences)) - sum(map(len, bare))
    found = [sentence for sentence in bare if sentence]
    lines = [line for sentence in found for line in sentence]
    _refuse_table(path, lines, token_column)
    if token_column is None:
        _refuse_counted(path, found, width, tagged)
        if not tagged and suffix_of(path) == ".txt":
            _refuse_sentences(path, lines)
    token, tag = (_index(path, lines, name) for name in (token_column, tag_column if tagged else None))
    read = {0 if token is None else token, width - 1 if tag is None else tag} if token_column or tag_column else None
    _note(path, lines, width, notes, {"comments": comments, "document marks": left}, read)
    for sentence in found:
        if tagged or all(len(line.columns) > 1 for line in sentence):
            tags = [_cell(path, line, -1 if tag is None else tag, 2 if tagged else 1) for line in sentence]
        else:
            tags = [line.columns[-1] for line in sentence if len(line.columns) > 1]
        tokens = [_cell(path, line, token or 0, 1) for line in sentence]
        values = {token_column or "tokens": tokens, tag_column or "tags": tags}
        yield Row(f"{path}, line {sentence[0].number}", values, tuple(line.number for line in sentence))


def _sentences(path: Path) -> tuple[list[_Sentence], int]:
    """The lines between blank ones, and how many document marks were among them."""
    sentences: list[_Sentence] = [[]]
    marks = 0
    for number, line in lines_of(path, read_text(path)):
        # Only ASCII blanks separate: a no-break space or an emoji selector can be a token.
        content = line.strip(" \t\r")
        if content and content.split("\t")[0].split(" ")[0] == "-DOCSTART-":
            marks += 1
            content = ""
        if content:
            sentences[-1].append(_Line(number, line, _columns(line)))
        elif sentences[-1]:
            sentences.append([])
    return sentences, marks


def _columns(line: str) -> list[str]:
    line = line.rstrip(" \t\r")
    if "\t" in line:
        return [column.strip(" \r") for column in line.split("\t")]
    return re.split(" +", line.strip(" \r"))


def _join_comments(sentences: Sequence[_Sentence]) -> None:
    """Where tabs part the columns of all lines that cannot be comments, one of blanks that begins with # is one."""
    lines = [line for sentence in sentences for line in sentence]
    words = [line for line in lines if not line.text.startswith("#")]
    if words and all("\t" in line.text for line in words):
        for line in lines:
            if line.text.startswith("#") and "\t" not in line.text:
                line.columns[:] = [line.text]


def _width(lines: Sequence[_Line]) -> int:
    """How many columns most lines have that cannot be comments."""
    counts = Counter(len(line.columns) for line in lines if not line.columns[0].startswith("#"))
    counts = counts or Counter(len(line.columns) for line in lines)
    return max(counts, key=lambda count: (counts[count], -count), default=0)


def _without_comments(sentence: _Sentence, width: int) -> _Sentence:
    at = 0
    while at < len(sentence) and sentence[at].text.startswith("#") and len(sentence[at].columns) != width:
        at += 1
    return sentence[at:]


def _refuse_counted(path: Path, sentences: Sequence[_Sentence], width: int, tagged: bool) -> None:
    """Refuses `1<TAB>token<TAB>tag`, whose tokens would be numbers."""
    firsts = [[line.columns[0] for line in one if not _BETWEEN.fullmatch(line.columns[0])] for one in sentences]
    counted = all(one == [str(number) for number in range(1, len(one) + 1)] for one in firsts)
    if counted and width >= (3 if tagged else 2) and max(map(len, firsts), default=0) > 1:
        option = "--text-column 2 --label-column N" if tagged else "--text-column 2"
        raise ValueError(
            f"{path}, line {sentences[0][0].number}: the first of {width} columns counts the tokens; name the columns"
            f" by their numbers, as in {option} (text_column, label_column)"
            + ("; --format conllu (format) reads CoNLL-U" if width == len(CONLLU_COLUMNS) else "")
        )


def _refuse_table(path: Path, lines: Sequence[_Line], token_column: str | None) -> None:
    """Refuses a table of sentences and classes between tabs, and a header above words and tags."""
    first = [cell.lower() for cell in lines[0].columns] if lines else [""]
    if len(first) > 1 and first[0] in _TOKEN_HEADERS and first[-1] in _TAG_HEADERS:
        raise ValueError(
            f"{path}, line {lines[0].number}: {lines[0].columns} looks like a header; expected the first word and its"
            " tag, since CoNLL files have none (a table of texts and labels is for SEQ_CLS)"
        )
    at = int(token_column) - 1 if token_column is not None and token_column.isdecimal() else 0
    several = [line for line in lines if 0 <= at < len(line.columns) and " " in line.columns[at]]
    if len(several) > len(lines) / 2:
        raise ValueError(
            f"{path}, line {several[0].number}: expected one word a line and its tag; got {several[0].columns[at]!r},"
            f" as in {len(several)} of {len(lines)} lines (a table of texts and labels is for SEQ_CLS)"
        )


def _refuse_sentences(path: Path, lines: Sequence[_Line]) -> None:
    """Refuses a text of sentences, of which the first words alone would be read."""
    several = [line for line in lines if len(line.columns) > 1]
    if several and not any("\t" in line.text or TAG.fullmatch(line.columns[-1]) for line in several):
        raise ValueError(
            f"{path}, line {several[0].number}: expected one token a line, with its tag or alone; got "
            f"{several[0].text!r}; sentences are read from standard input"
        )


def _index(path: Path, lines: Sequence[_Line], name: str | None) -> int | None:
    if name is None or not lines:
        return None
    count = len(lines[0].columns)
    if not name.isdecimal() or not 1 <= int(name) <= count:
        raise ValueError(f"{path}, line {lines[0].number}: expected columns numbered 1 to {count}; got {name!r}")
    return int(name) - 1


def _cell(path: Path, line: _Line, index: int, least: int) -> str:
    if len(line.columns) < max(least, index + 1) or not line.columns[0] or not line.columns[index]:
        raise ValueError(f"{path}, line {line.number}: expected token<TAB>tag; got {line.text!r}")
    return line.columns[index]


def _note(
    path: Path, lines: Sequence[_Line], width: int, notes: list[str], skipped: Mapping[str, int], read: set[int] | None
) -> None:
    """Say what is left out; `read` are the columns that are read by their numbers, None where none are named."""
    between = max((len(line.columns) for line in lines), default=0) - 2
    left = [f"up to {between} columns between token and tag"] if read is None and between > 0 else []
    if read is not None and len(read) < width:
        left = [f"{width - len(read)} of {width} columns"]
    left += [f"{count} {what}" for what, count in skipped.items() if count]
    if left:
        notes.append(f"{path}: left out: {' and '.join(left)}")
    odd = [line for line in lines if len(line.columns) != width]
    if odd:
        notes.append(f"{path}: line {odd[0].number} has {len(odd[0].columns)} columns, most have {width}")
