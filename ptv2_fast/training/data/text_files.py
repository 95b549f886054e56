"""Plain text: each line that is not blank is a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ptv2_fast.training.data.rows import Row, lines_of, read_text


def text_rows(path: Path) -> Iterator[Row]:
    """Each line that is not blank as a row with the column `text`."""
    for number, line in lines_of(path, read_text(path)):
        if line.strip():
            yield Row(f"{path}, line {number}", {"text": line})
