"""The clocks' paths on CUDA, line by line, with a torch.cuda that measures nothing."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import ceilings, measure
from benchmarks.step import clock as step_clock
from benchmarks.step import live_bytes
from fake_cuda import fake_cuda  # noqa: F401  a fixture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _busy(milliseconds):
    def call():
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass

    return call


@pytest.fixture(autouse=True)
def small_flush(monkeypatch):
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 1024)


def test_long_calls_are_timed_by_events(fake_cuda, monkeypatch):  # noqa: F811
    monkeypatch.setattr(measure, "HOST_SHARE", 10.0)
    timings = measure._time_on_cuda({"a": _busy(0.5), "b": _busy(1.0)}, CPU, measure.QUICK)
    assert {timing.method for timing in timings.values()} == {"events"} and not fake_cuda
    assert timings["b"].ms > timings["a"].ms >= 0.5 and timings["a"].host_ms > 0


def test_short_calls_are_replayed_for_the_whole_cell(fake_cuda):  # noqa: F811
    timings = measure._time_on_cuda({"a": lambda: None, "b": _busy(0.5)}, CPU, measure.QUICK)
    assert {timing.method for timing in timings.values()} == {"graph"} and len(fake_cuda) == 2
    assert all(timing.eager_ms and timing.host_ms for timing in timings.values())
    assert all(graph.replays >= 1 + measure.QUICK.least for graph in fake_cuda)


def test_who_cannot_be_captured_keeps_its_events_and_says_why(fake_cuda, monkeypatch):  # noqa: F811
    def graph(one, **options):
        raise ValueError("not while a plan is made\nand more")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    timing = measure._time_on_cuda({"a": lambda: None}, CPU, measure.QUICK)["a"]
    assert timing.method == "events" and timing.note == "not captured: ValueError: not while a plan is made"


def test_a_step_is_timed_between_two_events(fake_cuda):  # noqa: F811
    armed = []
    step = step_clock.Step(_busy(1.0), lambda: armed.append(1))
    assert 1.0 <= step_clock._sample(step, CUDA) < 50 and armed == [1]


def test_ceilings_are_medians_of_events(fake_cuda):  # noqa: F811
    assert 1e-3 <= ceilings._median_seconds(_busy(1.0), CUDA) < 0.05


def test_peaks_are_what_is_there_beyond_before(fake_cuda):  # noqa: F811
    assert measure.peak_bytes(lambda: None, CUDA) == 250
    found = live_bytes.measure_memory(lambda: "loss", lambda loss: None, CUDA)
    assert found == {"kept_bytes": 0, "peak_bytes": 250}
