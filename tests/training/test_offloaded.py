"""Bases that accelerate spreads or offloads: it hooks every module, and weights come and go with those that compute."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import StepOptions, get_ptv2_model
from tiny_models import LABELS, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal

accelerate = pytest.importorskip("accelerate")

BATCH = padded(text_rows(), "left")
REAL = BATCH.attention_mask.bool()
ALL_ON = StepOptions(**{f.name: f.name not in ("compile_layers", "float8") for f in fields(StepOptions)})


def _offloaded(base) -> None:
    accelerate.cpu_offload(base, execution_device="cpu")
    assert next(base.parameters()).is_meta


def _hooked(base) -> None:
    """Hooks around the base, its children and what stands below them, all on one device."""
    places = {name: "cpu" for name, _ in base.named_children()}
    accelerate.dispatch_model(base, places, main_device="cpu", force_hooks=True)
    assert "forward" in vars(base)


def _results(model, task: str) -> list[torch.Tensor]:
    labels = {} if task == "FEATURE_EXTRACTION" else {"labels": (BATCH.input_ids % LABELS).masked_fill(~REAL, -100)}
    if task == "SEQ_CLS":
        labels = {"labels": BATCH.input_ids[:, -1] % LABELS}
    output = model(**BATCH.inputs, **labels)
    loss = output.loss if labels else output.last_hidden_state[REAL].square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        evaluated = model.eval()(**BATCH.inputs)
    states = evaluated.logits if labels else evaluated.last_hidden_state
    return [loss.detach(), states if states.dim() == 2 else states[REAL], *grads]


@pytest.mark.parametrize("place", [_offloaded, _hooked])
@pytest.mark.parametrize(
    ("family", "injection", "task"),
    [
        ("bert", "deep", "SEQ_CLS"),
        ("bert", "shallow", "TOKEN_CLS"),
        ("distilbert", "deep", "TOKEN_CLS"),
        ("albert", "prefix", "FEATURE_EXTRACTION"),
        ("modernbert", "deep", "TOKEN_CLS"),
        ("gpt2", "deep", "CAUSAL_LM"),
        ("llama", "deep", "CAUSAL_LM"),
        ("llama", "shallow", "CAUSAL_LM"),
    ],
)
def test_a_base_with_accelerates_hooks_gives_what_it_gives_without(family, injection, task, place):
    found = []
    for placed in (False, True):
        torch.manual_seed(5)
        model = tiny_model(family, injection, task).train()
        if placed:
            model.step_options = ALL_ON
            place(model.base_model)
        found.append(_results(model, task))
    for plain, hooked in zip(*found, strict=True):
        assert_equal(hooked, plain)


def test_what_needs_weights_is_off_where_they_are_offloaded(caplog):
    model = tiny_model("llama", "deep", "CAUSAL_LM").train()
    model.step_options = StepOptions(labelled_rows_loss=True, fused_projections=True, compile_layers=True)
    _offloaded(model.base_model)
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        plan = model.step_plan()
    assert not (plan.labelled_rows_loss or plan.fused_projections or plan.compile_layers)
    assert "fused_projections off (weights come and go: offloading)" in caplog.text


def test_an_offloaded_base_can_be_wrapped_and_generates():
    whole = tiny_model("llama", "deep", "CAUSAL_LM")
    base = tiny_base("llama", "CAUSAL_LM")
    _offloaded(base)
    model = get_ptv2_model(base, tiny_prompts("deep", "CAUSAL_LM")).eval()
    assert model.adapters["default"].encoder.prompts.device.type == "cpu"
    model.load_state_dict(whole.adapters.state_dict(prefix="adapters."), strict=False)
    texts = [m.generate(**BATCH.inputs, max_new_tokens=4, do_sample=False) for m in (whole, model)]
    assert torch.equal(*texts)


def test_an_offloaded_head_is_no_head_to_train():
    base = tiny_base("bert", "TOKEN_CLS")
    _offloaded(base)
    with pytest.raises(ValueError, match="'classifier' is offloaded: wrap the base, then offload it"):
        get_ptv2_model(base, tiny_prompts("deep", "TOKEN_CLS"))


def _come_and_go(base) -> dict[torch.nn.Parameter, torch.Tensor]:
    """As DeepSpeed's ZeRO-3 does it: a parameter is empty but while the very module that has it runs."""
    whole = {}
    for module in base.modules():
        own = list(module.parameters(recurse=False))
        for number, parameter in enumerate(own):
            whole.setdefault(parameter, parameter.data)
            parameter.ds_id = number
            parameter.data = parameter.data.new_empty(0)

        def gather(_, inputs, own=own):
            for parameter in own:
                parameter.data = whole[parameter]

        def release(_, inputs, output, own=own):
            for parameter in own:
                parameter.data = parameter.data.new_empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    return whole


@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM")])
@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_no_weight_is_read_but_by_its_own_module(family, injection, task):
    found = []
    for gathered in (False, True):
        torch.manual_seed(5)
        model = tiny_model(family, injection, task).train()
        whole = {}
        if gathered:
            model.step_options = ALL_ON
            whole = _come_and_go(model.base_model)
            assert model.step_plan().weights_owner == "DeepSpeed ZeRO-3"
        labels = BATCH.input_ids[:, -1] % LABELS if task == "SEQ_CLS" else BATCH.input_ids.masked_fill(~REAL, -100)
        loss = model(**BATCH.inputs, labels=labels).loss
        for parameter, data in whole.items():
            parameter.data = data  # DeepSpeed's backward hooks bring them again
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, hooked in zip(*found, strict=True):
        assert_equal(hooked, plain)
