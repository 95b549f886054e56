"""Encoder-decoders against their literal forms: outputs and prompt gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import INJECTIONS
from tiny_seq2seq import KINDS, LAYERS, STACKS, literal, literal_logits, pair, rows, tiny_base, tiny_model
from tolerances import assert_differs, assert_equal

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
SIDES = [("left", "right"), ("right", "left"), ("holes", "holes")]


def _compare(model, base, batch):
    """Logits, encoder states and the gradients of everything trained, fast against literal."""
    parameters = dict(model.adapters["default"].encoder.named_parameters())
    source, target = batch.source.attention_mask.bool(), batch.target.attention_mask.bool()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(*target.shape, 40, dtype=base.dtype, generator=generator)[target]

    def gradients(logits):
        return torch.autograd.grad((logits[target] * weights).sum(), list(parameters.values()))

    fast = model(**batch.inputs, use_cache=False)
    states, encoded = literal(model, getattr(base, "model", base), *batch.inputs.values())
    logits = literal_logits(base, states)
    assert_equal(fast.logits[target], logits[target], "logits")
    assert_equal(fast.encoder_last_hidden_state[source], encoded[source], "encoder states")
    for name, grad, expected in zip(parameters, gradients(fast.logits), gradients(logits)):
        assert grad.abs().max() > 1e-6, f"{name} gets no gradient"
        assert_equal(grad, expected, f"gradient of {name}")
    return fast.logits[target]


@pytest.mark.parametrize(("side", "target_side"), SIDES, ids=["left", "right", "holes"])
@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_float64(kind, injection, side, target_side):
    model = tiny_model(kind, injection, exact=True)
    _compare(model, tiny_base(kind, exact=True), pair(side, target_side))
