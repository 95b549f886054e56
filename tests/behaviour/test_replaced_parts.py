"""Parts that somebody replaces after wrapping: what runs is what is there now, and not what was there before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import tiny_seq2seq
from batches import padded, text_rows
from ptv2_fast import PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_name, backbone_of
from ptv2_fast.backbone.view import TRACES_VIEWS
from ptv2_fast.saving.export import prompt_tensors
from tiny_models import DECODERS, tiny_base, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

BATCH = padded(text_rows(), "left")
SEQ2SEQ = ("t5", "bart", "mbart")
FAMILIES = ("bert", "albert", "modernbert", "deberta-v2", "gpt2", "llama", "gemma2", *SEQ2SEQ)


def _base(family: str, **options):
    if family in SEQ2SEQ:
        return tiny_seq2seq.tiny_base(family)
    return tiny_base(family, "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS", **options)


def _model(family: str, injection: str = "deep", **options) -> PTuningV2Model:
    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"
    return get_ptv2_model(_base(family, **options), tiny_prompts(injection, task)).eval()


@torch.no_grad()
def _answer(model):
    inputs = tiny_seq2seq.pair().inputs if model.config.is_encoder_decoder else BATCH.inputs
    return model(**inputs).logits


def _anew(model: PTuningV2Model) -> PTuningV2Model:
    """Another wrapper of a copy of the base, with the same tensors: it has never seen anything else."""
    adapter = model.adapters["default"]
    fresh = get_ptv2_model(copy.deepcopy(model.base_model), adapter.config).train(model.training)
    fresh.adapters["default"].load_state_dict(adapter.state_dict())
    fresh.step_options = model.step_options
    return fresh


def _changed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.roll(1, -1) * 1.5)
    return module


def _other_encoder(model):
    model.adapters["default"].encoder = _changed(copy.deepcopy(model.adapters["default"].encoder))


def _other_adapter(model):
    model.adapters["default"] = _changed(copy.deepcopy(model.adapters["default"]))


def _other_backbone(model):
    base = copy.deepcopy(model.base_model)
    for parameter in base.parameters():
        parameter.data.mul_(1.2)
    if backbone_of(base) is base:
        model.base_model = base
    else:
        setattr(model.base_model, backbone_name(base), backbone_of(base))


def _other_base(model):
    model.base_model = copy.deepcopy(model.base_model)
    for parameter in model.base_model.parameters():
        parameter.data.mul_(1.2)


@pytest.mark.parametrize("replace", [_other_encoder, _other_adapter, _other_backbone, _other_base])
@pytest.mark.parametrize("injection", ["deep", "prefix", "shallow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_replaced_runs(family, injection, replace):
    model = _model(family, injection)
    before = _answer(model)
    with model.frozen_prompts():
        _answer(model)
        replace(model)
        after = _answer(model)
    assert_same_bits(after, _answer(_anew(model)))
    assert_same_bits(_answer(model), after)
    assert_differs(after, before)


def test_what_was_replaced_generates_is_compiled_and_exported():
    model = _model("llama", num_hidden_layers=1)  # it is compiled three times
    ids = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    compiled = torch.compile(model, backend="eager", fullgraph=TRACES_VIEWS)
    _answer(compiled), model.generate(BATCH.input_ids[:, -2:], **ids)
    for replace in (_other_encoder, _other_backbone):
        replace(model)
        fresh = _anew(model)
        made, expected = (one.generate(BATCH.input_ids[:, -2:], **ids).logits[0] for one in (model, fresh))
        assert_same_bits(made, expected)
        assert_equal(_answer(compiled), _answer(fresh), "compiled")
        tensors, wanted = prompt_tensors(model, "kv"), prompt_tensors(fresh, "kv")
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_a_backbone_of_other_sizes_is_refused():
    model = _model("llama")
    model.base_model.model = tiny_base("llama", "CAUSAL_LM", num_hidden_layers=3).model
    for _ in range(2):
        with pytest.raises(ValueError, match="base must keep the sizes .* were made for, .*num_layers=2"):
            _answer(model)
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel; got OptimizedModule"):
        model.base_model = torch.compile(model.base_model, backend="eager")


def _other_layers(model):
    model.backbone.layers = tiny_base("llama", "CAUSAL_LM", seed=7).requires_grad_(False).model.layers


def _other_layer(model):
    model.backbone.layers[0] = tiny_base("llama", "CAUSAL_LM", seed=7).requires_grad_(False).model.layers[0]


def _parametrized(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.backbone.layers[0].self_attn.q_proj, "weight", Twice())


def _pruned(model):
    prune.l1_unstructured(model.backbone.layers[1].mlp.up_proj, "weight", amount=0.5)


@pytest.mark.parametrize("replace", [_other_layers, _other_layer, _parametrized, _pruned])
def test_fused_projections_are_those_of_the_layers_that_are_there(replace):
    model = _model("llama").train()
    model.step_options = StepOptions(fused_projections=True)
    before = _answer(model)
    replace(model)
    after = _answer(model)
    assert_differs(after, before)
    assert_equal(after, _answer(_anew(model)), "logits")
    model.step_options = StepOptions(fused_projections=False)
    assert_equal(after, _answer(model), "logits")


def test_what_was_quantized_after_fusing_is_left_alone():
    torchao = pytest.importorskip("torchao.quantization")
    model = _model("llama").train()
    model.step_options = StepOptions(fused_projections=True)
    _answer(model)
    torchao.quantize_(model.backbone, torchao.Int8WeightOnlyConfig())
    after = _answer(model)
    model.step_options = StepOptions(fused_projections=False)
    assert_equal(after, _answer(model), "logits")
