"""The gradient of a bias on the text's scores: one number for each pair of a query and a key, met once each."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.attention import prompt_attention
from ptv2_fast.kernels import launch
from ptv2_fast.kernels.prompt_backward import Needs

CASES = {
    "plain": {},
    "causal-gqa": {"heads": 4, "kv_heads": 2, "queries": 65, "options": {"causal": True}},
    "N5-M70-causal": {"queries": 5, "keys": 70, "options": {"causal": True}},
    "window": {"batch": 1, "queries": 97, "options": {"window": 9}},
    "mask-left": {"mask": "left", "queries": 65},
    "mask-holes-P0": {"mask": "holes", "prompt": 0},
    "mask-none-in-row-0-P0": {"mask": "none-in-row-0", "prompt": 0},
    "softcap-prompt_bias": {"prompt_bias": True, "options": {"softcap": 2.0}},
    "bank": {"batch": 4, "queries": 17, "prompt": 33, "entries": 3, "lens": (0, 33, 7)},
    "dropout": {"options": {"dropout_p": 0.3}},
}


LEADINGS = ("whole", "rows", "heads", "shared")
# Each pair is two more kernels to compile, or to interpret: a bias is broadcast over rows and heads, in every way, in
# the plainest case, in the fullest, and where heads share keys.
PAIRS = [
    (name, leading)
    for name in CASES
    for leading in LEADINGS
    if leading == "whole"
    or name in ("plain", "bank")
    or (name == "causal-gqa" and not torch.cuda.is_available())
    or (leading == "shared" and not torch.cuda.is_available())
]


@pytest.mark.parametrize(("name", "leading"), PAIRS)
def test_matches_reference(make_call, budget, name, leading):
    options = CASES[name]
    batch, heads = options.get("batch", 2), options.get("heads", 2)
    shape = {"whole": (batch, heads), "rows": (batch, 1), "heads": (1, heads), "shared": (1, 1)}[leading]
    call = make_call(**options, bias=shape)
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    found = call.kernel_gradients(grad_output, output, lse, Needs(bias=True))
    assert found.q is found.prompt_k is found.prompt_bias is None
    assert found.bias.shape == call.arguments["bias"].shape
    budget.check("d bias", found.bias, call.bias_truth(grad_output), None)
    hidden = torch.isneginf(call.arguments["bias"])
    assert not found.bias[hidden].any()


def test_masked_keys_get_zero_whatever_their_score(make_call):
    call = make_call(mask="holes", queries=65, bias=(2, 2))
    masked = call.arguments["key_mask"][:, None, None, :] == 0
    call.tensors[1] = torch.where(masked.transpose(2, 3), call.tensors[1] * 1e4, call.tensors[1])
    output, lse = call.kernel()
    found = call.kernel_gradients(torch.randn_like(output), output, lse, Needs(bias=True)).bias
    assert found.any() and not found[masked.expand_as(found)].any()


def test_only_the_text_kernel_is_launched(make_call):
    call = make_call(bias=(2, 2))
    output, lse = call.kernel()
    with launch.record(90) as launches:
        call.kernel_gradients(output, output, lse, Needs(bias=True))
    names = [recorded.kernel.__name__ for recorded in launches]
    assert names == ["_prompt_attention_delta_kernel", "_prompt_attention_backward_text_kernel"]


def test_two_runs_give_the_same_bits(make_call):
    call = make_call(bias=(1, 2), queries=65, options={"causal": True})
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    first, second = (call.kernel_gradients(grad_output, output, lse, Needs(bias=True)).bias for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_made_of_queries_trains_through_the_public_function(make_call, budget, compiled):
    """As disentangled attention makes it: the bias depends on q, so q gets a gradient along two ways."""
    call = make_call(queries=19, mask="right", scaled=False)
    table = torch.randn(16, 19, device=call.tensors[0].device)

    def run(backend, dtype):
        q, k, v, prompt_k, prompt_v = (x.detach().to(dtype).requires_grad_() for x in call.tensors)

        def attend(q, k, v, prompt_k, prompt_v):
            return prompt_attention(
                q, k, v, prompt_k[0], prompt_v[0], bias=q @ table.to(dtype), backend=backend,
                key_mask=call.arguments["key_mask"],
            )  # fmt: skip

        is_compiled = compiled and backend == "triton"
        function = torch.compile(attend, fullgraph=True, backend="aot_eager") if is_compiled else attend
        output = function(q, k, v, prompt_k, prompt_v)
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(dtype)
        return torch.autograd.grad(output, (q, k, v, prompt_k, prompt_v), upstream)

    # On a GPU the torch backend is PyTorch's own kernel, whose float32 is not what is judged here.
    for backend in ("triton",) if torch.cuda.is_available() else ("triton", "torch"):
        for found, truth in zip(run(backend, torch.float32), run("reference", torch.float64), strict=True):
            budget.check(f"{backend} gradient", found, truth, None)
