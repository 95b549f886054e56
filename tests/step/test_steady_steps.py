"""What the host does for a step that replays what has been captured: little, and no more for more rows or layers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.stand_in import StandIn, captured_on_cpu
from graph_steps import CASES, optimizer_of
from ptv2_fast import PTuningV2Model
from ptv2_fast.step import graph_runner
from ptv2_fast.step.graph_runner import WARM_UP_STEPS, GraphRunner
from ptv2_fast.step.options import StepOptions
from tiny_models import tiny_model

# A batch to the device, gradients to zero, a copy of the loss; and one to spare.
MOST_OPERATIONS = 4
# Of Python functions and of others, before the pass is launched, which is when the device waits, and in all. What is
# more by a few belongs behind the launch, or is asked for once.
MOST_CALLS_BEFORE, MOST_CALLS = 175, 250
# Of a forward that replays, and its backward, in any loop.
MOST_FORWARD_CALLS = 520
STEADY = ["bert tags, base head", "bert rows, first token", "llama text"]


class Launched(StandIn):
    """A device that has its own time: of a replay the host sees nothing, once it has run.

    Attributes:
        on_launch: called by every replay.
    """

    on_launch = staticmethod(lambda: None)

    def __call__(self, call):
        results = []

        def replay():
            if not results:
                results.append(call())
            Launched.on_launch()
            return results[0]

        return replay


class _Launch(Exception):
    """The launch of a pass."""


class Operations(TorchDispatchMode):
    """Notes the operations of torch, but for those that make a tensor of an array, or an array of a tensor."""

    FREE = (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default)

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.FREE:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _calls(run, *events):
    """How many of the profiler's events a call makes: "call" of a Python function, "c_call" of any other."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in events

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def _batch(task, rows, tokens):
    """Padding on the right, and token types."""
    lengths = torch.arange(rows) % (tokens - 1) + 2
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.arange(rows * tokens).view(rows, tokens) % 30 + 3
    labels = lengths % 3 if task == "SEQ_CLS" else (ids % 3).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _steady(case, rows=2, tokens=5, layers=2):
    """A step whose pass and update have been captured and replayed."""
    family, injection, task, config = CASES[case]
    torch.manual_seed(0)
    model = tiny_model(family, injection, task, base_changes={"num_hidden_layers": layers}, **config).train()
    batch = _batch(task, rows, tokens)
    if family == "bert":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    runner = GraphRunner(model, optimizer_of(model))
    for _ in range(WARM_UP_STEPS + 4):
        runner.step(batch)
    assert runner.captured == 1 and runner._replay_update is not None
    return lambda: runner.step(batch)


@pytest.fixture(autouse=True)
def launched():
    with captured_on_cpu(Launched):
        yield


@pytest.mark.parametrize("case", STEADY)
def test_a_steady_step_asks_for_few_operations(case, monkeypatch):
    step = _steady(case)
    # Under a mode that watches operations, as this one, steps are eager.
    monkeypatch.setattr(graph_runner, "why_not_now", lambda device: None)
    with Operations() as operations:
        step()
    assert len(operations.names) <= MOST_OPERATIONS, operations.names


@pytest.mark.parametrize("case", STEADY)
def test_a_steady_step_makes_few_calls(case):
    assert _calls(_steady(case), "call", "c_call") <= MOST_CALLS


@pytest.mark.parametrize("case", STEADY)
def test_little_is_done_before_the_launch(case, monkeypatch):
    step = _steady(case)

    def stop():
        raise _Launch

    launched = []

    def to_the_launch():
        try:
            step()
        except _Launch:
            launched.append(True)

    monkeypatch.setattr(Launched, "on_launch", staticmethod(stop))
    assert _calls(to_the_launch, "call", "c_call") <= MOST_CALLS_BEFORE and launched


@pytest.mark.parametrize("case", STEADY)
def test_more_rows_and_layers_call_no_more(case):
    """Rows are packed all at once, and weights looked at all at once."""
    few = _calls(_steady(case), "call", "c_call")
    assert few == _calls(_steady(case, 16, 40), "call", "c_call")
    assert few == _calls(_steady(case, layers=6), "call", "c_call")


@pytest.mark.parametrize("case", STEADY)
def test_a_steady_step_walks_no_model(case, monkeypatch):
    step = _steady(case)

    def walked(*_):
        raise AssertionError("the model is walked")

    monkeypatch.setattr(PTuningV2Model, "step_plan", walked)
    monkeypatch.setattr(torch.nn.Module, "modules", walked)
    step()


def _steady_forward(case, layers=2):
    """A forward and backward of a model's own that have been captured and replayed."""
    family, injection, task, config = CASES[case]
    torch.manual_seed(0)
    model = tiny_model(family, injection, task, base_changes={"num_hidden_layers": layers}, **config).train()
    model.step_options = StepOptions(labelled_rows_loss=True)
    batch = _batch(task, 2, 5)
    step = lambda: model(**batch).loss.backward()  # noqa: E731
    for _ in range(WARM_UP_STEPS + 2):
        step()
    assert model._captured_forward.captured == 1
    return step


@pytest.mark.parametrize("case", STEADY)
def test_a_steady_forward_makes_few_calls_whatever_the_layers(case):
    few, many = (_calls(_steady_forward(case, layers), "call", "c_call") for layers in (2, 6))
    assert many == few <= MOST_FORWARD_CALLS
