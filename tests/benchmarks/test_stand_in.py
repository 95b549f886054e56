"""The stand-in for capture, and with it the captured provider as a card sees it: judged right, timed as replays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.stand_in import captured_on_cpu
from benchmarks.step import stream as step_stream
from benchmarks.step import suite as steps_suite
from benchmarks.step.bench import GroupBench
from benchmarks.step.cases import StepCase, tiny_groups
from benchmarks.step.clock import StepEffort, time_steps
from benchmarks.step.optimized import make_step
from benchmarks.step.providers import step_providers
from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.graph_runner import GraphRunner

CPU = torch.device("cpu")
SEVEN = StepEffort(seconds=0.0, least=7, most=7, warmups=2)
NAMES = ("ours_0_plain", "ours_1_unpad", "ours_3_fused_projections", "ours", "ours_p0", "ours_graph", "literal_sdpa")
PROVIDERS = [p for p in step_providers() if p.name in NAMES]
# Those with a captured step: there is none with several tasks.
GROUPS = [group for group in tiny_groups() if group.first.peers != "tasks"]
# A pass and an update.
REPLAYS = 2


def _watched(step, counts, seen):
    """A step that notes what was captured, run eagerly and replayed in it."""

    def run():
        before = (counts.captures, counts.warm_ups, counts.replays)
        result = step.run()
        after = (counts.captures, counts.warm_ups, counts.replays)
        seen.append(tuple(b - a for a, b in zip(before, after, strict=True)))
        return result

    return replace(step, run=run)


def _judged(make_context, group, providers=PROVIDERS):
    bench = GroupBench(group, make_context(), providers)
    return bench, bench.set_up(bench.providers, [])


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.first.id)
def test_every_timed_step_of_the_graph_is_a_replay(make_context, group):
    """With all that others do to the model that they share with it."""
    with captured_on_cpu() as counts:
        bench, entries = _judged(make_context, group)
        assert {peers["ours_graph"]["status"] for peers in entries.values()} == {"passed"}, entries
        for case, batch in bench.batches.items():
            steps = {name: make_step(bound, batch) for name, bound in bench.bound.items()}
            seen = []
            steps["ours_graph"] = _watched(steps["ours_graph"], counts, seen)
            timings, failed = time_steps(steps, CPU, SEVEN, seconds_left=60)
            assert not failed and timings["ours_graph"].samples == 7 and len(timings) > 3
            assert seen[-7:] == [(0, 0, REPLAYS)] * 7, (case, seen)


def test_a_step_that_leaves_no_gradient_is_judged_wrong(make_context, monkeypatch):
    """The judge sees the captured path: it was zero at the end of a step once, on CUDA alone."""
    step = GraphRunner._captured

    def forgetful(self, packed, gradients):
        loss = step(self, packed, gradients)
        gradients.begin()
        return loss

    monkeypatch.setattr(GraphRunner, "_captured", forgetful)
    with captured_on_cpu():
        _, entries = _judged(make_context, tiny_groups()[0])
    found = {peers["ours_graph"]["status"] for peers in entries.values()}
    assert found == {"wrong"}
    assert all("gradient" in peers["ours_graph"]["reason"] for peers in entries.values())


def test_drawn_lengths_are_replayed(make_context, monkeypatch):
    context = make_context()
    stream = step_stream.make_stream(StepCase("tiny-bert", 3, 40, 4, dtype="fp32"), 6, passes=3, median=25)
    seen, make = [], step_stream.make_step
    with captured_on_cpu() as counts:
        # Only the runner's steps capture or replay.
        monkeypatch.setattr(step_stream, "make_step", lambda bound, batch: _watched(make(bound, batch), counts, seen)
                            if bound.take is not None else make(bound, batch))  # fmt: skip
        monkeypatch.setattr(step_stream, "_NAMES", ("ours", "ours_graph", "literal_sdpa"))
        monkeypatch.setattr(step_stream, "streams_of", lambda context: [stream])
        assert step_stream.run_streams(context) == "complete"
    (cell,) = context.result.cells
    assert cell["peers"]["ours_graph"]["status"] == "timed"
    timed = stream.passes * len(stream.lengths)
    assert seen[-timed:] == [(0, 0, REPLAYS)] * timed, seen
    # Passes of several sizes, and an update.
    assert counts.captures > 2


def test_a_whole_run_takes_the_captured_path(make_context, monkeypatch):
    monkeypatch.setattr(steps_suite, "tiny_groups", lambda: tiny_groups()[:1])
    monkeypatch.setattr(step_stream, "_NAMES", ("ours", "ours_graph"))
    context = make_context()
    providers = [p for p in PROVIDERS if p.name in ("ours", "ours_graph")]
    with captured_on_cpu() as counts:
        assert steps_suite.run(context, providers, profiled=False) == "complete"
    cells = [cell for cell in context.result.cells if "peers" in cell]
    assert {cell["peers"]["ours_graph"]["status"] for cell in cells} == {"timed"} and counts.replays > 20


def test_it_is_there_within_its_context_alone():
    before = dict(CAPTURES)
    with captured_on_cpu() as counts, captured_on_cpu() as inner:
        CAPTURES["cpu"](CPU).warm_up(lambda: None)
    assert CAPTURES == before and inner.warm_ups == 1 and counts.warm_ups == 0
    with pytest.raises(KeyError, match="stop"), captured_on_cpu():
        raise KeyError("stop")
    assert CAPTURES == before


def test_a_capture_runs_nothing_and_a_replay_reads_what_buffers_hold():
    with captured_on_cpu() as counts:
        x, total = torch.ones(2), torch.zeros(())
        replay = CAPTURES["cpu"](CPU)(lambda: total.add_(x.sum()).clone())
        assert total == 0 and counts.captures == 1 and counts.replays == 0
        first = replay()
        assert first == 2
        x.fill_(5)
        assert replay() is first and first == 12 and total == 12 and counts.replays == 2


def test_a_replay_that_writes_elsewhere_is_found():
    weight = torch.ones(2, requires_grad=True)
    weight.grad = held = torch.zeros(2)
    with captured_on_cpu():
        replay = CAPTURES["cpu"](CPU)(lambda: (weight * 3).sum().backward())
        replay()
        replay()
        assert held.tolist() == [6, 6]
        weight.grad = torch.zeros(2)
        with pytest.raises(RuntimeError, match="writes to other memory"):
            replay()
        weight.grad = None
        with pytest.raises(RuntimeError, match="writes to other memory"):
            replay()
        weight.grad = held
        replay()
