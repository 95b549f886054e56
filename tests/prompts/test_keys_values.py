"""Banks of several adapters' keys and values."""

from __future__ import annotations

import torch

from ptv2_fast.attention.prompt_batch import LayerPrompt
from ptv2_fast.prompts.keys_values import stack_bank


def _prompt(length, gate=False):
    bias = torch.randn(4, length) if gate else None
    return LayerPrompt(torch.randn(2, length, 8), torch.randn(2, length, 8), bias)


def test_a_bank_holds_prompts_of_different_lengths_and_none():
    long, short = _prompt(5), _prompt(2)
    banks = stack_bank([(long, None), (None, None), (short, short)])
    assert banks[0].keys.shape == banks[0].values.shape == (3, 2, 5, 8)
    assert banks[0].lens.tolist() == [5, 0, 2]
    assert torch.equal(banks[0].keys[0], long.keys)
    assert torch.equal(banks[0].values[2, :, :2], short.values)
    assert banks[0].bias is None
    assert banks[1].lens.tolist() == [0, 0, 2] and banks[1].keys.shape == (3, 2, 2, 8)


def test_a_layer_that_nobody_prompts_has_no_bank():
    assert stack_bank([(None, _prompt(1)), (None, None)])[0] is None


def test_a_gate_of_one_is_zero_for_the_others():
    gated, plain = _prompt(3, gate=True), _prompt(5)
    bank = stack_bank([(gated,), (plain,), (None,)])[0]
    assert bank.bias.shape == (3, 4, 5)
    assert torch.equal(bank.bias[0, :, :3], gated.bias)
    assert not bank.bias[1:].any()


def test_gradients_reach_every_member():
    members = [_prompt(3), _prompt(5)]
    for member in members:
        member.keys.requires_grad_()
    stack_bank([(member,) for member in members])[0].keys.sum().backward()
    for member in members:
        assert torch.equal(member.keys.grad, torch.ones_like(member.keys))
