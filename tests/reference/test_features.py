"""The literal forms of images, sounds and CLIP's texts, against the models' own forward."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, WhisperModel

from ptv2_fast.reference.features import literal_deep_features, literal_prefix_features, literal_shallow_features
from tiny_features import END_ID, FAMILIES, TEXTS, TOKENS, features, tiny_base, tiny_config
from tolerances import assert_differs, assert_equal


def _inputs(family):
    if family in TEXTS:
        return {"input_ids": torch.tensor([[4, 9, 7, END_ID], [5, 3, 8, END_ID]])}
    return features(family, rows=2, dtype=torch.float64)


def _keys(length):
    return torch.zeros(2, 4, length, 8, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prompts_they_are_the_models_own_forward(family):
    base, inputs = tiny_base(family, exact=True), _inputs(family)
    own = base(**inputs, output_hidden_states=True)
    (value,) = inputs.values()
    forms = {
        "deep": literal_deep_features(base, torch.zeros(2, 0, 32, dtype=torch.float64), value),
        "shallow": literal_shallow_features(base, torch.zeros(0, 32, dtype=torch.float64), value),
        "prefix": literal_prefix_features(base, _keys(0), _keys(0), value),
    }
    for name, (last, states) in forms.items():
        assert_equal(last, own.last_hidden_state, name)
        for index in range(2):  # Whisper gives its last states twice
            assert_equal(states[index], own.hidden_states[index], f"{name}, layer {index}")
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_zeros_take_their_share_of_attention(family):
    base, (value,) = tiny_base(family, exact=True), _inputs(family).values()
    bare, _ = literal_prefix_features(base, _keys(0), _keys(0), value)
    last, _ = literal_prefix_features(base, _keys(3), _keys(3), value)
    assert_differs(last, bare)
    gone, _ = literal_prefix_features(
        base, _keys(3), _keys(3), value, prompt_bias=torch.full((2, 4, 3), -100.0, dtype=torch.float64)
    )
    assert_equal(gone, bare)


def test_rows_behind_the_class_token_are_the_ones_cut_off():
    base, (image,) = tiny_base("vit", exact=True), _inputs("vit").values()
    prompts = torch.randn(2, 3, 32, dtype=torch.float64)
    for behind in (0, 1, TOKENS["vit"]):
        last, states = literal_deep_features(base, prompts, image, behind=behind)
        assert last.shape == (2, TOKENS["vit"], 32) and len(states) == 3
        assert_equal(last, literal_deep_features(base, prompts, image)[0])


def test_other_models_are_refused():
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    for model in (bert, WhisperModel(tiny_config("whisper"))):
        with pytest.raises(ValueError, match=f"backbone must be one of .*; got {type(model).__name__}"):
            literal_shallow_features(model, torch.zeros(1, 8), torch.ones(1, 2, dtype=torch.long))
