"""Prompts that start as a text: then the prompted model is the bare model on that text and its own."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast import get_ptv2_model
from ptv2_fast.prompts.text_init import token_ids
from tiny_models import DECODERS, ENCODERS, FAMILIES, LEARNED, tiny_base, tiny_prompts, wide_window
from tolerances import assert_differs, assert_equal

TEXT, ROW = [5, 9, 2, 30, 11], torch.tensor([[7, 3, 21, 4, 18, 6]])


class _Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def _from_text(family, injection, length=5, text="5 9 2 30 11", base=None, **config):
    config = tiny_prompts(injection, length=length, **config)
    base = tiny_base(family) if base is None else base
    return get_ptv2_model(base, config, tokenizer=_Words(), init_text=text).eval()


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_causal_model_goes_on_from_the_text(family, injection):
    """Keys and values of a text in front of ours are what a cache of that text holds."""
    learned = {"position_offset": len(TEXT)} if family in LEARNED and injection != "shallow" else {}
    # A prompt is in every window; a text in its place would not be.
    changes = wide_window(family)
    model = _from_text(family, injection, base=tiny_base(family, **changes), prompt_init="text", **learned)
    whole = torch.cat([torch.tensor([TEXT]), ROW], dim=1)
    expected = tiny_base(family, **changes)(whole).last_hidden_state[:, len(TEXT) :]
    with torch.no_grad():
        assert_equal(model(input_ids=ROW).last_hidden_state, expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_shallow_prompt_on_an_encoder_goes_on_from_the_text(family):
    changes = wide_window(family)
    model = _from_text(family, "shallow", base=tiny_base(family, **changes))
    whole = torch.cat([torch.tensor([TEXT]), ROW], dim=1)
    expected = tiny_base(family, **changes)(whole).last_hidden_state[:, len(TEXT) :]
    with torch.no_grad():
        assert_equal(model(input_ids=ROW).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_are_the_states_that_enter_each_layer(family):
    three = tiny_base(family, num_hidden_layers=3)
    model = _from_text(family, "deep", base=three, layers=(0, 2))
    bare = tiny_base(family, num_hidden_layers=3)
    states = bare(torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    assert_equal(model.adapters["default"].encoder.prompts, torch.stack([states[0][0], states[2][0]]))


def test_a_text_is_the_default_where_one_is_given():
    for config in ({}, {"prompt_init": "text"}):
        prompts = _from_text("bert", "shallow", **config).adapters["default"].encoder.prompts
        words = tiny_base("bert").embeddings.word_embeddings(torch.tensor(TEXT))
        assert torch.equal(prompts, words)
    drawn = _from_text("bert", "shallow", prompt_init="normal").adapters["default"].encoder.prompts
    assert_differs(drawn, words)
    # An MLP's output cannot be set: it starts as it always does.
    assert _from_text("bert", "deep", reparameterization=4).adapters["default"].encoder.mlp is not None


@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_a_text_longer_than_the_position_table_runs_in_pieces(injection):
    model = _from_text("bert", injection, length=130)
    prompts = model.adapters["default"].encoder.prompts
    assert torch.isfinite(prompts).all()
    # The text repeats every 5 tokens and the table has 64 positions: piece by piece the same.
    short = _from_text("bert", injection, length=64).adapters["default"].encoder.prompts
    assert_equal(prompts[..., :64, :], short)


def test_the_base_is_left_as_it_was():
    base = tiny_base("bert").train()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    _from_text("bert", "deep", base=base)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    fresh = tiny_base("llama").train()
    config = tiny_prompts("prefix")
    get_ptv2_model(fresh, config, tokenizer=_Words(), init_text="5 6")
    assert fresh.training


def test_token_ids_repeat_and_stop():
    assert token_ids(_Words(), "1 2 3", 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert token_ids(_Words(), ["1 2", "3"], 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="init_text must have at least one token; got ''"):
        token_ids(_Words(), "", 4)


def test_a_text_without_a_tokenizer_is_refused():
    base = tiny_base("bert")
    with pytest.raises(ValueError, match="tokenizer must be given with init_text"):
        get_ptv2_model(base, tiny_prompts("deep"), init_text="1 2")
    with pytest.raises(ValueError, match="tokenizer and init_text must be given with prompt_init='text'"):
        get_ptv2_model(base, tiny_prompts("deep", prompt_init="text"))
    assert base.config._attn_implementation == "sdpa", "the base was touched"
