"""The fast path against the literal forms: outputs and prompt gradients, family by injection."""

from __future__ import annotations

import pytest
import torch

from batches import padded, text_rows
from tiny_models import (
    DECODERS,
    DISTINCT,
    FAMILIES,
    FROM_PADDING,
    INJECTIONS,
    TOKEN_TYPES,
    WITHOUT_TABLE,
    literal_logits,
    literal_states,
    tiny_base,
    tiny_model,
)
from tolerances import assert_differs, assert_equal


def _compare(model, backbone, batch, **inputs):
    """Outputs at real tokens and the gradients of everything trained, fast against literal."""
    parameters = dict(model.adapters["default"].encoder.named_parameters())
    real = batch.attention_mask.bool()
    weights = torch.randn(*real.shape, 32, dtype=backbone.dtype)[real]

    def run(states):
        loss = (states[real] * weights).sum()
        return states[real], torch.autograd.grad(loss, list(parameters.values()))

    fast, fast_grads = run(model(**batch.inputs, **inputs).last_hidden_state)
    slow, slow_grads = run(literal_states(model, backbone, **batch.inputs, **inputs))
    dtype = backbone.dtype
    assert_equal(fast, slow, "output", dtype)
    for name, grad, expected in zip(parameters, fast_grads, slow_grads, strict=True):
        assert grad.abs().max() > 1e-6, f"{name} gets no gradient"
        assert_equal(grad, expected, f"gradient of {name}", dtype)
    return fast


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family, injection, side):
    model = tiny_model(family, injection, exact=True)
    _compare(model, tiny_base(family, exact=True), padded(text_rows(), side))


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", DISTINCT)
def test_float32(family, injection):
    model = tiny_model(family, injection)
    _compare(model, tiny_base(family), padded(text_rows(), "left"))


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "mistral", "gemma3_text", "modernbert"])
def test_prompt_lengths(family, injection, length):
    model = tiny_model(family, injection, length=length, exact=True)
    _compare(model, tiny_base(family, exact=True), padded(text_rows(), "right"))


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("family", DISTINCT)
def test_mlp_reparameterisation(family, injection):
    model = tiny_model(family, injection, exact=True, reparameterization=12)
    with torch.no_grad():
        model.adapters["default"].encoder.mlp[2].weight.mul_(3.0)
    _compare(model, tiny_base(family, exact=True), padded(text_rows(), "left"))


@pytest.mark.parametrize("layers", [(1,), (2, 0), (-1,)], ids=str)
@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("family", DISTINCT)
def test_some_layers_only(family, injection, layers):
    three = {"num_hidden_layers": 3}
    model = tiny_model(family, injection, exact=True, layers=layers, base_changes=three)
    base = tiny_base(family, exact=True, **three)
    some = _compare(model, base, padded(text_rows(), "left"))
    everywhere = tiny_model(family, injection, exact=True, base_changes=three)
    batch = padded(text_rows(), "left")
    states = everywhere(**batch.inputs).last_hidden_state[batch.attention_mask.bool()]
    assert_differs(some, states)


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("family", DISTINCT)
def test_gated(family, injection):
    """A gate is a trained bias on the prompt's scores; far down, the prompt is a no-op."""
    model = tiny_model(family, injection, exact=True, prompt_init="gated")
    base = tiny_base(family, exact=True)
    batch = padded(text_rows(), "left")
    real = batch.attention_mask.bool()
    bare = torch.cat([base(row[None]).last_hidden_state[0] for row in text_rows()])
    with torch.no_grad():
        closed = model(**batch.inputs).last_hidden_state[real]
        # Each virtual token has about e^-10 of the mass: close to the bare model, not the same. Where attention reads
        # states without a norm, a prompt's are larger than the text's.
        assert (closed - bare).norm() / bare.norm() < 1e-2
        assert not torch.equal(closed, bare)
        model.adapters["default"].encoder.gate.copy_(torch.randn(2, 4, 5))
    opened = _compare(model, base, batch)
    assert_differs(opened, bare)


@pytest.mark.parametrize("family", DISTINCT)
def test_position_offset_of_prefix(family):
    """position_offset=P shifts the text's learned positions, as PEFT and the paper's code do."""
    batch = padded(text_rows(), "left")
    if family in WITHOUT_TABLE:
        with pytest.raises(ValueError, match="position_offset must be None on DebertaV2Model, which has no positions"):
            tiny_model(family, "prefix", position_offset=5)
        return
    model = tiny_model(family, "prefix", exact=True, position_offset=5)
    shifted = _compare(model, tiny_base(family, exact=True), batch)
    plain = tiny_model(family, "prefix", exact=True)
    with torch.no_grad():
        plain.adapters["default"].load_state_dict(model.adapters["default"].state_dict())
    states = plain(**batch.inputs).last_hidden_state[batch.attention_mask.bool()]
    assert_differs(shifted, states)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert", "llama", "opt"])
def test_given_positions(family, injection):
    """The caller's position ids are the text's, in the model's own numbering."""
    rows = text_rows(6, 6)
    batch = padded(rows, "right", width=6)
    first = 2 if family in FROM_PADDING else 0
    positions = (torch.tensor([[0, 1, 2, 5, 6, 7], [1, 2, 3, 4, 5, 6]])) + first
    model = tiny_model(family, injection, exact=True)
    moved = _compare(model, tiny_base(family, exact=True), batch, position_ids=positions)
    plain = model(**batch.inputs).last_hidden_state.reshape(moved.shape)
    assert_differs(moved, plain)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", TOKEN_TYPES)
def test_token_types(family, injection):
    batch = padded(text_rows(), "right")
    types = torch.zeros_like(batch.input_ids)
    types[:, 3:] = 1
    model = tiny_model(family, injection, exact=True)
    typed = _compare(model, tiny_base(family, exact=True), batch, token_type_ids=types)
    real = batch.attention_mask.bool()
    assert_differs(typed, model(**batch.inputs).last_hidden_state[real])


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", DISTINCT)
def test_embeddings_in_place_of_ids(family, injection):
    batch = padded(text_rows(), "left")
    model = tiny_model(family, injection, exact=True)
    words = model.backbone.get_input_embeddings()(batch.input_ids)
    by_words = model(inputs_embeds=words, attention_mask=batch.attention_mask).last_hidden_state
    by_ids = model(**batch.inputs).last_hidden_state
    real = batch.attention_mask.bool()
    assert_equal(by_words[real], by_ids[real])


@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_causal_models(family):
    batch = padded(text_rows(), "left")
    for injection in INJECTIONS:
        model = tiny_model(family, injection, "CAUSAL_LM", exact=True)
        base = tiny_base(family, "CAUSAL_LM", exact=True)
        states = literal_states(model, base.base_model, **batch.inputs)
        expected = literal_logits(base, states)
        real = batch.attention_mask.bool()
        assert_equal(model(**batch.inputs).logits[real], expected[real], injection)


def test_a_wrong_prompt_is_noticed():
    """The comparison above fails where a single trained number is off by a thousandth."""
    batch = padded(text_rows(), "left")
    for family in ("bert", "llama"):
        for injection in INJECTIONS:
            model = tiny_model(family, injection, exact=True)
            expected = literal_states(model, tiny_base(family, exact=True), **batch.inputs)
            real = batch.attention_mask.bool()
            with torch.no_grad():
                model.adapters["default"].encoder.prompts.view(-1)[3] += 1e-3
            with pytest.raises(AssertionError, match="relative error"):
                assert_equal(model(**batch.inputs).last_hidden_state[real], expected[real])
