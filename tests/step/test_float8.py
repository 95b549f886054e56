"""Frozen maps in float8: what they compute, what they leave alone, and what is said where they cannot."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny_seq2seq
from batches import padded, text_rows
from graph_steps import OFF, batches_for, optimizer_of
from ptv2_fast import GraphRunner, StepOptions, get_ptv2_model
from ptv2_fast.backbone.float8_linear import quantize_rows
from ptv2_fast.step import float8_maps
from ptv2_fast.step import layers as step_layers
from ptv2_fast.step.float8_maps import Float8Linear, find_float8, why_not_device
from ptv2_fast.step.options import plan_step
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits, relative_error

ON = replace(OFF, float8=True)
CPU = torch.device("cpu")
BATCH = padded(text_rows(), "right")
TASKS = {"bert": "TOKEN_CLS", "llama": "CAUSAL_LM"}


def _model(family: str, **sizes: int):
    changes = {"classifier_dropout": 0.0} if family == "bert" else {}
    return tiny_model(family, "deep", TASKS[family], base_changes=changes | sizes).train()


def _inputs(family: str):
    labels = BATCH.input_ids % 3 if family == "bert" else BATCH.input_ids
    return {**BATCH.inputs, "labels": labels.masked_fill(BATCH.attention_mask == 0, -100)}


def _step(model, options, inputs):
    model.step_options = options
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Emulated(torch.autograd.Function):
    """The same map, of numbers that are rounded to float8 and multiplied as they are."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return nn.functional.linear(_dequantized(x), _dequantized(weight), bias)

    @staticmethod
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        scales = quantize_rows(weight).scales.T
        return _dequantized(grad_output * scales) / scales.new_ones(1) @ (_dequantized(weight) / scales.T), None, None


def _dequantized(x):
    rows = quantize_rows(x.reshape(-1, x.shape[-1]))
    return (rows.values.double() * rows.scales.double()).view(x.shape).to(x.dtype)


def _emulate(model) -> None:
    """Let the base's own maps compute so, but not for prompts: their weights are read, and not the modules called."""
    for path, module in model.backbone.named_modules():
        if path.startswith(f"{model._family.layers_path}.") and type(module) is nn.Linear:
            module.forward = lambda x, one=module: _Emulated.apply(x, one.weight, one.bias)


def _projections_stay(model, monkeypatch) -> None:
    from ptv2_fast.backbone import projection

    monkeypatch.setattr(projection, "_is_plain", lambda module: type(module) is nn.Linear)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", TASKS)
def test_a_step_is_that_of_emulated_maps(family, unpad, monkeypatch):
    model, inputs = _model(family), _inputs(family)
    plain, exact = _step(model, replace(OFF, unpad=unpad), inputs)
    loss, grads = _step(model, replace(ON, unpad=unpad), inputs)
    _projections_stay(model, monkeypatch)
    _emulate(model)
    expected, emulated = _step(model, OFF, inputs)
    assert_equal(loss, expected, "loss", torch.bfloat16)
    assert plain != loss and grads.keys() == emulated.keys() == exact.keys()
    for name, grad in grads.items():
        # A number that stands between two of float8 goes either way: far less than what float8 itself does.
        assert relative_error(grad, emulated[name]) < 0.5 * relative_error(grad, exact[name]), name


@pytest.mark.parametrize("family", TASKS)
def test_fused_maps_have_the_same_outputs_and_gradients_as_near(family):
    """Each output has a scale of its own, but a gradient has one for all maps of an input."""
    model, inputs = _model(family), _inputs(family)
    _, exact = _step(model, OFF, inputs)
    loss, grads = _step(model, ON, inputs)
    fused, near = _step(model, replace(ON, fused_projections=True), inputs)
    assert_equal(fused, loss, "loss")
    found = find_float8(model.backbone, model._family.layers_path, CPU)
    assert len(model._frozen.layers.stand_ins(model.step_plan())) == found.served == found.maps
    for name, grad in near.items():
        assert relative_error(grad, exact[name]) < 2 * relative_error(grads[name], exact[name]), name
    model.gradient_checkpointing_enable()
    checkpointed, again = _step(model, replace(ON, fused_projections=True), inputs)
    assert_equal(checkpointed, fused, "loss")
    for name, grad in again.items():
        assert_equal(grad, near[name], name)


def test_compiled_layers_compute_the_same(monkeypatch):
    monkeypatch.setattr(step_layers, "COMPILER", "aot_eager")
    torch.compiler.reset()
    model, inputs = _model("llama", num_hidden_layers=1), _inputs("llama")
    options = replace(ON, fused_projections=True)
    loss, grads = _step(model, options, inputs)
    compiled, again = _step(model, replace(options, compile_layers=True), inputs)
    assert_equal(compiled, loss, "loss", torch.bfloat16)
    for name, grad in again.items():
        assert_equal(grad, grads[name], name, torch.bfloat16)


