"""prompt_attention_backward against autograd through the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.prompt_backward import Needs, _rows_by_entry

# Shrinking a failure costs minutes under the interpreter; the draw that failed is small already.
PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate]
CHECKS = list(hypothesis.HealthCheck)
# A GPU compiles another version of five kernels for nearly every draw.
EXAMPLES = 3 if torch.cuda.is_available() else 8
NAMES = ("q", "k", "v", "prompt_k", "prompt_v", "prompt_bias")


def check_gradients(call, budget):
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    truths = call.truth(grad_output)
    # float32 has a tolerance of its own and needs no baseline.
    baselines = [None] * len(truths) if output.dtype == torch.float32 else call.baseline(grad_output)
    one_by_one = call.kernel_gradients(grad_output, output, lse, by_rows=False)
    by_rows = call.gradients_by_rows(grad_output, output, lse) or ()
    for way, gradients in (("", one_by_one), (" by rows", by_rows[:5])):
        for name, tensor, value, truth, baseline in zip(
            NAMES, call.tensors, gradients, truths, baselines, strict=False
        ):
            assert value.dtype == tensor.dtype
            # autograd gives None where a size is 0
            truth = torch.zeros_like(tensor) if truth is None else truth
            budget.check(f"d {name}{way}", value, truth, baseline)


def test_matches_reference(call, budget):
    check_gradients(call, budget)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "prompt", "queries"),
    # A program steps by tiles (and so at times to another row or head), by rows, by heads; with tiles of 64 and of 32.
    [(3, 2, 2, 70, 53), (5, 1, 1, 20, 48), (2, 1, 4, 64, 20)],
)
def test_prompt_gradients_of_whole_tiles(make_call, budget, batch, kv_heads, group, prompt, queries):
    call = make_call(
        batch=batch, kv_heads=kv_heads, heads=kv_heads * group, queries=queries, keys=queries, prompt=prompt,
        head_dim=16, scaled=False,
    )  # fmt: skip
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    config = launch.LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=1, short_maxnreg=168)
    gradients = call.kernel_gradients(grad_output, output, lse, config=config)
    for name, value, truth in zip(NAMES, gradients, call.truth(grad_output), strict=False):
        budget.check(f"d {name}", value, truth, None)


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=CHECKS, phases=PHASES)
@hypothesis.given(data=st.data())
def test_matches_reference_on_drawn_shapes(data, make_call, budget):
    draw = data.draw
    kv_heads = draw(st.integers(1, 2), "kv_heads")
    call = make_call(
        batch=draw(st.integers(1, 2), "batch"),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 2), "group"),
        queries=draw(st.integers(0, 40), "queries"),
        keys=draw(st.integers(0, 40), "keys"),
        prompt=draw(st.integers(0, 40), "prompt"),
        head_dim=draw(st.sampled_from([16, 32]), "head_dim"),
        scaled=False,
        mask=draw(st.sampled_from([None, "left", "right", "holes"]), "mask"),
        prompt_bias=draw(st.booleans(), "bias"),
        options={"causal": draw(st.booleans(), "causal"), "window": draw(st.none() | st.integers(1, 50), "window")},
    )
    check_gradients(call, budget)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Needs(), []),
        (Needs(prompt=True), ["delta", "backward_prompt", "sum_slots"]),
        (Needs(query=True), ["backward_query"]),
        (Needs(text=True), ["delta", "backward_text"]),
        (Needs(query=True, text=True), ["backward_query", "backward_text"]),
        (Needs(prompt_bias=True), ["delta", "backward_prompt", "sum_slots", "sum_slots"]),
    ],
    ids=str,
)
def test_only_what_is_asked_for_is_launched(make_call, needs, expected):
    call = make_call(prompt_bias=True)
    output, lse = call.kernel()
    with launch.record(90) as launches:
        call.kernel_gradients(output, output, lse, needs)
    names = [recorded.kernel.__name__ for recorded in launches]
    assert [name.removeprefix("_prompt_attention_").strip("_").removesuffix("_kernel") for name in names] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3, "queries": 33, "heads": 2, "options": {"causal": True}},
        {"packed": (1, 33, 64), "head_dim": 80},
        {"mask": "none-in-row-0", "prompt": 0, "queries": 17},
    ],
    ids=["causal", "packed", "nothing-seen"],
)
def test_gradients_of_keys_do_not_depend_on_who_makes_delta(make_call, budget, options):
    call = make_call(**options)
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    whole = call.kernel_gradients(grad_output, output, lse, by_rows=False)
    alone = call.kernel_gradients(grad_output, output, lse, Needs(text=True, prompt=True), by_rows=False)
    assert alone.q is None and any(gradient.any() for gradient in alone[1:5])
    for name, value, expected in zip(NAMES[1:5], alone[1:5], whole[1:5], strict=True):
        budget.check_same(f"d {name}", value, expected)


def test_what_was_not_asked_for_is_none(make_call):
    call = make_call()
    output, lse = call.kernel()
    gradients = call.kernel_gradients(output, output, lse, Needs(prompt=True))
    assert gradients.q is gradients.k is gradients.v is gradients.prompt_bias is None
    assert gradients.prompt_k.shape == call.tensors[3].shape


def test_entry_that_no_row_uses_gets_zeros(make_call):
    call = make_call(entries=3, batch=3, prompt=17, prompt_bias=True)
    output, lse = call.kernel()
    gradients = call.kernel_gradients(torch.randn_like(output), output, lse)
    for gradient in gradients[3:6]:
        assert gradient[0].any()
        assert not gradient[2].any()


def test_integers_of_any_width_choose_the_prompt(make_call, budget):
    call = make_call(batch=3, queries=5, prompt=7, entries=3, lens=(7, 0, 4), options={"dropout_p": 0.5})
    results = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        for name in ("prompt_index", "prompt_lens"):
            call.arguments[name] = call.arguments[name].to(dtype)
        output, lse = call.kernel()
        results.append((output, *call.kernel_gradients(output, output, lse)[:5]))
    for result in results[1:]:
        for name, value, expected in zip(("o", *NAMES), result, results[0], strict=False):
            budget.check_same(name, value, expected)


@pytest.mark.parametrize(("dtype", "entries"), [(torch.uint8, 256), (torch.int8, 128), (torch.int64, 128)], ids=str)
def test_rows_are_sorted_by_entry_of_the_largest_bank_an_index_can_name(dtype, entries, device):
    index = torch.tensor([entries - 1, 0, entries - 1, 3], dtype=dtype, device=device)
    problem = SimpleNamespace(prompt_k=torch.empty(entries, 1, 1, 16, device=device), prompt_index=index)
    order, bounds = _rows_by_entry(problem)
    assert order.tolist() == [1, 3, 0, 2]
    assert bounds.tolist() == [0, 1, 1, 1, *([2] * (entries - 4)), 4]


def test_query_without_keys_gives_zero_gradients(make_call):
    call = make_call(mask="nothing", prompt=0)
    output, lse = call.kernel()
    gradients = call.kernel_gradients(torch.randn_like(output), output, lse)
    assert not any(gradient.any() for gradient in gradients[:3])


def test_masked_keys_get_zero_gradients(make_call):
    call = make_call(mask="holes", queries=65)
    # A masked key's score is not part of lse, and may exceed it by more than float32's exponent.
    masked = call.arguments["key_mask"][:, None, :, None] == 0
    call.tensors[1] = torch.where(masked, call.tensors[1] * 1e4, call.tensors[1])
    output, lse = call.kernel()
    gradients = call.kernel_gradients(torch.randn_like(output), output, lse)
    assert not gradients.k[masked.expand_as(gradients.k)].any()
    assert not gradients.v[masked.expand_as(gradients.v)].any()


@pytest.mark.parametrize("layout", ["expanded", "columns"])
def test_any_strides_of_the_incoming_gradient(make_call, budget, layout):
    call = make_call()
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    if layout == "expanded":
        grad_output = grad_output[:1, :, :1].expand_as(output)
    else:
        grad_output = grad_output.transpose(2, 3).contiguous().transpose(2, 3)
    gradients = call.kernel_gradients(grad_output, output, lse)
    for name, value, truth in zip(NAMES, gradients, call.truth(grad_output), strict=False):
        budget.check(f"d {name}", value, truth, None)


def test_two_runs_give_the_same_bits(make_call):
    call = make_call(queries=33, heads=2, kv_heads=1, prompt_bias=True, options={"dropout_p": 0.2})
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    first, second = (call.kernel_gradients(grad_output, output, lse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))


def test_batch_sum_does_not_depend_on_how_it_is_split(make_call, budget, monkeypatch):
    call = make_call(batch=3, queries=33, heads=2, kv_heads=1)
    output, lse = call.kernel()
    grad_output = torch.randn_like(output)
    truths = call.truth(grad_output)
    for programs in (1, 1000):
        monkeypatch.setattr(launch, "target_programs", lambda device, programs=programs: programs)
        gradients = call.kernel_gradients(grad_output, output, lse, Needs(prompt=True))
        budget.check("d prompt_k", gradients.prompt_k, truths[3], None)
        budget.check("d prompt_v", gradients.prompt_v, truths[4], None)
