"""The class that families are: its paths lead to the parts of models, and what it makes of them when one is odd."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tiny_features
import tiny_models
import tiny_seq2seq
from families import changed
from ptv2_fast.backbone.locate import part_at
from ptv2_fast.families.family import Family
from ptv2_fast.families.gemma import Gemma3
from ptv2_fast.families.llama import Llama
from ptv2_fast.families.registry import families, family_of

ENCODER_DECODERS = {tiny.model_type: kind for kind, tiny in reversed(tiny_seq2seq.TINY.items())}


def _base(family: str):
    if family in ENCODER_DECODERS:
        return tiny_seq2seq.tiny_base(ENCODER_DECODERS[family], "FEATURE_EXTRACTION")
    return (tiny_features if family in tiny_features.FAMILIES else tiny_models).tiny_base(family)


@pytest.mark.parametrize("family", families())
def test_its_paths_lead_to_the_parts_of_its_models(family):
    base = _base(family)
    known = family_of(base)
    assert dict(base.named_modules())[known.layers_path] is known.layers(base)
    paths = known.attention_paths(base)
    assert len(paths) == known.sizes(base).num_layers
    for layer, path in enumerate(paths):
        inside = set(part_at(base, path).modules())
        key, value = known.projections(base, layer)
        assert {key.module, value.module} <= inside and isinstance(key.module, nn.Module)
    assert len(set(paths)) == len(paths) or family == "albert"


@pytest.mark.parametrize("family", families())
def test_every_encoder_has_its_shallow_view(family):
    known = families()[family]
    assert known.has_shallow_view == (not known.causal and family not in ("bart", "mbart"))


@pytest.mark.parametrize("family", families())
def test_a_copy_is_the_same_family(family):
    known = families()[family]
    for same in (copy.copy(known), copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert same == known and hash(same) == hash(known)
    assert known != changed(known, causal=not known.causal)
    assert known != Family()


def test_families_of_several_classes_differ():
    assert Llama() != Gemma3() and Llama() == Llama()
    assert len(set(families().values())) == len({type(family) for family in families().values()})


def test_who_overrides_what_one_layer_gives_is_asked_layer_by_layer():
    class Doubled(Llama):
        def finish_keys(self, backbone, layer, keys):
            return 2 * super().finish_keys(backbone, layer, keys)

    class Shifted(Llama):
        def attention_input(self, backbone, layer, states):
            return 1 + super().attention_input(backbone, layer, states)

    class Doubling:
        def finish_keys(self, backbone, layer, keys):
            return 2 * super().finish_keys(backbone, layer, keys)

    class Mixed(Doubling, Llama):
        pass

    class MixedAgain(Mixed, Llama):
        pass

    class Faster(Mixed):
        def finish_all_keys(self, backbone, layers, keys):
            return keys

    base = tiny_models.tiny_base("llama")
    states, keys = torch.randn(2, 5, 32), torch.randn(2, 5, 2, 8)
    for mixed in (Mixed(), MixedAgain()):
        assert mixed.finish_all_keys(base, (0, 1), keys) is None
        assert mixed.attention_inputs(base, (0, 1), states) is not None
    assert Faster().finish_all_keys(base, (0, 1), keys) is keys
    assert Llama().attention_inputs(base, (0, 1), states) is not None
    assert Llama().finish_all_keys(base, (0, 1), keys) is not None
    assert Doubled().finish_all_keys(base, (0, 1), keys) is None
    assert Doubled().attention_inputs(base, (0, 1), states) is not None
    assert Shifted().attention_inputs(base, (0, 1), states) is None
    assert Shifted().finish_all_keys(base, (0, 1), keys) is not None


def test_a_family_that_says_nothing_is_a_post_norm_encoder():
    family, states, several = Family(), torch.randn(5, 32), torch.randn(2, 5, 32)
    base = tiny_models.tiny_base("llama")
    assert family.attention_input(base, 0, states) is states
    assert family.attention_inputs(base, (0, 1), several) is several
    assert family.finish_keys(base, 0, states) is states
    assert family.finish_all_keys(base, (0, 1), several) is several
    assert family.with_layer_index(base) is base and family.with_own_pooler(base) is base
    assert family.first_position(base) == 0 and not family.has_shallow_view
    with pytest.raises(NotImplementedError, match="Family has no shallow_view"):
        family.shallow_view(base, states)
