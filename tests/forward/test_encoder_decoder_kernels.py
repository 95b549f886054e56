"""Encoder-decoders through the kernels (interpreted without a GPU) against the same models through the reference."""

from __future__ import annotations

import pytest
import torch

from tiny_seq2seq import STACKS, pair, tiny_model
from tolerances import assert_differs, assert_equal

# Heads of 16, the smallest that the kernels take; the interpreter takes seconds for each layer.
SIZES = {
    "t5": {"d_kv": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1},
    "bart": {
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1,
    },
}  # fmt: skip


def _pair_of_models(kind, injection):
    stacks = {} if injection == "shallow" else {"stacks": STACKS}
    return [
        tiny_model(kind, injection, base_changes=SIZES[kind], backend=backend, **stacks)
        for backend in ("triton", "reference")
    ]


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_logits_and_gradients_are_the_references(kind, injection):
    batch, steps = pair("left"), []
    for model in _pair_of_models(kind, injection):
        output = model.train()(**batch.source.inputs, labels=batch.labels)
        output.loss.backward()
        steps.append((output.logits, {name: p.grad for name, p in model.adapters.named_parameters()}))
    (got, grads), (expected, expected_grads) = steps
    real = batch.target.attention_mask.bool()
    assert_equal(got[real], expected[real], "logits")
    for name, grad in grads.items():
        assert_equal(grad, expected_grads[name], name)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generated_tokens_are_the_references(kind):
    models = _pair_of_models(kind, "deep")
    options = {"max_new_tokens": 3, "do_sample": False}
    tokens = [model.generate(**pair("left").source.inputs, **options) for model in models]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_bfloat16_is_close_to_float32(kind, injection):
    model = tiny_model(kind, injection)
    batch = pair("left")
    expected = model(**batch.inputs).logits
    with model.disable_adapter():
        bare = model(**batch.inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**batch.inputs).logits
    half = model.bfloat16()(**batch.inputs)
    assert half.logits.dtype == torch.bfloat16
    for got in (autocast, half.logits):
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 0.3 * (bare - expected).norm() / expected.norm()
    assert_differs(expected, bare)
