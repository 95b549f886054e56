"""The measurement of requests: turns, ratios, and a judge that can say no."""

from __future__ import annotations

import time

import pytest

from batched_generation import adapted, needs_pages, pages, settings, texts
from benchmarks.decode import requests


def test_ratios_are_of_the_processors_time_within_a_turn():
    turns: list[tuple[str, int]] = []

    def busy(name, seconds):
        def serve(given, turn):
            turns.append((name, turn))
            assert len(given) == 4
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return serve

    run = {"bare": busy("bare", 0.01), "one": busy("one", 0.02), "mixed": busy("mixed", 0.06)}
    row = requests.measure(run, lambda count: [[1]] * count, 4, 2)
    assert turns == [(name, turn) for turn in range(3) for name in run]
    assert 2.5 < row["mixed_over_one"] < 3.5 and 1.6 < row["one_over_bare"] < 2.4
    assert row["one"]["processor_ms_per_request"] == pytest.approx(5, rel=0.3)
    assert requests.table([row]).splitlines()[-1].startswith("| 4 | ")


@needs_pages
def test_the_judge_compares_with_generate(monkeypatch):
    monkeypatch.setattr(requests, "NEW", 6)
    model, inputs = adapted(), texts(5, 9, 3, 7)
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        requests.check(model, manager, inputs, ["prefix", "shallow", "gated", "default"])
        model.set_adapter("prefix")
        added = manager.add_requests
        monkeypatch.setattr(manager, "add_requests", lambda given, adapter_names: added(given))
        with pytest.raises(AssertionError, match="tokens must be those of generate"):
            requests.check(model, manager, inputs, ["shallow", "gated", "default", "shallow"])