def test_under_autocast_a_step_trains():
    model, inputs = _model("llama"), _inputs("llama")
    expected, _ = _step(model, ON, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = _step(model, ON, inputs)
    assert_equal(loss.float(), expected, "loss", torch.bfloat16)
    assert all(grad.dtype is torch.float32 and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("fused", [False, True])
def test_training_reduces_the_loss_and_leaves_the_base_alone(fused):
    base = tiny_base("llama", "CAUSAL_LM")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(3)
    model = get_ptv2_model(base, tiny_prompts("deep", "CAUSAL_LM")).eval()
    inputs = _inputs("llama")
    model.step_options = OFF
    answer = model(**inputs).logits
    model.train().step_options = replace(ON, fused_projections=fused)
    model(**inputs).loss.backward()
    with torch.no_grad():
        assert_same_bits(model.eval()(**inputs).logits, answer, "logits of evaluation")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model.train()(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert list(base.state_dict()) == list(state)
    for name, value in base.state_dict().items():
        assert_same_bits(value, state[name], name)
    assert not any(isinstance(module, Float8Linear) for module in base.modules())


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_is_written_to_is_quantized_again_where_its_copy_is(fused):
    model, inputs = _model("llama"), _inputs("llama")
    options = replace(ON, fused_projections=fused)
    before, _ = _step(model, options, inputs)
    maps = model._frozen.layers._float8[fused, True]
    found = maps.modules()
    _step(model, options, inputs)
    assert maps.modules() is found, "views are kept by it"
    places = [part.data_ptr() for one in maps._copies.values() for part in one.rows]
    model.base_model.load_state_dict(tiny_base("llama", "CAUSAL_LM", seed=7).state_dict())
    after, _ = _step(model, options, inputs)
    assert places == [part.data_ptr() for one in maps._copies.values() for part in one.rows]
    fresh = _model("llama")
    fresh.base_model.load_state_dict(model.base_model.state_dict())
    fresh.adapters.load_state_dict(model.adapters.state_dict())
    assert_equal(after, _step(fresh, options, inputs)[0], "loss")
    assert_differs(after, before, "loss")
    model.base_model.bfloat16()
    assert_equal(_step(model, options, inputs)[0], after, "loss", torch.bfloat16)


@pytest.mark.parametrize("runner", [False, True])
def test_captured_steps_read_the_weights_as_they_are(runner, counts):
    """A replay that wrote to a copy itself would write elsewhere than the first one, which the stand-in refuses."""
    model = _model("llama")
    model.step_options = StepOptions(labelled_rows_loss=True, fused_projections=True, float8=True)
    batch = batches_for("llama text", count=1)[0]
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps = GraphRunner(model, optimizer) if runner else None

    def loss():
        return steps.step(batch) if steps is not None else model(**batch).loss

    for _ in range(4):
        before = loss()
    assert counts.replays >= 2
    with torch.no_grad():
        model.backbone.layers[0].mlp.down_proj.weight.mul_(-3)
    replays, after = counts.replays, loss()
    assert counts.replays > replays
    assert_differs(after, before, "loss")
    model.step_options = replace(model.step_options, cuda_graphs=False)
    assert_equal(after, model(**batch).loss, "loss")


def test_maps_that_cannot_stay_as_they_are_and_are_counted(said):
    model = _model("llama")
    layers = model.backbone.layers
    layers[0].mlp.up_proj.weight.requires_grad_(True)
    layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    layers[1].mlp.gate = nn.Linear(32, 16).requires_grad_(False)
    layers[1].mlp.other = type("Other", (nn.Linear,), {})(32, 16).requires_grad_(False)
    layers[1].mlp.odd = nn.Linear(32, 17).requires_grad_(False)
    model.step_options = ON
    stands = model._frozen.layers.stand_ins(model.step_plan())
    assert len(stands) == 12 and not {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj"} & stands.keys()
    (line,) = said("float8 on")
    assert "float8 on (asked for: 12 of 17 linear maps" in line and "in float32 on the CPU" in line
    for why in ("it trains", "it has hooks", "a router of experts", "a Other, and no nn.Linear", "no multiples of 16"):
        assert f"1 of them is left: {why}" in line or f"1 of them is left: its sizes are {why}" in line


def test_it_is_refused_where_no_map_can_be_in_float8(monkeypatch):
    with pytest.raises(ValueError, match="step_options.float8 must be None or False .* got True with 0 of .* Conv1D"):
        _step(tiny_model("gpt2", "deep", "CAUSAL_LM").train(), ON, _inputs("llama"))
    encoder_decoder = tiny_seq2seq.tiny_model("bart").train()
    encoder_decoder.step_options = ON
    with pytest.raises(ValueError, match="got True with an encoder-decoder runs its padded rows"):
        encoder_decoder.step_plan()
    inline = tiny_model("bert", "shallow", "TOKEN_CLS").train()
    with pytest.raises(ValueError, match="step_options.float8 must be None or False with a shallow prompt"):
        _step(inline, ON, _inputs("bert"))
    with pytest.raises(ValueError, match="got True with weights that come and go: offloading"):
        plan_step(ON, training=True, device=CPU, backend="torch", weights_owner="offloading")
    for unclear in ("e4m3", 1):
        with pytest.raises(ValueError, match=f"float8 must be True, False or None; got {unclear!r}"):
            StepOptions(float8=unclear)
    monkeypatch.setattr(float8_maps, "why_not_device", lambda device: "no such products")
    with pytest.raises(ValueError, match="14 of them are left: no such products"):
        _step(_model("llama"), ON, _inputs("llama"))


def test_old_cards_and_other_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert why_not_device(torch.device("cuda")) == "the card's compute capability is (8, 6), less than (8, 9)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_device(torch.device("cuda")) is None is why_not_device(CPU)
    assert "'mps'" in why_not_device(torch.device("mps"))


def test_a_copy_costs_one_byte_a_weight_and_four_a_row():
    model = _model("bert")
    _step(model, replace(ON, fused_projections=True), _inputs("bert"))
    layers = model._frozen.layers
    weights = [m.weight for p, m in model.backbone.named_modules() if p.startswith("encoder.") and type(m) is nn.Linear]
    assert layers.copied_bytes() == sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    twin = copy.deepcopy(model)
    assert twin._frozen.layers.copied_bytes() == 0
    assert_equal(_step(twin, ON, _inputs("bert"))[0], _step(model, ON, _inputs("bert"))[0], "loss", torch.bfloat16)
    model.unload()
    assert layers.copied_bytes() == 0
