"""Settings of every test: one thread, Triton interpreted without a GPU, the shared helpers."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import logging
import os
import sys
from pathlib import Path

import pytest

# Importing, which takes most of collecting, makes no garbage worth looking for; `pytest_collection` is the end of it.
gc.disable()
import torch  # noqa: E402

# Triton reads the variable when a kernel is decorated, so it stands before any import of ours.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Helpers are plain modules: with --import-mode=importlib tests are in no package they could share.
sys.path.insert(0, str(Path(__file__).parent / "support"))

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # importing, tracing and interpreting make many small objects and few circles

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    importlib.import_module("quick_interpreter").install()
importlib.import_module("other_rounding").install_if_asked()


_frozen_modules = 0
atexit.register(gc.unfreeze)  # or modules in C++ report as leaks what lives until the end


def _keep():
    """What is there by now stays: transformers, accelerate and torch collect garbage in every run, in all of it."""
    global _frozen_modules
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported by now stays."""
    found = yield
    _keep()
    gc.enable()
    return found


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What a test has imported, and what the tests of a file have cached, stays as well."""
    if len(sys.modules) != _frozen_modules or nextitem is None or nextitem.path != item.path:
        gc.collect()
        _keep()


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def counts():
    """Steps are captured, by a stand-in; how often it captured and replayed."""
    from benchmarks.stand_in import captured_on_cpu

    with captured_on_cpu() as found:
        yield found


@pytest.fixture
def said(caplog):
    """What was logged that has some words in it."""
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        yield lambda part: [r.getMessage() for r in caplog.records if part in r.getMessage()]
