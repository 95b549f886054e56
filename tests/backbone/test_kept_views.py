"""Views are kept for as long as nothing behind them has changed, and whatever changes is seen by the next call."""

from __future__ import annotations

import copy
import pickle
import threading
from types import MethodType

import pytest
import torch
from torch import nn

import tiny_features
import tiny_seq2seq
from batches import padded, text_rows
from ptv2_fast import StepOptions, get_ptv2_model
from ptv2_fast.backbone import hooked, view
from ptv2_fast.backbone.kept_views import KeptViews
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.view import view_of
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_same_bits

BATCH = padded(text_rows(), "left")
FAMILIES = ("bert", "llama", "albert", "distilbert", "mpnet", "deberta-v2")
FUSED = StepOptions(fused_projections=True)


@torch.no_grad()
def _states(model):
    return model(**BATCH.inputs).last_hidden_state[BATCH.attention_mask.bool()]


def _view(model):
    """What a call runs the backbone through."""
    plan, base = model.step_plan(), model._frozen
    return base.layers.view(base.hooked(model.backbone), plan, base.layers.stand_ins(plan), None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_is_kept_from_call_to_call(family, training):
    model = tiny_model(family, "deep").train(training)
    model.step_options = FUSED
    first = _view(model)
    states = _states(model)
    assert _view(model) is first
    assert_same_bits(_states(model), states)
    assert _view(model) is first
    # In another mode each module is another one.
    model.train(not training)
    assert _view(model) is not first


def _copies(monkeypatch, model, inputs):
    """How many module objects a call makes, once others have run."""
    for _ in range(2):
        model(**inputs)
    made, copied = [], view._shallow_copy
    with monkeypatch.context() as patch:
        patch.setattr(view, "_shallow_copy", lambda *args: made.append(args[0]) or copied(*args))
        model(**inputs)
    return len(made)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "vit", "clip_text_model", "t5", "bart"])
def test_no_call_makes_a_module_for_each_layer(family, training, monkeypatch):
    """Attention learns its layer in views that are kept: what a call makes itself holds that call's prompts."""
    made = []
    for layers in (2, 5):
        if family in ("t5", "bart"):
            names = ("num_layers", "num_decoder_layers") if family == "t5" else ("encoder_layers", "decoder_layers")
            model = tiny_seq2seq.tiny_model(family, base_changes=dict.fromkeys(names, layers))
            inputs = tiny_seq2seq.pair().inputs
        elif family in tiny_features.FAMILIES:
            model = tiny_features.tiny_model(family, base_changes={"num_hidden_layers": layers}, kind="backbone")
            inputs = {"input_ids": torch.stack(tiny_features.clip_rows(4, 4))}
            inputs = tiny_features.features(family) if family in tiny_features.FEATURES else inputs
        else:
            model, inputs = tiny_model(family, base_changes={"num_hidden_layers": layers}), BATCH.inputs
        made.append(_copies(monkeypatch, model.train(training), inputs))
    assert made[0] == made[1] <= 12


def _layer(model):
    return backbone_of(model.base_model).encoder.layer[1]


def _attention(model):
    return _layer(model).attention.self


class _Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return 2.0 * self.inner(x)


def _set_an_attribute(model):
    _attention(model).scaling = 3.0


def _replace_a_projection(model):
    _attention(model).query = _Doubled(_attention(model).query)


def _replace_a_layer(model):
    layers = backbone_of(model.base_model).encoder.layer
    layers[1] = copy.deepcopy(layers[1])
    with torch.no_grad():
        layers[1].output.dense.weight.mul_(-1.0)


def _swap_a_class(model):
    attention = _attention(model)

    class Scaled(type(attention)):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2.0 * output, weights

    attention.__class__ = Scaled


def _set_a_forward(model):
    attention = _attention(model)
    attend = type(attention).forward

    def forward(self, *args, **kwargs):
        output, weights = attend(self, *args, **kwargs)
        return 2.0 * output, weights

    attention.forward = MethodType(forward, attention)


