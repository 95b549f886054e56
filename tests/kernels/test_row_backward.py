"""The kernel that owns short rows: when it is chosen, what it launches, and what it never reads.

That its gradients are right is judged beside the other kernels' in test_prompt_backward.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.gradients import Needs
from ptv2_fast.kernels.problem import Problem
from ptv2_fast.kernels.row_backward import is_chosen, refusal, row_gradients

TEXT = Needs(query=True, text=True, prompt=True)
HOPPERS_TARGET = 4 * 132


@pytest.fixture(scope="module")
def form():
    """BERT-base's on Hopper: 32 rows of 128 tokens."""
    with launch.record(90):
        q, k, v = (torch.empty(32, 128, 12, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        prompts = [torch.empty(1, 12, 20, 64, dtype=torch.bfloat16) for _ in range(2)]
        return Problem.of(q, k, v, *prompts).form


def test_short_rows_that_fill_the_card_are_chosen(form):
    assert is_chosen(form, TEXT, HOPPERS_TARGET)
    # Two programs for each multiprocessor: 22 rows of 12 heads are 264.
    assert is_chosen(replace(form, num_rows=22), TEXT, HOPPERS_TARGET)
    assert not is_chosen(replace(form, num_rows=21), TEXT, HOPPERS_TARGET)
    # Where the counts do not favour it, it serves who asks for it.
    for arch in (80, 100):
        assert refusal(replace(form, arch=arch), TEXT) is None
        assert not is_chosen(replace(form, arch=arch), TEXT, HOPPERS_TARGET)


@pytest.mark.parametrize(
    ("change", "needs", "reason"),
    [
        ({}, Needs(prompt=True), "q, k and v together"),
        ({}, Needs(query=True, prompt=True), "q, k and v together"),
        ({}, TEXT._replace(bias=True), "of no bias"),
        ({}, TEXT._replace(prompt_bias=True), "of no bias"),
        ({"num_queries": 129}, TEXT, "at most 128 queries and keys; got 129 and 128"),
        ({"num_keys": 129}, TEXT, "at most 128 queries and keys; got 128 and 129"),
        ({"dtype": torch.float32}, TEXT, "in 16 bits"),
        ({"arch": launch.GFX942}, TEXT, "NVIDIA"),
        ({"head_dim": 192}, TEXT, "up to 128; got 192"),
        ({"num_kv_heads": 6}, TEXT, "may have 64 of them; got 128"),
    ],
)
def test_what_it_cannot_serve_is_said_and_not_chosen(form, change, needs, reason):
    changed = replace(form, num_rows=1000, **change)
    assert reason in refusal(changed, needs)
    assert not is_chosen(changed, needs, HOPPERS_TARGET)


def test_who_asks_for_it_in_vain_is_told(make_call):
    call = make_call(queries=129)
    output, lse = call.kernel()
    with pytest.raises(ValueError, match="by_rows must be False or None .* at most 128"):
        call.kernel_gradients(output, output, lse, TEXT, by_rows=True)


@pytest.mark.parametrize(
    ("options", "needs", "expected"),
    [
        ({}, TEXT, ["backward_rows", "sum_slots"]),
        ({}, TEXT._replace(prompt=False), ["backward_rows"]),
        ({"prompt": 0}, TEXT, ["backward_rows"]),
        ({"prompt": 33}, TEXT, ["backward_rows", "backward_prompt", "sum_slots"]),
        ({"entries": 3}, TEXT, ["backward_rows", "rows_by_entry", "backward_prompt", "sum_slots"]),
    ],
    ids=str,
)
def test_what_is_launched(make_call, options, needs, expected):
    call = make_call(queries=9, kv_heads=2, dtype=torch.float16, **options)
    output, lse = call.kernel()
    with launch.record(90) as launches:
        found = call.kernel_gradients(output, output, lse, needs)
    names = [recorded.kernel.__name__ for recorded in launches]
    assert [name.removeprefix("_prompt_attention_").strip("_").removesuffix("_kernel") for name in names] == expected
    assert (found.prompt_k is not None) == needs.prompt


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("form", [{"bias": (2, 2)}, {"entries": 3, "lens": (2, 5, 0)}, {"lens": (3,)}], ids=str)
def test_what_is_hidden_may_be_nan(make_call, form, by_rows):
    call = make_call(queries=33, kv_heads=2, mask="holes", **form)
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    expected = call.kernel_gradients(grad_output, output, lse, TEXT, by_rows=by_rows)
    hidden = call.arguments["key_mask"][:, None, :, None] == 0
    for place in (1, 2):
        call.tensors[place] = call.tensors[place].masked_fill(hidden, float("nan"))
    if "bias" in form:
        call.arguments["bias"] = call.arguments["bias"].masked_fill(hidden.transpose(2, 3), float("nan"))
    if "lens" in form:
        missing = torch.arange(5, device=output.device) >= call.arguments["prompt_lens"][:, None]
        for place in (3, 4):
            call.tensors[place] = call.tensors[place].masked_fill(missing[:, None, :, None], float("nan"))
    found = call.kernel_gradients(grad_output, output, lse, TEXT, by_rows=by_rows)
    for value, other in zip(found[:5], expected[:5], strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_sums_over_rows_do_not_depend_on_who_owns_them(make_call, budget, monkeypatch, programs):
    call = make_call(batch=5, queries=9, kv_heads=2)
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    monkeypatch.setattr(launch, "target_programs", lambda device: programs)
    first, second = (call.gradients_by_rows(grad_output, output, lse) for _ in range(2))
    for name, value, again, truth in zip(
        "q k v prompt_k prompt_v".split(), first, second, call.truth(grad_output), strict=False
    ):
        budget.check(f"d {name}", value, truth, None)
        assert torch.equal(value, again)


def test_text_gradients_may_lie_in_any_memory(make_call):
    call = make_call(queries=9, kv_heads=2, prompt=0)
    output, lse = call.kernel()
    expected = call.kernel_gradients(output, output, lse, TEXT, by_rows=True)
    # One buffer of all three, token by token.
    batch, heads, tokens, head_dim = output.shape
    text = output.new_empty(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    row_gradients(Problem.of(*call.tensors, **call.arguments), output, output, lse, text, True)
    for value, other in zip(text, expected[:3], strict=True):
        assert torch.equal(value, other)
