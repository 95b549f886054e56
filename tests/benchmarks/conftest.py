"""Small cells and runs that the benchmark tests share."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from benchmarks.attention.cases import case_of
from benchmarks.context import Context
from benchmarks.record import ResultFile


@pytest.fixture(autouse=True)
def _what_is_there_stays():
    """Suites collect garbage at every cell, which looks at all that was imported and traced since the start."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_context(tmp_path):
    """A run on the CPU that has `seconds` left."""

    def make(seconds: float = 600.0, **options) -> Context:
        result = ResultFile(tmp_path / "run.json", "kernels", ["test"], {"device": "cpu"})
        deadline = time.monotonic() + seconds
        return Context(torch.device("cpu"), True, tmp_path, deadline, result, **options)

    return make


@pytest.fixture
def padded_case():
    """Grouped heads, padding, text over prompt, in float32."""
    return case_of("tiny", 3, 10, 4, padding=0.4, dtype="fp32")
