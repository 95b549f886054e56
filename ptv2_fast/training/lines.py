"""Records as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_fast.training.tasks import BY_PREDICTION


def line_of(record: Mapping[str, Any]) -> str:
    """A record as text for a terminal: columns, or one `token<TAB>tag` a line and a blank line."""
    task = next(task for task in BY_PREDICTION.values() if any(key in record for key in task.shows))
    return task.line(record)


def lines_of(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """A record of `answers_of` as text for a terminal: each adapter's lines behind its name, and a blank line."""
    lines = [
        f"{name}\t{line}" for name in names if name in record for line in line_of(record[name]).strip("\n").split("\n")
    ]
    return "\n".join(lines) + "\n"