def _hook_a_module(model):
    _attention(model).register_forward_hook(lambda module, given, output: (2.0 * output[0], output[1]))


def _replace_the_hooks(model):
    _attention(model)._forward_hooks = {0: lambda module, given, output: (2.0 * output[0], output[1])}


def _replace_what_no_view_is_of(model):
    _layer(model).intermediate.dense = _Doubled(_layer(model).intermediate.dense)


def _move_a_weight(model):
    weight = _attention(model).key.weight
    weight.data = -2.0 * weight.data


def _replace_a_parameter(model):
    _attention(model).value.weight = nn.Parameter(2.0 * _attention(model).value.weight.detach(), requires_grad=False)


def _hook_a_projection(model):
    _attention(model).query.register_forward_hook(lambda module, given, output: 2.0 * output)


def _set_a_projections_forward(model):
    query = _attention(model).query
    query.forward = MethodType(lambda self, x: 2.0 * type(self).forward(self, x), query)


CHANGES = (
    _move_a_weight, _replace_a_parameter, _hook_a_projection, _set_a_projections_forward,
    _set_an_attribute, _replace_a_projection, _replace_a_layer, _swap_a_class, _set_a_forward, _hook_a_module,
    _replace_the_hooks, _replace_what_no_view_is_of,
)  # fmt: skip


@pytest.mark.parametrize("options", [StepOptions(), FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_what_changes_behind_a_view_is_seen_by_the_next_call(change, options):
    model = tiny_model("bert", "deep")
    model.step_options = options
    fresh = copy.deepcopy(model)
    before = _states(model)
    change(model)
    after = _states(model)
    assert_differs(after, before)
    change(fresh)
    fresh.step_options = options
    assert_same_bits(after, _states(fresh))


def test_a_configuration_that_changes_makes_another_view():
    model = tiny_model("llama", "deep")
    first = _view(model)
    model.base_model.config.attribute_of_nobody = 1
    second = _view(model)
    assert second is not first and second.config.attribute_of_nobody == 1
    model.base_model.set_attn_implementation("eager")
    assert _view(model) is not second
    assert _view(model).config._attn_implementation == hooked.hook.IMPLEMENTATION
    model.base_model.config = copy.deepcopy(model.base_model.config)
    third = _view(model)
    model.base_model.config.attribute_of_nobody = 2
    assert _view(model) is not third


def test_an_attribute_under_another_name_is_another_one():
    module, kept = nn.Linear(2, 2), KeptViews()
    module.first = None
    view = kept.of((module,), lambda: view_of(module))
    del module.first
    module.second = None
    again = kept.of((module,), lambda: view_of(module))
    assert again is not view and not hasattr(again, "first")
    assert kept.of((module,), lambda: view_of(module)) is again


def test_what_changes_while_a_view_is_made_is_seen():
    module, kept = nn.Linear(2, 2), KeptViews()

    def make():
        view = view_of(module)
        module.late = True
        return view

    assert not hasattr(kept.of((module,), make), "late")
    assert kept.of((module,), make).late


def test_threads_have_views_of_their_own():
    model = tiny_model("bert", "deep")
    found = [_view(model)]
    thread = threading.Thread(target=lambda: found.append(_view(model)))
    thread.start()
    thread.join(timeout=60)
    assert found[0] is not found[1]
    assert _view(model) is found[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_views_of_its_own_modules(copied):
    model = tiny_model("bert", "deep")
    model.step_options = FUSED
    states = _states(model)
    other = copied(model)
    with torch.no_grad():
        _attention(other).key.weight.mul_(-1.0)
    assert_differs(_states(other), states)
    assert_same_bits(_states(model), states)


def test_another_wrapper_of_the_same_base_keeps_another_view():
    base = tiny_base("bert")
    models = [get_ptv2_model(base, tiny_prompts(injection)).eval() for injection in ("deep", "prefix")]
    views = [_view(model) for model in models]
    assert views[0] is not views[1]
    assert [_view(model) for model in models] == views
