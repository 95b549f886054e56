"""What a graph runner asks a model once: again where somebody changed what the answer depends on, and nowhere else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.stand_in import captured_on_cpu
from graph_steps import CASES, batches_of, model_of, optimizer_of
from ptv2_fast.step.graph_runner import WARM_UP_STEPS, GraphRunner
from ptv2_fast.step.look import Attributes
from ptv2_fast.step.options import StepOptions


@pytest.fixture(autouse=True)
def pretend_cuda():
    with captured_on_cpu():
        yield


def _steady(case):
    """A runner that replays, its model and a batch."""
    model = model_of(case)
    runner = GraphRunner(model, optimizer_of(model))
    batch = batches_of(CASES[case][2], count=1)[0]
    for _ in range(WARM_UP_STEPS + 3):
        runner.step(batch)
    assert runner.captured == 1 and runner._look() is runner._look()
    return runner, model, batch


def _hook(model):
    model.base_model.lm_head.register_forward_hook(lambda *_: None)


def _forward(model):
    model.base_model.lm_head.forward = lambda x: x


def _loss(model):
    model.loss_function = lambda **_: torch.zeros(())


def _softcap(model):
    model.config.final_logit_softcapping = 3.0


def _experts(model):
    model.config.output_router_logits = True


def _spread(model):
    model.base_model.hf_device_map = {"": "cpu"}


def _equal_configuration(model):
    model.base_model.config = copy.deepcopy(model.base_model.config)


def _shallow(model):
    adapter = model.adapters["default"]
    adapter.config = replace(adapter.config, injection="shallow")


def _more_heads(model):
    heads = model.adapters["default"].heads
    heads["more"] = copy.deepcopy(heads["own"])


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("llama text", _hook, "hooks the head"),
        ("llama text", _forward, "hooks the head"),
        ("llama text", _loss, "loss is another one"),
        ("llama text", _softcap, "changes its logits"),
        ("llama text", _experts, "balanced"),
        ("llama text", _spread, "spread over devices"),
        ("llama text", lambda model: (_equal_configuration(model), _softcap(model)), "changes its logits"),
        ("bert rows, first token", _loss, "loss is another one"),
        ("bert rows, first token", _shallow, "shallow prompt"),
        ("bert rows, first token", _more_heads, "several heads"),
    ],
)
def test_what_can_be_packed_no_more_is_not(case, change, reason):
    runner, model, _ = _steady(case)
    change(model)
    assert reason in (runner._look().not_packed or "")


@pytest.mark.parametrize("first", [_equal_configuration, lambda model: None])
def test_what_is_changed_after_a_look_is_seen_too(first):
    runner, model, batch = _steady("llama text")
    first(model)
    runner.step(batch)
    _softcap(model)
    assert runner._look().not_packed is not None
    model.config.final_logit_softcapping = None
    assert runner._look().not_packed is None and runner.captured == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "step_options", StepOptions(cuda_graphs=False)),
        lambda model: model.eval(),
        lambda model: model.gradient_checkpointing_enable(),
    ],
)
def test_what_can_be_captured_no_more_is_not(change):
    runner, model, _ = _steady("llama text")
    change(model)
    assert runner._look().not_captured is not None


def test_a_longer_or_shorter_text_is_seen():
    runner, model, _ = _steady("gpt2 text")
    limit = runner._look().limit
    adapter = model.adapters["default"]
    adapter.config = replace(adapter.config, num_virtual_tokens=adapter.config.num_virtual_tokens + 1)
    assert runner._look().limit == limit - 1


def test_another_optimizers_groups_are_seen():
    runner, model, _ = _steady("llama text")
    runner._optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert runner._look() is not None and runner.captured == 0


def test_what_refuses_to_be_compared_is_another_one():
    model = model_of("llama text")
    model.base_model.scale = torch.ones(3)
    attributes = Attributes(model)
    assert attributes.same()
    model.base_model.scale = torch.ones(3)
    assert not attributes.same()


def test_an_attribute_that_nobody_reads_drops_nothing():
    runner, model, batch = _steady("llama text")
    look = runner._look()
    model.base_model.note = "mine"
    runner.step(batch)
    assert runner.captured == 1 and runner._look() is not look and runner._look() is runner._look()
