"""What tests of captured steps share: a stand-in that captures, and what was logged meanwhile."""

from __future__ import annotations

import logging

import pytest

from benchmarks.stand_in import captured_on_cpu


@pytest.fixture
def counts():
    """Steps are captured, by a stand-in; how often it captured and replayed."""
    with captured_on_cpu() as found:
        yield found


@pytest.fixture
def said(caplog):
    """What was logged that has some words in it."""
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        yield lambda part: [r.getMessage() for r in caplog.records if part in r.getMessage()]
