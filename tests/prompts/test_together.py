"""Keys and values of all layers at once are those of each layer by itself."""

from __future__ import annotations

import pytest
import torch

from families import changed, one_by_one
from ptv2_fast.backbone.norms import normed_together
from tiny_models import tiny_model
from tolerances import assert_differs, assert_same_bits

FAMILIES = (
    "bert",
    "roberta",
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
    "glm4",
    "cohere",
    "cohere2",
    "phi3",
    "gpt_neox",
)


def _pairs(model, entries: int | None):
    source = model._source("default")
    states = torch.randn(2, 5 * (entries or 1), model.backbone.config.hidden_size, requires_grad=True)
    pairs = source._projections(states, "triton", entries)
    tensors = [tensor for pair in pairs for tensor in pair]
    (grad,) = torch.autograd.grad(sum((1 + i) * x.square().sum() for i, x in enumerate(tensors)), states)
    return [*tensors, grad]


@pytest.mark.parametrize("entries", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_together_are_layers_one_by_one(family, entries):
    model = tiny_model(family, "deep")
    torch.manual_seed(1)
    together = _pairs(model, entries)
    projections = model._source("default")._projections
    projections._family = changed(projections._family, attention_inputs=one_by_one, finish_all_keys=one_by_one)
    torch.manual_seed(1)
    for actual, expected in zip(together, _pairs(model, entries), strict=True):
        assert_same_bits(actual, expected)


def test_a_base_that_trains_gets_its_gradient_through_the_prompts():
    model = tiny_model("llama", "deep")
    project, weight = model._source("default")._projections, model.backbone.layers[0].self_attn.k_proj.weight
    states = torch.randn(2, 5, model.backbone.config.hidden_size)
    project(states, "triton")  # what was found of a frozen base is not taken for one that trains
    weight.requires_grad_(True)
    gradients = [
        torch.autograd.grad(project(states, backend)[0][0].square().sum(), weight)[0] for backend in ("torch", "triton")
    ]
    assert_same_bits(*gradients)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_norm_that_somebody_changed_runs_by_itself(family):
    model = tiny_model(family, "deep")
    torch.manual_seed(1)
    before = _pairs(model, None)
    norm = model.backbone.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, given, output: 2.0 * output)
    torch.manual_seed(1)
    after = _pairs(model, None)
    assert_same_bits(after[0], before[0])
    assert_differs(after[3], before[3])
    norms = [layer.input_layernorm for layer in model.backbone.layers]
    assert normed_together(norms, torch.randn(2, 5, model.backbone.config.hidden_size)) is None


def test_norms_that_differ_are_not_taken_for_one():
    norms = [layer.input_layernorm for layer in tiny_model("llama", "deep").backbone.layers]
    states = torch.randn(2, 5, norms[0].weight.shape[0])
    made = normed_together(norms, states)
    assert_same_bits(made, torch.stack([norm(state) for norm, state in zip(norms, states, strict=True)]))
    norms[1].variance_epsilon = 0.5
    assert normed_together(norms, states) is None
    layer_norms = [torch.nn.LayerNorm(states.shape[-1]) for _ in range(2)]
    assert normed_together(layer_norms, states) is None
