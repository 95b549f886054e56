"""What is known of a base follows whatever somebody puts in the place of it or of its parts."""

from __future__ import annotations

import copy

import torch

from batches import padded, text_rows
from tiny_models import tiny_base, tiny_model
from tolerances import assert_same_bits

BATCH = padded(text_rows(5, 2, 7), "left")


def test_all_is_found_out_once():
    model = tiny_model("bert", "deep", "TOKEN_CLS")
    known = model._frozen
    assert known.model is model.base_model and known.backbone is model.backbone and known.family is model._family
    model(**BATCH.inputs)
    assert model._frozen is known


def test_another_head_over_the_same_backbone_is_followed():
    model = tiny_model("bert", "deep", "TOKEN_CLS")
    known, other = model._frozen, tiny_base("bert", "TOKEN_CLS", seed=3)
    other.bert = model.base_model.bert
    model.base_model = other
    expected = tiny_model("bert", "deep", "TOKEN_CLS")
    expected.base_model.load_state_dict(other.state_dict())
    expected.adapters.load_state_dict(model.adapters.state_dict())
    assert_same_bits(model(**BATCH.inputs).logits, expected(**BATCH.inputs).logits)
    assert model._frozen.model is other and model._frozen.layers is known.layers


def test_another_backbone_is_looked_at_anew():
    model = tiny_model("bert", "deep", "TOKEN_CLS")
    known = model._frozen
    model.base_model.bert = tiny_base("bert", "TOKEN_CLS", seed=3).bert
    model(**BATCH.inputs)
    assert model._frozen.backbone is model.base_model.bert and model._frozen.layers is not known.layers


def test_a_copy_knows_its_own():
    model = tiny_model("bert", "deep", "TOKEN_CLS")
    copied = copy.deepcopy(model)
    assert copied._frozen.model is copied.base_model is not model.base_model
    assert copied._frozen.backbone is copied.backbone and copied._frozen.layers.backbone is copied.backbone
    with torch.no_grad():
        assert_same_bits(copied(**BATCH.inputs).logits, model(**BATCH.inputs).logits)
