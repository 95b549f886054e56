"""Phases of a run are forked from the server of all tests."""

from __future__ import annotations

import pytest

from processes import forkserver


@pytest.fixture(scope="session", autouse=True)
def _server():
    forkserver()
