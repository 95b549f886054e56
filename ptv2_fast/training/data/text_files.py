"""Plain text: each line that is not blank is a text, of a file and of what somebody types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ptv2_fast.training.data.examples import check_text
from ptv2_fast.training.data.rows import Row, lines_of, read_text


def text_rows(path: Path) -> Iterator[Row]:
    """Each line that is not blank as a row with the column `text`."""
    for number, line in lines_of(path, read_text(path)):
        if line.strip():
            yield Row(f"{path}, line {number}", {"text": line})


def typed_lines(lines: Iterable[str], where: str) -> list[tuple[int, str, str]]:
    """(number from 1, place, line) of each line that is not blank; a byte-order mark in front is no part of the first.

    Raises:
        ValueError: there is none, or one holds what is no character.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff") if number == 1 else line
        if text.strip():
            place = f"{where}, line {number}"
            found.append((number, place, check_text(place, text)))
    if not found:
        raise ValueError(f"{where}: expected at least one line with text; got none")
    return found
