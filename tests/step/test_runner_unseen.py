"""What a captured step of a graph runner would not see: around it, in the batch, in modules and in the adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graph_steps import WIDE, batches_for, model_of, optimizer_of, plain_of
from ptv2_fast import GraphRunner
from ptv2_fast.step.capture import WARM_UP_STEPS
from tiny_models import tiny_prompts
from tolerances import assert_equal

TAGS, TEXT = "roberta tags, own head", "llama text"
BEFORE_CAPTURE = 1 + WARM_UP_STEPS


def _steady(case):
    """A runner that has captured the one size of its case's batches, its model and a batch."""
    model = model_of(case)
    runner = GraphRunner(model, optimizer_of(model), buckets=WIDE)
    batch = batches_for(case, count=1)[0]
    for _ in range(BEFORE_CAPTURE + 1):
        runner.step(batch)
    assert runner.captured == 1
    return runner, model, batch


def _loss_of(model, batch, case):
    """The loss of a model as a plain loop computes it."""
    plain = plain_of(case)
    plain.load_state_dict(model.state_dict())
    return plain(**batch).loss


def test_steps_under_autocast_are_captured_for_it(counts):
    """Gradients are computed outside of it, as in any loop; without it other passes run."""
    model, plain = model_of(TAGS), plain_of(TAGS)
    optimizers = [optimizer_of(m) for m in (model, plain)]
    runner = GraphRunner(model, optimizers[0], buckets=WIDE)
    batch = batches_for(TAGS, count=1)[0]
    for step in range(2 * BEFORE_CAPTURE + 2):
        on = step <= BEFORE_CAPTURE
        # Each step from where the other one is: what rounds in 16 bits soon differs.
        plain.load_state_dict(model.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = runner.step(batch)
        optimizers[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            expected = plain(**batch).loss
        expected.backward()
        assert_equal(loss, expected, f"loss of step {step}", dtype=torch.bfloat16 if on else torch.float32)
    assert runner.captured == 2 and counts.captures == 3


def test_float16_around_a_step_is_refused():
    runner = GraphRunner(model := model_of(TAGS), optimizer_of(model))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="the autocast around a step must be"):
        runner.step(batches_for(TAGS, count=1)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused(mode, counts):
    """A replay would train where a loop raises."""
    runner, model, batch = _steady(TAGS)
    before = [parameter.clone() for parameter in model.parameters()]
    with mode(), pytest.raises(RuntimeError, match=r"outside no_grad\(\) and inference_mode\(\)"):
        runner.step(batch)
    assert all(map(torch.equal, before, model.parameters()))


def test_deterministic_algorithms_have_passes_of_their_own(counts):
    runner, _, batch = _steady(TAGS)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(WARM_UP_STEPS + 1):
            runner.step(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    runner.step(batch)
    assert runner.captured == 2


class _Doubled(TorchFunctionMode):
    """Attention steered from outside, as long as the mode is on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


def test_modes_and_hooks_take_part(counts, said):
    runner, model, batch = _steady(TEXT)
    plain, replays, seen = float(_loss_of(model, batch, TEXT).detach()), counts.replays, []
    with _Doubled():
        assert abs(float(runner.step(batch)) - plain) > 1e-3
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    runner.step(batch)
    handle.remove()
    assert seen == ["layer"] and counts.replays == replays and len(said("steps run eagerly")) == 2
    runner.step(batch)
    assert counts.replays == replays + 2 and not said("dropped")


def test_prompts_that_somebody_computes(counts, said):
    model, batch = model_of(TAGS), batches_for(TAGS, count=1)[0]
    encoder = model.adapters["default"].encoder
    source = nn.Parameter(encoder.prompts.detach().clone())
    del encoder.prompts
    runner = GraphRunner(model, torch.optim.AdamW([source], lr=1e-2))
    for _ in range(BEFORE_CAPTURE + 2):
        encoder.prompts = source * 2
        before = source.detach().clone()
        runner.step(batch)
        assert not torch.equal(before, source)
    assert counts.captures == 0 and len(said("a tensor that is no parameter")) == 1


def test_a_head_with_somebodys_own_module(counts, said):
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, states):
            return super().forward(states) * self.scale

    model, batch = model_of(TAGS), batches_for(TAGS, count=1)[0]
    head = model.adapters["default"].heads["own"]
    head.linear = Scaled(head.linear.in_features, head.linear.out_features)
    runner = GraphRunner(model, optimizer_of(model))
    for scale in range(BEFORE_CAPTURE + 2):
        head.linear.scale = float(scale)
        loss = runner.step(batch)
    assert loss.isfinite() and counts.captures == 0 and len(said("the adapter has a Scaled of ")) == 1


def test_layers_that_are_skipped_at_random(counts, said):
    model, batch = model_of(TEXT), batches_for(TEXT, count=1)[0]
    model.base_model.config.layerdrop = 0.5
    runner = GraphRunner(model, optimizer_of(model))
    for _ in range(BEFORE_CAPTURE + 1):
        runner.step(batch)
    assert counts.captures == 0 and len(said("layerdrop")) == 1


def test_padding_without_a_mask(counts, said):
    """The positions of some families are counted by the padding's id where there is no mask."""
    runner, model, batch = _steady(TAGS)
    del batch["attention_mask"]
    assert (batch["input_ids"] == 1).any()
    replays, expected = counts.replays, _loss_of(model, batch, TAGS)
    assert_equal(runner.step(batch), expected, "loss")
    assert counts.replays == replays and len(said("neither packed nor captured: there is padding")) == 1


@pytest.mark.parametrize("deleted", [False, True])
def test_another_adapter_needs_another_optimizer(deleted, counts):
    runner, model, batch = _steady(TEXT)
    torch.manual_seed(8)
    model.add_adapter("other", tiny_prompts("deep", "CAUSAL_LM"))
    model.set_adapter("other")
    if deleted:
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="optimizer must have parameters that train with the active adapter 'other'"):
        runner.step(batch)
    if not deleted:
        model.set_adapter("default")
        assert runner.step(batch).isfinite()
