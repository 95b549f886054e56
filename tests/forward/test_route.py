"""Which way a call runs, by its adapters and the family; and what each way runs through, in which order."""

from __future__ import annotations

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast.forward import views
from ptv2_fast.forward.route import Route, route_of
from tiny_features import features
from tiny_features import tiny_model as tiny_features
from tiny_models import tiny_model, tiny_prompts
from tiny_seq2seq import pair
from tiny_seq2seq import tiny_model as tiny_seq2seq

BATCH = padded(text_rows(5, 2, 7), "left")
WAYS = {
    "bert-deep": Route.PLAIN, "bert-prefix": Route.PLAIN, "bert-shallow": Route.INLINE,
    "llama-deep": Route.PLAIN, "llama-shallow": Route.PLAIN,
    "mpnet-deep": Route.PLAIN, "mpnet-shallow": Route.INLINE,
    "vit-deep": Route.PLAIN, "vit-shallow": Route.INLINE,
    "t5-deep": Route.ENCODER_DECODER, "t5-shallow": Route.ENCODER_DECODER,
}  # fmt: skip


def _model(name: str):
    family, injection = name.split("-")
    if family == "t5":
        return tiny_seq2seq("t5", injection)
    return tiny_features("vit", injection) if family == "vit" else tiny_model(family, injection)


def _inputs(name: str) -> dict:
    if name.startswith("t5"):
        return pair().inputs
    return features("vit") if name.startswith("vit") else BATCH.inputs


def _route(model, names=None, rows=3, target=None):
    return route_of(model._frozen, model._row_prompts(names, rows), target)


@pytest.mark.parametrize("name", WAYS)
def test_the_way_is_that_of_the_adapter_on_the_family(name, monkeypatch):
    """And it is the one that the call then takes."""
    from ptv2_fast import model as face

    model, taken = _model(name), []
    assert _route(model, rows=None if name.startswith("t5") else 3) is WAYS[name]
    for way in ("run_plain", "run_inline", "run_encoder_decoder"):
        original = getattr(face, way)

        def noted(*args, way=way, original=original, **kwargs):
            taken.append(way.removeprefix("run_"))
            return original(*args, **kwargs)

        monkeypatch.setattr(face, way, noted)
    model(**_inputs(name))
    assert taken == [WAYS[name].value]
    with model.disable_adapter():
        model(**_inputs(name))
    assert len(taken) == 1, "the bare base runs as it is"


def test_rows_of_the_bare_base_go_the_plain_way():
    model = tiny_model("bert", "shallow")
    assert _route(model, ["__base__"] * 3) is Route.PLAIN
    assert _route(model, ["default"] * 3) is Route.INLINE


@pytest.mark.parametrize("names", [["default", "other", "other"], ["other", "default", "__base__"]])
def test_rows_of_the_batch_go_their_way_alone(names):
    model = tiny_model("bert", "shallow")
    model.add_adapter("other", tiny_prompts("deep"))
    with pytest.raises(ValueError, match=r"adapter_names must not mix a shallow prompt on a bidirectional model"):
        _route(model, names)
    assert _route(model, ["other", "__base__", "other"]) is Route.PLAIN


def test_an_encoder_decoder_says_so_itself():
    model = tiny_seq2seq("t5", "shallow")
    model.add_adapter("other", tiny_prompts("deep", "SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"on an encoder-decoder with other adapters: .* got \['default', 'other'\]"):
        _route(model, ["default", "other"], None)
    assert _route(model, ["other", "__base__"], None) is Route.ENCODER_DECODER


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_runs_alone_where_it_is_what_is_called(kind):
    """Whatever the task of the active adapter."""
    for task in ({}, {"task_type": "SEQ_CLS", "heads": {"own": 2}}):
        model = tiny_seq2seq(kind, "deep", **task)
        backbone = model.backbone
        assert _route(model, rows=None, target=backbone.encoder) is Route.ENCODER
        for target in (model.base_model, backbone, backbone.decoder, None):
            assert _route(model, rows=None, target=target) is Route.ENCODER_DECODER


def _made(model, monkeypatch, **inputs):
    """The names of the views that a call runs through, from the innermost outwards."""
    made = []

    def noted(view):
        def make(backbone, call):
            found = view(backbone, call)
            if found is not backbone:
                made.append(view.__name__.removeprefix("_"))
            return found

        return make

    monkeypatch.setattr(views, "VIEWS", tuple(map(noted, views.VIEWS)))
    model(**inputs)
    return made


@pytest.mark.parametrize(
    ("name", "training", "expected"),
    [
        ("bert-deep", False, ["with_hooked_attention"]),
        ("bert-deep", True, ["with_hooked_attention", "without_padding"]),
        ("bert-shallow", True, ["with_hooked_attention", "with_virtual_tokens"]),
        ("mpnet-deep", True, ["with_layer_index", "with_right_padding", "given_prompts"]),
        ("mpnet-shallow", False, ["with_layer_index", "with_virtual_tokens", "with_right_padding", "given_prompts"]),
    ],
)
def test_views_lie_over_one_another_as_declared(name, training, expected, monkeypatch):
    model = _model(name).train(training)
    assert _made(model, monkeypatch, **_inputs(name)) == expected


@pytest.mark.parametrize("backbone", ["bert", "mpnet"])
def test_views_of_fused_layers_know_their_layer(backbone, monkeypatch):
    from ptv2_fast import StepOptions

    model = tiny_model(backbone, "deep").train()
    model.step_options = StepOptions(fused_projections=True)
    made = _made(model, monkeypatch, **BATCH.inputs)
    assert made.index("with_layers_of_step") == 1, made


def test_both_ways_run_through_the_same_views(monkeypatch):
    asked = []
    monkeypatch.setattr(views, "VIEWS", (lambda backbone, call: asked.append(call.virtual) or backbone, *views.VIEWS))
    for injection in ("deep", "shallow"):
        tiny_model("bert", injection)(**BATCH.inputs)
    assert asked[0] is None and isinstance(asked[1], torch.Tensor)
