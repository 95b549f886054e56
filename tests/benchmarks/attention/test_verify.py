"""The judge passes what is right and catches what is nearly right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.attention.cases import case_of
from benchmarks.attention.inputs import make_inputs
from benchmarks.attention.provider import gradients
from benchmarks.attention.providers import all_providers
from benchmarks.attention.verify import make_judge, relative_error


def _results(case, inputs, name="ours_torch"):
    call = next(p for p in all_providers() if p.name == name).build(case, inputs)
    out = call.forward()
    return call.common(out.detach(), gradients(call, out))


def test_a_right_provider_passes(padded_case):
    inputs = make_inputs(padded_case, "cpu")
    verdict = make_judge(padded_case, inputs).verdict(_results(padded_case, inputs))
    assert not verdict.wrong, verdict.reason
    assert set(verdict.errors) == {"out", "q", "k", "v", "prompt_k", "prompt_v"}


@pytest.mark.parametrize("name", ["out", "q", "k", "v", "prompt_k", "prompt_v"])
def test_each_tensor_is_looked_at(padded_case, name):
    inputs = make_inputs(padded_case, "cpu")
    results = _results(padded_case, inputs)
    spoiled = results[name].clone(memory_format=torch.contiguous_format)
    spoiled.view(-1)[0] += 1e-2 * spoiled.norm()
    verdict = make_judge(padded_case, inputs).verdict(results | {name: spoiled})
    assert verdict.wrong == [name]


def test_an_unwritten_element_never_passes(padded_case):
    inputs = make_inputs(padded_case, "cpu")
    results = _results(padded_case, inputs)
    out = results["out"].clone()
    out[0, 0, 0, 0] = float("nan")
    assert make_judge(padded_case, inputs).verdict(results | {"out": out}).wrong == ["out"]


def test_padding_positions_do_not_count(padded_case):
    inputs = make_inputs(padded_case, "cpu")
    results = _results(padded_case, inputs)
    out = results["out"].masked_fill(~inputs.real[:, None, :, None], float("nan"))
    assert not make_judge(padded_case, inputs).verdict(results | {"out": out}).wrong


@pytest.mark.parametrize("planted", ["no mask", "one key short", "no prompt", "upper left"])
def test_a_neighbouring_function_is_caught(planted):
    case = case_of("tiny", 3, 10, 4, causal=True, padding=0.4, dtype="fp32")
    inputs = make_inputs(case, "cpu")
    judge = make_judge(case, inputs)
    if planted == "no mask":
        other, tensors = replace(case, causal=False), replace(inputs, key_mask=None)
    elif planted == "one key short":
        mask = inputs.key_mask & (torch.arange(case.N) > 0)
        other, tensors = case, replace(inputs, key_mask=mask)
    elif planted == "no prompt":
        # Prompt keys that attract nothing are as good as none.
        other, tensors = case, replace(inputs, prompt_v=torch.zeros_like(inputs.prompt_v))
    else:
        other, tensors = case, replace(inputs, k=inputs.k.roll(1, dims=2), v=inputs.v.roll(1, dims=2))
    assert "out" in judge.verdict(_results(other, tensors)).wrong


def test_a_bank_is_judged_row_by_row(padded_case):
    inputs = make_inputs(padded_case, "cpu")
    judge = make_judge(padded_case, inputs, bank=True)
    assert judge.expected["prompt_k"].shape == inputs.bank_k.shape
    assert "out" in judge.verdict(_results(padded_case, inputs)).wrong


def test_some_rows_stand_for_all(padded_case):
    inputs = make_inputs(padded_case, "cpu")
    inputs.grad_out[1] = 0.0
    results = _results(padded_case, inputs)
    judge = make_judge(padded_case, inputs, rows=(0, 2))
    assert judge.expected["out"].shape[0] == 2
    assert not judge.verdict(results).wrong


def test_heads_are_picked_with_their_group():
    case = replace(case_of("llama-3-8b", 1, 4, 2, dtype="fp32"), d=16, H=6, Hkv=3)
    inputs = make_inputs(case, "cpu")
    judge = make_judge(case, inputs)
    some = replace(judge, kv_heads=(0, 2), expected={
        name: _pick(x, name, case) for name, x in judge.expected.items()
    })  # fmt: skip
    assert not some.verdict(_results(case, inputs)).wrong


def _pick(x, name, case):
    if name.startswith("prompt"):
        return x[[0, 2]]
    return x[:, [0, 1, 4, 5]] if name in ("out", "q") else x[:, [0, 2]]


def test_relative_error_of_another_shape_is_infinite():
    assert relative_error(torch.zeros(2), torch.zeros(3, dtype=torch.float64)) == float("inf")
