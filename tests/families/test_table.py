"""The table of families says what the registry says."""

from __future__ import annotations

from pathlib import Path

import tiny_features
from ptv2_fast.families.table import table
from tiny_models import DECODERS, FAMILIES, NOT_SERVED
from tiny_seq2seq import TINY

ENCODER_DECODERS = {tiny.model_type for tiny in TINY.values()}
FILE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_table_is_current():
    assert FILE.read_text(encoding="utf-8") == table()


def test_the_table_has_the_families_that_are_tested():
    rows = [line.split(" | ") for line in table().splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == {*FAMILIES, *NOT_SERVED, *tiny_features.FAMILIES, *ENCODER_DECODERS}
    assert {row[0].strip("| `") for row in rows if row[1] == "decoder"} == {*DECODERS, *NOT_SERVED}
    assert {row[0].strip("| `") for row in rows if row[1] == "encoder-decoder"} == ENCODER_DECODERS
    images = {row[0].strip("| `") for row in rows if row[1] == "encoder of images"}
    assert images == set(tiny_features.IMAGES)
    assert all(("decoder" in row[1]) == (row[6] == "yes") for row in rows)
