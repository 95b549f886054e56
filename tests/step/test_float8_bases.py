"""Bases whose weights are float8 already: torchao's, whose own product has no backward, and transformers' in blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from batches import padded, text_rows
from captured_forwards import UNTIL_CAPTURED
from graph_steps import OFF
from ptv2_fast import StepOptions, get_ptv2_model
from ptv2_fast.backbone.float8_bases import has_float8_blocks, kept_float8, lacks_backward
from ptv2_fast.step.float8_maps import why_not
from tiny_models import tiny_base, tiny_prompts
from tolerances import assert_differs, assert_equal

BATCH = padded(text_rows(), "right")
INPUTS = {**BATCH.inputs, "labels": BATCH.input_ids.masked_fill(BATCH.attention_mask == 0, -100)}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


@pytest.fixture
def float8_base():
    """A base as torchao makes it on a card, with or without inputs that are quantized; its own call asks for one."""
    quantization = pytest.importorskip("torchao.quantization")
    workflow = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    inference = pytest.importorskip("torchao.float8.inference")

    def make(quantized_inputs: bool = True, rows: bool = True, family: str = "llama"):
        base = tiny_base(family, "CAUSAL_LM", **SIZES)
        by = quantization.PerRow() if rows else quantization.PerTensor()
        config = inference.Float8MMConfig(use_fast_accum=False)
        inputs = workflow.QuantizeTensorToFloat8Kwargs(granularity=by, mm_config=config) if quantized_inputs else None
        for module in base.model.modules():
            if type(module) is nn.Linear:
                weight = quantization.Float8Tensor.from_hp(
                    module.weight.detach(), granularity=by, mm_config=config, act_quant_kwargs=inputs
                )
                module.weight = nn.Parameter(weight, requires_grad=False)
        return base

    return make


def _wrapped(base, injection: str):
    torch.manual_seed(3)
    return get_ptv2_model(base, tiny_prompts(injection, "CAUSAL_LM")).train()


def _step(model, options):
    model.step_options = options
    model.zero_grad()
    loss = model(**INPUTS).loss
    loss.backward()
    return loss.detach(), model.adapters["default"].encoder.prompts.grad.clone()


def test_torchaos_own_product_has_no_backward(float8_base):
    """The reason for all this: where it gets one, nothing need stand in for it."""
    linear = float8_base().model.layers[0].mlp.up_proj
    y = linear(torch.randn(5, 64, requires_grad=True))
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_mm is not implemented"):
        y.sum().backward()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_prompts_train_over_float8_weights_that_quantize_their_inputs(injection, rows, float8_base, said):
    base = float8_base(rows=rows)
    model = _wrapped(base, injection)
    up = base.model.layers[0].mlp.up_proj
    assert lacks_backward(up) and kept_float8(up).values.data_ptr() == up.weight.qdata.data_ptr()
    loss, grad = _step(model, StepOptions())
    assert said("float8 on (maps without a backward of their own: 14 of 14 linear maps")
    assert model._frozen.layers.copied_bytes() == 0
    plain = tiny_base("llama", "CAUSAL_LM", **SIZES)
    for kept, own in zip(base.model.modules(), plain.model.modules(), strict=True):
        if type(own) is nn.Linear:
            own.weight = nn.Parameter(kept.weight.dequantize(), requires_grad=False)
    expected, near = _step(_wrapped(plain, injection), StepOptions(float8=True))
    assert_equal(loss, expected, "loss", torch.bfloat16)
    # The prompts' own projections are float8 in one and not in the other.
    assert torch.cosine_similarity(grad.flatten(), near.flatten(), 0) > 0.98
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(**INPUTS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        assert model.eval()(**INPUTS).logits.isfinite().all()


@pytest.mark.parametrize("rows", [True, False])
def test_steps_read_torchaos_data_as_they_are(rows, float8_base):
    model = _wrapped(float8_base(rows=rows), "deep")
    _step(model, StepOptions())
    maps = model._frozen.layers._float8[False, False]
    found, weight = maps.modules(), model.backbone.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.scale.mul_(-3)
    loss, _ = _step(model, StepOptions())
    assert maps.modules() is found
    assert_equal(loss, _step(copy.deepcopy(model), StepOptions())[0], "loss")
    # As `base.to` does it: the same parameter with other tensors in it.
    swapped = nn.Parameter(copy.deepcopy(weight.data), requires_grad=False)
    with torch.no_grad():
        swapped.scale.mul_(-3)
    torch.utils.swap_tensors(weight, swapped)
    after, _ = _step(model, StepOptions())
    assert_differs(after, loss, "loss")
    assert_equal(after, _step(copy.deepcopy(model), StepOptions())[0], "loss")
    model.backbone.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert "layers.0.mlp.down_proj" not in maps.modules()


def test_captured_passes_are_dropped_where_torchaos_data_are_others(float8_base, counts):
    """The weights of a base that moves are swapped, so that each parameter is the one that it was."""
    model = _wrapped(float8_base(), "deep")
    model.step_options = StepOptions(labelled_rows_loss=True)
    for _ in range(UNTIL_CAPTURED + 1):
        model(**INPUTS).loss.backward()
    weight, replays = model.backbone.layers[0].mlp.down_proj.weight, counts.replays
    assert replays >= 2
    torch.utils.swap_tensors(weight, nn.Parameter(copy.deepcopy(weight.data), requires_grad=False))
    model(**INPUTS).loss.backward()
    assert counts.replays == replays


def test_what_has_a_backward_stays_as_it_is_unless_asked(float8_base):
    base = float8_base(quantized_inputs=False)
    model = _wrapped(base, "prefix")
    model.step_options = StepOptions()
    assert not model.step_plan().float8
    own, _ = _step(model, OFF)
    model.step_options = replace(OFF, float8=True)
    assert len(model._frozen.layers.stand_ins(model.step_plan())) == 14
    asked, _ = _step(model, replace(OFF, float8=True))
    assert_differs(asked, own, "loss")
    assert model._frozen.layers.copied_bytes() == 0


def test_steps_that_could_not_be_differentiated_are_refused(float8_base):
    model = _wrapped(float8_base(), "deep")
    with pytest.raises(ValueError, match="step_options.float8 must be None or True .* got False with 14 of 14"):
        _step(model, OFF)
    shallow = _wrapped(float8_base(), "shallow")
    with pytest.raises(ValueError, match="injection must be 'deep' or 'prefix' to train over torchao's float8"):
        _step(shallow, StepOptions())
    model.backbone.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="13 of 14 linear maps, 1 of them is left: it has hooks"):
        _step(_wrapped(model.base_model, "deep"), StepOptions())


def test_blocks_of_transformers_are_left_to_transformers():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = finegrained.FP8Linear(128, 128, block_size=(128, 128))
    assert has_float8_blocks(linear) and not lacks_backward(linear) and kept_float8(linear) is None
    assert "float8 in blocks (FineGrainedFP8Config)" in why_not("layers.0.mlp.up_proj", linear.requires_grad_(False))
