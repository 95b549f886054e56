"""Texts that belong together, from columns to examples of SENTENCE_RETRIEVAL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_fast.training.data.columns import TEXT_COLUMNS, Table, Wanted
from ptv2_fast.training.data.examples import text_of
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet

PARTS = ("query", "positive", "negative")


def pair_columns(table: Table, wanted: Wanted) -> dict[str, str]:
    """Query, positive and, where there is one, negative; of texts alone the text (or the query)."""
    if not wanted.labelled:
        usual = [name for name in (*TEXT_COLUMNS, "query") if name in table.names]
        named = [table.need(name, "text_column") for name in wanted.texts] or usual
        table.refuse_several([(name,) for name in named], "text_column")
        if not named:
            raise table.missing(f"a column of {[*TEXT_COLUMNS, 'query']}", "text_column")
        return {"text": named[0]}
    if len(wanted.texts) == 1:
        raise ValueError(f"text_column: expected two or three names (query, positive, negative); got {wanted.texts}")
    if wanted.texts:
        return dict(zip(PARTS, (table.need(name, "text_column") for name in wanted.texts), strict=False))
    return {part: table.need(part, "text_column") for part in PARTS if part != "negative" or part in table.names}


def pair_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """Texts that belong together, or one text."""
    return {role: text_of(row, column).strip() for role, column in roles.items()}
