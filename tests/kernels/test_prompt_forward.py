"""prompt_attention_forward against the float64 reference."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward

# Shrinking a failure costs minutes under the interpreter; the draw that failed is small already.
PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate]
CHECKS = list(hypothesis.HealthCheck)
# A GPU compiles another version of the kernel for nearly every draw.
EXAMPLES = 4 if torch.cuda.is_available() else 12


def test_matches_reference(call, budget):
    output, lse = call.kernel()
    truth, truth_lse = call.truth()
    baseline = None if output.dtype == torch.float32 else call.baseline()[0]
    budget.check("o", output, truth, baseline)
    sees_a_key = torch.isfinite(truth_lse)
    assert torch.equal(torch.isfinite(lse), sees_a_key)
    assert lse.dtype == torch.float32
    # lse is float32 whatever the inputs are, and the only rounding of 16-bit inputs has been done.
    budget.check("lse", lse[sees_a_key], truth_lse[sees_a_key], None)


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=CHECKS, phases=PHASES)
@hypothesis.given(data=st.data())
def test_matches_reference_on_drawn_shapes(data, make_call, budget):
    draw = data.draw
    kv_heads = draw(st.integers(1, 2), "kv_heads")
    call = make_call(
        batch=draw(st.integers(1, 3), "batch"),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3), "group"),
        queries=draw(st.integers(0, 40), "queries"),
        keys=draw(st.integers(0, 70), "keys"),
        prompt=draw(st.integers(0, 70), "prompt"),
        head_dim=draw(st.sampled_from([16, 32]), "head_dim"),
        scaled=False,
        mask=draw(st.sampled_from([None, "left", "right", "holes"]), "mask"),
        prompt_bias=draw(st.booleans(), "bias"),
        options={"causal": draw(st.booleans(), "causal"), "window": draw(st.none() | st.integers(1, 50), "window")},
    )
    output, lse = call.kernel()
    truth, truth_lse = call.truth()
    budget.check("o", output, truth, None)
    assert torch.equal(torch.isfinite(lse), torch.isfinite(truth_lse))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"packed": (0, 0)}], ids=str)
def test_nothing_to_do(make_call, sizes):
    call = make_call(**sizes)
    output, lse = call.kernel()
    assert output.shape == call.tensors[0].shape
    assert output.numel() == lse.numel() == 0


def test_query_without_keys_gives_zeros(make_call):
    call = make_call(mask="nothing", prompt=0)
    output, lse = call.kernel()
    assert not output.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [None, (33, 17)])
@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_window_longer_than_any_row_hides_nothing(make_call, budget, causal, packed, window):
    call = make_call(queries=33, packed=packed, options={"causal": causal})
    expected = call.kernel()
    call.arguments["window"] = window
    for name, value, truth in zip(("o", "lse"), call.kernel(), expected, strict=True):
        budget.check_same(name, value, truth)


def test_whole_number_as_softcap(make_call):
    call = make_call(queries=5, options={"softcap": 2.0})
    expected, _ = call.kernel()
    call.arguments["softcap"] = 2
    with launch.record(90) as launches:
        call.kernel()
    # An integer would be compiled into the kernel: one more version of it for every cap.
    assert isinstance(launches[0].arguments["factors"].softcap, float)
    assert torch.equal(call.kernel()[0], expected)


def test_output_is_laid_out_by_tokens(make_call):
    output, _ = make_call().kernel()
    batch, heads, tokens, head_dim = output.shape
    merged = output.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
    assert merged.data_ptr() == output.data_ptr()


def test_keys_outside_the_mask_are_never_read(make_call):
    call = make_call(mask="right", queries=65)
    expected, _ = call.kernel()
    padding = call.arguments["key_mask"][:, None, :, None] == 0
    for place in (1, 2):
        call.tensors[place] = call.tensors[place].masked_fill(padding, float("nan"))
    output, _ = call.kernel()
    assert torch.equal(output, expected)


def test_max_seqlen_is_only_a_hint(make_call):
    call = make_call(packed=(5, 0, 33, 17))
    expected, expected_lse = call.kernel()
    call.arguments["max_seqlen"] = None
    output, lse = call.kernel()
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)


def test_two_runs_give_the_same_bits(make_call):
    call = make_call(options={"dropout_p": 0.5})
    first, second = call.kernel(), call.kernel()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_result_does_not_depend_on_tile_sizes(make_call, budget):
    call = make_call(mask="right", options={"dropout_p": 0.5})
    expected, _ = call.kernel()
    config = launch.LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    output, _ = prompt_attention_forward(*call.tensors, **call.arguments, config=config)
    budget.check("o", output, expected, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale must be positive; got 0.0"),
        ({"dropout_p": 0.1}, "seed must be given"),
        ({"prompt_index": None}, "prompt_index must be given for a bank of 3 prompts"),
    ],
)
def test_refuses(make_call, change, message):
    call = make_call(entries=3)
    call.arguments.update(change)
    with pytest.raises(ValueError, match=message):
        call.kernel()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 is only refused by the interpreter")
def test_refuses_bfloat16_under_the_interpreter(make_call):
    with pytest.raises(ValueError, match="interpreter"):
        make_call(dtype=torch.bfloat16).kernel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 13 GB of GPU memory")
def test_offsets_beyond_two_to_the_31(make_call, device, budget):
    call = make_call(dtype=torch.bfloat16, head_dim=64, kv_heads=2, scaled=False)
    truth, baseline = call.truth()[0], call.baseline()[0]
    for place, tensor in enumerate(call.tensors[:3]):
        far = torch.empty(2**31 + tensor.numel(), dtype=tensor.dtype, device=device)
        _, heads, tokens, head_dim = tensor.shape
        spread = far.as_strided(tensor.shape, (2**31, tokens * head_dim, head_dim, 1))
        call.tensors[place] = spread.copy_(tensor)
    output, _ = call.kernel()
    budget.check("o", output, truth, baseline)
