"""The torch backend against the literal judge in float64: outputs, log-sum-exp, every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptv2_fast.attention import prompt_attention
from tolerances import assert_equal


def _tensors(batch, heads, kv_heads, queries, keys, length, dim, entries=0, dtype=torch.float64):
    prompt = (kv_heads, length, dim)
    if entries:
        prompt = (entries, *prompt)
    shapes = {
        "q": (batch, heads, queries, dim),
        "k": (batch, kv_heads, keys, dim),
        "v": (batch, kv_heads, keys, dim),
        "prompt_k": prompt,
        "prompt_v": prompt,
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def _mask(kind, batch, keys):
    if kind is None:
        return None
    mask = torch.zeros(batch, keys, dtype=torch.long)
    for row in range(batch):
        count = (3 * row + 1) % (keys + 1)
        match kind:
            case "left":
                mask[row, keys - count :] = 1
            case "right":
                mask[row, :count] = 1
            case "holes":
                mask[row, torch.randperm(keys)[:count]] = 1
    return mask


def _run(backend, tensors, upstream, options):
    """Output, log-sum-exp and the gradient of every tensor, both biases included."""
    trained = dict(tensors)
    trained |= {name: options[name] for name in ("prompt_bias", "bias") if options.get(name) is not None}
    trained = {name: tensor.clone().requires_grad_() for name, tensor in trained.items()}
    out, lse = prompt_attention(**{**options, **trained}, backend=backend, return_lse=True)
    plain = prompt_attention(**{**options, **trained}, backend=backend)
    assert_equal(plain, out, "without log-sum-exp")
    grads = torch.autograd.grad((plain * upstream).sum(), list(trained.values()))
    return {"out": out, "lse": lse, **dict(zip(trained, grads, strict=True))}


def _compare(tensors, dtype=torch.float64, **options):
    upstream = torch.randn_like(tensors["q"])
    actual = _run("torch", tensors, upstream, options)
    expected = _run("reference", tensors, upstream, options)
    blind = torch.isneginf(expected["lse"])
    assert torch.equal(torch.isneginf(actual["lse"]), blind)
    for result in (actual, expected):
        result["lse"] = result["lse"].masked_fill(blind, 0.0).to(dtype)
    # The log-sum-exp is float32 by contract; the reference keeps its own dtype.
    assert_equal(actual.pop("lse"), expected.pop("lse"), "lse", torch.float32)
    for name, tensor in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        assert_equal(actual[name], tensor, name, dtype)
    return actual


@st.composite
def _problems(draw):
    causal = draw(st.booleans())
    queries = draw(st.sampled_from([1, 2, 5, 17]))
    extra = draw(st.sampled_from([0, 3])) if causal else 0
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "batch": draw(st.sampled_from([1, 3])),
        "heads": kv_heads * draw(st.sampled_from([1, 2])),
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": queries + extra,
        "length": draw(st.sampled_from([0, 1, 5, 100])),
        "dim": draw(st.sampled_from([4, 16])),
        "causal": causal,
        "mask": draw(st.sampled_from([None, "left", "right", "holes", "none"])),
        "window": draw(st.sampled_from([None, 1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "bias": draw(st.sampled_from([None, "shared", "own"])),
        "gate": draw(st.booleans()),
        "entries": draw(st.sampled_from([0, 3])),
        "lens": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(_problems())
def test_dense(problem):
    torch.manual_seed(problem["seed"])
    sizes = ("batch", "heads", "kv_heads", "queries", "keys", "length", "dim", "entries")
    tensors = _tensors(**{name: problem[name] for name in sizes})
    batch, heads, length = problem["batch"], problem["heads"], problem["length"]
    options = {name: problem[name] for name in ("causal", "window", "softcap", "scale")}
    options["key_mask"] = _mask(problem["mask"], batch, problem["keys"])
    if problem["bias"] is not None:
        leading = (1, 1) if problem["bias"] == "shared" else (batch, heads)
        bias = torch.randn(*leading, problem["queries"], problem["keys"], dtype=torch.float64)
        options["bias"] = bias.masked_fill(bias > 1.5, float("-inf"))
    entries = problem["entries"]
    if entries:
        options["prompt_index"] = torch.randint(0, entries, (batch,))
        if problem["lens"]:
            options["prompt_lens"] = torch.randint(0, length + 1, (entries,))
    if problem["gate"]:
        leading = (entries,) if entries else ()
        options["prompt_bias"] = torch.randn(*leading, heads, length, dtype=torch.float64)
    _compare(tensors, **options)


@pytest.mark.parametrize("length", [0, 1, 5, 100])
@pytest.mark.parametrize("mask", ["left", "right", "holes", "none"])
def test_float32(mask, length):
    tensors = _tensors(3, 4, 2, 9, 9, length, 16, dtype=torch.float32)
    _compare(tensors, torch.float32, key_mask=_mask(mask, 3, 9), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_text_sees_the_prompt_alone(causal):
    tensors = _tensors(2, 2, 2, 3, 3, 4, 8)
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    out = _compare(tensors, key_mask=mask, causal=causal)["out"]
    scores = tensors["q"][0] @ tensors["prompt_k"].transpose(1, 2) * 8**-0.5
    assert_equal(out[0], scores.softmax(-1) @ tensors["prompt_v"])


def test_a_query_that_sees_nothing_gives_zeros():
    tensors = _tensors(2, 2, 1, 3, 3, 0, 8)
    mask = torch.tensor([[0, 0, 1], [0, 0, 0]])
    result = _compare(tensors, key_mask=mask, causal=True)
    assert not result["out"][1].any() and not result["out"][0, :, :2].any()
    assert result["out"][0, :, 2].abs().sum() > 0
    for name in ("q", "k", "v"):
        assert not result[name][1].any(), name


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 2}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(("queries", "keys", "length"), [(0, 0, 5), (0, 4, 0), (3, 0, 5), (3, 0, 0)], ids=str)
def test_empty_sides(queries, keys, length, options):
    """No query, no text key, no prompt: shapes hold, and nothing is NaN."""
    tensors = _tensors(2, 4, 2, queries, keys, length, 8)
    result = _compare(tensors, key_mask=torch.ones(2, keys, dtype=torch.bool), **options)
    assert result["out"].shape == (2, 4, queries, 8)


def test_an_empty_batch():
    tensors = _tensors(0, 4, 2, 3, 3, 5, 8)
    assert prompt_attention(**tensors, backend="torch").shape == (0, 4, 3, 8)


@pytest.mark.parametrize("index", [None, [1, 0, 2, 2]], ids=["one", "bank"])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 2}], ids=str)
def test_packed(length, index, options):
    """Rows one behind the other, one of them empty, equal to each row by itself."""
    lengths = [4, 0, 1, 6]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    entries = 0 if index is None else 3
    tensors = _tensors(1, 4, 2, 11, 11, length, 8, entries)
    for name in ("q", "k", "v"):
        tensors[name] = tensors[name][0].transpose(0, 1).contiguous()
    options = {**options, "cu_seqlens": bounds}
    if index is not None:
        options |= {"prompt_index": torch.tensor(index), "prompt_lens": torch.tensor([0, length, 1 % (length + 1)])}
        options["prompt_bias"] = torch.randn(3, 4, length, dtype=torch.float64)
    result = _compare(tensors, **options)
    dense = {k: v for k, v in options.items() if k in ("causal", "window", "prompt_lens", "prompt_bias")}
    for row, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        one = {n: tensors[n][start:end].transpose(0, 1)[None] for n in ("q", "k", "v")}
        one |= {n: tensors[n] for n in ("prompt_k", "prompt_v")}
        if index is not None:
            one["prompt_index"] = torch.tensor(index[row : row + 1])
        alone = prompt_attention(**one, **dense, backend="torch")[0].transpose(0, 1)
        assert_equal(result["out"][start:end], alone)


def test_a_bank_entry_is_the_prompt_by_itself():
    """Rows with prompts of different lengths; what stands beyond a length is never read."""
    tensors = _tensors(4, 4, 2, 5, 5, 7, 8, entries=3)
    index, lens = torch.tensor([2, 0, 1, 2]), torch.tensor([7, 0, 3])
    for name in ("prompt_k", "prompt_v"):
        for entry, count in enumerate(lens.tolist()):
            tensors[name][entry, :, count:] = 1e4
    mask = _mask("left", 4, 5)
    out = prompt_attention(**tensors, key_mask=mask, prompt_index=index, prompt_lens=lens, backend="torch")
    for row, entry in enumerate(index.tolist()):
        own = slice(0, int(lens[entry]))
        alone = prompt_attention(
            *(tensors[name][row : row + 1] for name in ("q", "k", "v")),
            tensors["prompt_k"][entry, :, own],
            tensors["prompt_v"][entry, :, own],
            key_mask=mask[row : row + 1],
            backend="torch",
        )
        assert_equal(out[row], alone[0])


def test_strided_views_are_served_as_they_are():
    """transformers hands views of (B, N, H, D)."""
    tensors = _tensors(2, 4, 2, 6, 6, 3, 8)
    expected = prompt_attention(**tensors, causal=True, backend="torch")
    for name in ("q", "k", "v"):
        strided = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided.is_contiguous()
        tensors[name] = strided
    for name in ("prompt_k", "prompt_v"):
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert_equal(prompt_attention(**tensors, causal=True, backend="torch"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_sdpa(dtype):
    """The error against float64 is at most 1.5 times that of SDPA on the same joined keys."""
    tensors = _tensors(2, 4, 2, 33, 33, 17, 32)
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = prompt_attention(**{n: t.double() for n, t in low.items()}, backend="reference")
    keys = torch.cat([low["prompt_k"].expand(2, -1, -1, -1), low["k"]], dim=2)
    values = torch.cat([low["prompt_v"].expand(2, -1, -1, -1), low["v"]], dim=2)
    peer = torch.nn.functional.scaled_dot_product_attention(low["q"], keys, values, enable_gqa=True)
    out = prompt_attention(**low, backend="torch")
    assert out.dtype == dtype
    error, peer_error = ((x.double() - exact).norm() for x in (out, peer))
    assert error <= 1.5 * peer_error


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_dropout_keeps_the_mean_and_drops_its_share(softcap):
    """Values of one: a row's output is the kept mass over 1 - p, so its mean is one."""
    torch.manual_seed(0)
    p, keys, length = 0.3, 30, 10
    q = torch.zeros(8, 4, 64, 8)
    k = torch.zeros(8, 4, keys, 8)
    prompt = torch.zeros(4, length, 8)
    options = {"dropout_p": p, "softcap": softcap, "backend": "torch"}
    out = prompt_attention(q, k, torch.ones_like(k), prompt, torch.ones_like(prompt), **options)
    assert abs(float(out.mean()) - 1.0) < 0.01
    # One of 40 equal weights a draw: the variance of the kept share is p / (1 - p) / 40.
    expected = (p / (1 - p) / (keys + length)) ** 0.5
    assert abs(float(out[..., 0].std()) / expected - 1.0) < 0.05
    # Virtual tokens are dropped like any other key.
    only = prompt_attention(q, k, torch.zeros_like(k), prompt, torch.ones_like(prompt), **options)
    assert abs(float(only.mean()) - length / (keys + length)) < 0.01
    torch.manual_seed(1)
    first = prompt_attention(q, k, k + 1, prompt, prompt, **options)
    torch.manual_seed(1)
    assert torch.equal(prompt_attention(q, k, k + 1, prompt, prompt, **options), first)
    assert not torch.equal(prompt_attention(q, k, k + 1, prompt, prompt, **options), first)


def test_log_sum_exp_carries_no_gradient():
    tensors = {n: t.requires_grad_() for n, t in _tensors(1, 2, 2, 3, 3, 2, 8).items()}
    out, lse = prompt_attention(**tensors, backend="torch", return_lse=True)
    assert out.requires_grad and not lse.requires_grad
