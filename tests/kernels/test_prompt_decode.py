"""prompt_attention_decode against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode

CASES = {
    "one-query": {"queries": 1, "keys": 70, "prompt": 65, "batch": 5},
    "gqa-causal": {"queries": 3, "keys": 37, "prompt": 17, "heads": 4, "options": {"causal": True}},
    "many-rows-in-prompt-tile": {"queries": 9, "keys": 9, "prompt": 33, "batch": 3, "options": {"causal": True}},
    "window-softcap": {"queries": 2, "keys": 97, "options": {"causal": True, "window": 20, "softcap": 2.0}},
    "mask-none-in-row-0": {"queries": 2, "keys": 65, "mask": "none-in-row-0"},
    "nothing-to-see": {"queries": 1, "keys": 9, "prompt": 0, "mask": "nothing"},
    "only-prompt": {"queries": 2, "keys": 0, "prompt": 40},
    "bank-biases": {"batch": 4, "queries": 2, "keys": 17, "prompt": 33, "entries": 3, "lens": (0, 33, 7),
                    "prompt_bias": True, "bias": (1, 2)},
    "D80-columns": {"queries": 1, "keys": 37, "head_dim": 80, "layout": "columns"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("programs", [1, 1000], ids=["few-chunks", "many-chunks"])
def test_matches_reference(make_call, budget, monkeypatch, case, programs):
    monkeypatch.setattr(launch, "target_programs", lambda device: programs)
    call = make_call(**{"scaled": False, **case})
    bias = {"prompt_bias": call.tensors[5]} if len(call.tensors) > 5 else {}
    output, lse = prompt_attention_decode(*call.tensors[:5], **call.arguments, **bias)
    truth, truth_lse = call.truth()
    sees_a_key = torch.isfinite(truth_lse)
    budget.check("o", output, truth, None)
    assert torch.equal(torch.isfinite(lse), sees_a_key)
    budget.check("lse", lse[sees_a_key], truth_lse[sees_a_key], None)


def test_float16(make_call, budget):
    call = make_call(dtype=torch.float16, queries=1, keys=37, scaled=False)
    output, _ = prompt_attention_decode(*call.tensors, **call.arguments)
    budget.check("o", output, call.truth()[0], call.baseline()[0])


def test_shared_prompt_is_read_by_one_program_per_head_and_chunk(make_call, monkeypatch):
    monkeypatch.setattr(launch, "target_programs", lambda device: 1)
    call = make_call(batch=8, queries=1, keys=5, prompt=40, scaled=False)
    with launch.record(90) as launches:
        prompt_attention_decode(*call.tensors, **call.arguments)
    assert launches[0].arguments["prompt_tiles"] == 1
    assert launches[0].arguments["prompt_chunks"] == 1


def test_backward_kernels_accept_its_result(make_call, budget):
    call = make_call(queries=3, keys=17, scaled=False)
    output, lse = prompt_attention_decode(*call.tensors, **call.arguments)
    grad_output = torch.randn_like(output)
    gradients = call.kernel_gradients(grad_output, output, lse)
    for name, value, truth in zip("q k v".split(), gradients, call.truth(grad_output), strict=False):
        budget.check(f"d {name}", value, truth, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"packed": (3, 4)}, "cu_seqlens must be None"), ({"options": {"dropout_p": 0.1}}, "dropout_p must be 0")],
)
def test_refuses(make_call, options, message):
    call = make_call(**options)
    with pytest.raises(ValueError, match=message):
        prompt_attention_decode(*call.tensors, **call.arguments)
