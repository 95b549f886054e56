"""Views: another forward or other children over the same weights, the module itself untouched."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from torch import nn

from batches import padded, text_rows
from ptv2_fast.backbone.view import view_of
from ptv2_fast.families.registry import family_of
from tiny_models import tiny_base
from tolerances import assert_same_bits


def test_a_view_has_other_children_and_the_same_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    other = nn.Linear(3, 2)
    view = view_of(model, children={"1": other})
    x = torch.randn(4, 3)
    assert torch.equal(view(x), other(model[0](x)))
    assert view[0] is model[0] and model[1] is not other
    view(x).sum().backward()
    assert model[0].weight.grad is not None and model[1].weight.grad is None
    with torch.no_grad():
        model[0].weight.zero_()
    assert_same_bits(view(x), other(model[0].bias.expand(4, -1).contiguous()))


def test_a_view_has_another_forward():
    base = tiny_base("gpt2", "CAUSAL_LM")
    seen = []

    def forward(original, *args, **inputs):
        seen.append(sorted(inputs))
        return original(*args, **inputs)

    view = view_of(base, forward=forward)
    batch = padded(text_rows(), "right")
    assert_same_bits(view(**batch.inputs).logits, base(**batch.inputs).logits)
    assert seen == [["attention_mask", "input_ids"]], "the base went through the view's forward"
    assert isinstance(view, type(base)) and type(view).__name__ == type(base).__name__
    assert inspect.signature(view.forward) == inspect.signature(base.forward)
    assert "forward" not in vars(base) and "_view_forward" not in vars(base)


def test_a_view_has_another_forward_where_the_module_has_one_of_its_own():
    model = nn.Linear(3, 2)
    model.forward = lambda x: x * 2
    view = view_of(model, forward=lambda original, x: original(x) + 1.0)
    assert view(torch.ones(1)) == 3 and model(torch.ones(1)) == 2


def test_a_view_has_other_attributes():
    model = nn.Dropout(0.5)
    view = view_of(model, attributes={"p": 0.0, "layer_idx": 3})
    assert (view.p, view.layer_idx, model.p) == (0.0, 3, 0.5) and not hasattr(model, "layer_idx")


def test_a_view_calls_its_own_children():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    other = nn.Linear(3, 2)
    view = view_of(model, children={"1": other}, forward=lambda original, x: original(x) + 1.0)
    x = torch.randn(4, 3)
    assert torch.equal(view(x), other(model[0](x)) + 1.0)


def test_what_a_view_of_a_view_replaces_is_what_the_first_ones_forward_runs():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    first = view_of(model, forward=lambda original, x: original(x) + 1.0)
    other, off = nn.Linear(3, 2), view_of(model[1], attributes={"p": 0.0})
    second = view_of(first, children={"2": other})
    second = view_of(second, children={"1": off}, forward=lambda original, x: -original(x))
    x = torch.randn(4, 3)
    assert torch.equal(second(x), -(other(model[0](x)) + 1.0))
    assert first[2] is model[2] and second[2] is other
    gated = view_of(view_of(model[1], forward=lambda original, x: original(x)), attributes={"p": 1.0})
    assert torch.equal(gated(x), torch.zeros(4, 3)) and model[1].p == 0.5


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_views_of_transformers_models_hook_their_layers_once(family):
    base = tiny_base(family)
    layer = family_of(base).layers(base)[0]
    batch = padded(text_rows(), "right")
    base(**batch.inputs, output_hidden_states=True)
    counts = []
    for _ in range(3):
        output = view_of(base)(**batch.inputs, output_hidden_states=True)
        counts.append((len(output.hidden_states), len(layer._forward_hooks)))
    assert set(counts) == {(3, counts[0][1])}


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_a_view_leaves_the_layers_unhooked_until_outputs_are_asked_for(family):
    base = tiny_base(family)
    layer = family_of(base).layers(base)[0]
    batch = padded(text_rows(), "right")
    view_of(view_of(base), forward=lambda original, *args, **call: original(*args, **call))(**batch.inputs)
    assert not layer._forward_hooks and pickle.dumps(base), "hooks of transformers cannot be pickled"
    for _ in range(2):
        output = view_of(base)(**batch.inputs, output_hidden_states=True)
        assert len(output.hidden_states) == 3 and len(layer._forward_hooks) > 0
    assert len(base(**batch.inputs, output_hidden_states=True).hidden_states) == 3
