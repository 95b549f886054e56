"""The trained parameters: their shapes, their start, and an MLP that runs on P rows once."""

from __future__ import annotations

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import PTuningV2Config
from ptv2_fast.prompts.encoder import GATE_START, PromptEncoder
from tiny_models import tiny_model
from tolerances import assert_equal

SIZES = {"hidden_size": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 5, "std": 0.3}
SHAPES = {"deep": (3, 7, 12), "shallow": (7, 12), "prefix": (3, 2, 2, 7, 5)}


def _encoder(injection, layers=(0, 2, 5), length=7, std=0.3, **config):
    config = PTuningV2Config("SEQ_CLS", length, injection, **config)
    return PromptEncoder(config, layers, **{**SIZES, "std": std})


@pytest.mark.parametrize("injection", SHAPES)
def test_shapes(injection):
    encoder = _encoder(injection)
    assert encoder().shape == SHAPES[injection] == encoder.prompts.shape
    assert [name for name, _ in encoder.named_parameters()] == ["prompts"]


@pytest.mark.parametrize("injection", SHAPES)
def test_normal_start(injection):
    prompts = _encoder(injection, length=500, std=0.3)()
    assert abs(float(prompts.detach().std()) - 0.3) < 0.02 and abs(float(prompts.detach().mean())) < 0.02


@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_an_mlp_makes_prompts_of_the_same_shape(injection):
    encoder = _encoder(injection, reparameterization=4)
    assert encoder().shape == SHAPES[injection]
    rows = []
    encoder.mlp.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    encoder().sum().backward()
    assert rows == [(7, 12)]
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_virtual_tokens_values_are_ordered_by_layer_key_before_value_head():
    encoder = _encoder("prefix", reparameterization=4)
    flat = encoder.mlp(encoder.embeddings)  # (P, L * 2 * Hkv * d)
    prompts = encoder()
    for layer, kind, head in [(0, 0, 0), (0, 1, 0), (1, 0, 1), (2, 1, 1)]:
        start = ((layer * 2 + kind) * 2 + head) * 5
        assert torch.equal(prompts[layer, kind, head], flat[:, start : start + 5])
    encoder = _encoder("deep", reparameterization=4)
    flat = encoder.mlp(encoder.embeddings)
    assert torch.equal(encoder()[1], flat[:, 12:24])


def test_a_gate_starts_shut():
    encoder = _encoder("prefix", prompt_init="gated")
    assert encoder.gate.shape == (3, 4, 7) and (encoder.gate == GATE_START).all()
    assert _encoder("prefix").gate is None


def test_dropout_keeps_the_mean():
    encoder = _encoder("deep", length=2000, prompt_dropout=0.25)
    assert torch.equal(encoder.eval()(), encoder.prompts)
    dropped = encoder.train()()
    kept = dropped != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.01
    assert_equal(dropped[kept], encoder.prompts[kept] / 0.75)


@pytest.mark.parametrize("injection", SHAPES)
def test_prompts_are_made_once_a_step_and_never_per_row(injection):
    model = tiny_model("llama", injection).train()
    made = []
    encoder = model.adapters["default"].encoder
    encoder.register_forward_hook(lambda module, inputs, output: made.append(tuple(output.shape)))
    batch = padded(text_rows(), "left")
    model(**batch.inputs).last_hidden_state.sum().backward()
    assert made == [tuple(encoder.prompts.shape)]
