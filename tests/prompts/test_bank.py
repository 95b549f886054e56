"""Banks of several adapters' keys and values."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast import PTuningV2Config, PTuningV2Model
from ptv2_fast.adapter import BASE_ROW
from ptv2_fast.attention.prompt_batch import LayerPrompt
from ptv2_fast.prompts import bank
from ptv2_fast.prompts.bank import stack_bank
from ptv2_fast.prompts.source import PromptSource
from tiny_models import tiny_base
from tolerances import assert_equal

LAYERS, TASKS = 12, 16
FROM_A_LIST = "aten.lift_fresh.default"
WAITING = (FROM_A_LIST, "aten._local_scalar_dense.default", "aten.nonzero.default", "aten._to_copy.default")


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


def test_prompts_of_one_length_need_no_padding_and_no_lens():
    banks = stack_bank([(_prompt(5),), (_prompt(5),)])
    assert banks[0].lens is None and banks[0].keys.shape == (2, 2, 5, 8)


def test_layers_share_their_lens():
    banks = stack_bank([(_prompt(5), _prompt(5)), (_prompt(2), _prompt(2))])
    assert banks[0].lens is banks[1].lens
    assert banks[0].lens.dtype == torch.int32 and banks[0].lens.tolist() == [5, 2]


class _Operations(TorchDispatchMode):
    """Counts PyTorch's operations, views among them."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _model(lengths, family="bert", **options):
    """A tiny model with one training adapter for each length."""
    config = [PTuningV2Config("FEATURE_EXTRACTION", num_virtual_tokens=length, **options) for length in lengths]
    model = PTuningV2Model(tiny_base(family, num_hidden_layers=LAYERS), config[0], "task0")
    for number, own in enumerate(config[1:], 1):
        model.add_adapter(f"task{number}", own)
    for adapter in model.adapters.values():
        for parameter in adapter.encoder.parameters():
            torch.nn.init.normal_(parameter).requires_grad_()
    return model.train()


def _operations_of_a_step(model, tasks):
    ids = torch.randint(5, 30, (TASKS, 7))
    names = {"adapter_names": [f"task{row}" for row in range(TASKS)]} if tasks > 1 else {}
    model(input_ids=ids, **names)
    with _Operations() as operations:
        model(input_ids=ids, **names).last_hidden_state.sum().backward()
    return operations.counted


@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_a_step_of_many_tasks_is_not_many_steps(injection):
    one, many = (_operations_of_a_step(_model([5] * n, injection=injection), n) for n in (1, TASKS))
    assert many.total() < 1.2 * one.total()
    # The rows' entries and offsets are lists that go to the device once.
    assert many[FROM_A_LIST] - one[FROM_A_LIST] <= 2


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 3, 5)], ids=str)
def test_no_list_is_copied_to_the_device_and_nothing_waits_for_it(lengths):
    model = _model(lengths)
    with _Operations() as operations:
        PromptSource.bank([*map(model._source, model.adapters), None], "torch")
    assert not any(operations.counted[name] for name in WAITING)


@pytest.mark.parametrize("family", ["bert", "qwen3", "gpt2", "modernbert"])
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": (0, 2)}, {"injection": "prefix"}, {"prompt_init": "gated"}, {"reparameterization": 8}],
    ids=str,
)
def test_banks_made_together_are_the_single_ones(family, options, monkeypatch):
    model = _model([4, 4, 4], family, **options)
    sources = [model._source("task0"), None, model._source("task2")]
    together = PromptSource.bank(sources, "torch")
    parameters = [p for name in ("task0", "task2") for p in model.adapters[name].encoder.parameters()]
    monkeypatch.setattr("ptv2_fast.prompts.source.made_together", lambda *_: None)
    single = PromptSource.bank(sources, "torch")
    assert [b is None for b in together] == [b is None for b in single]
    for one, other in zip(_real(together), _real(single), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(sum((x * x).sum() for x in _real(b)), parameters) for b in (together, single)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _real(banks):
    """The tensors of all layers, without what stands in entries beyond their length."""
    found = []
    for layer in banks:
        if layer is not None:
            assert layer.lens.tolist() == [4, 0, 4]
            found += [x[[0, 2]] for x in (layer.keys, layer.values, layer.bias) if x is not None]
    return found


def test_adapters_that_differ_are_stacked(monkeypatch):
    made = []
    padded = bank._padded
    monkeypatch.setattr(bank, "_padded", lambda rows, longest: made.append(longest) or padded(rows, longest))
    model = _model([5, 3])
    PromptSource.bank(list(map(model._source, model.adapters)), "torch")
    assert made == [5] * 2 * LAYERS


def test_rows_without_any_prompt_alone():
    model = _model([5]).eval()
    ids = torch.randint(5, 30, (2, 7))
    with model.disable_adapter():
        expected = model(input_ids=ids).last_hidden_state
    assert_equal(model(input_ids=ids, adapter_names=[BASE_ROW] * 2).last_hidden_state, expected)
