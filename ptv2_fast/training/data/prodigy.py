"""Prodigy's JSON lines: what somebody has accepted is an example, and choices that were made are labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HASHES = ("_input_hash", "_task_hash")
_ANSWERS = ("accept", "reject", "ignore")


def is_answered(values: Mapping[str, Any]) -> bool:
    """Whether a record is one of Prodigy, with what somebody answered."""
    known = any(name in values for name in (*_HASHES, "spans", "options"))
    return known and values.get("answer") in _ANSWERS


def answered_values(where: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A record's columns, with "labels" where somebody chose among options.

    Returns:
        None where it was rejected or ignored: what it says is not so, or not known.

    Raises:
        ValueError: what was chosen is no list.
    """
    if values["answer"] != "accept":
        return None
    left = {name: value for name, value in values.items() if name != "answer" and name not in _HASHES}
    if "options" not in values:
        return left
    chosen = values.get("accept", [])
    if not isinstance(chosen, list):
        raise ValueError(f"{where}: expected a list of what was chosen in 'accept'; got {chosen!r}")
    return {**{name: value for name, value in left.items() if name not in ("options", "accept")}, "labels": chosen}
