"""What is hidden from every query (masked keys, prompts past their length, other rows) reaches nothing, NaN or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptv2_fast.attention import prompt_attention

BACKENDS = ["torch", "reference", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]

# Interpreted kernels are slow; on a card they are compiled for each kind of call.
DRAWS = {"torch": 100, "reference": 60, "triton": 6}


@st.composite
def _calls(draw):
    """Sizes and options; few queries are the kernel for decoding's, more are the forward's."""
    queries = draw(st.sampled_from([1, 3, 20, 37]))
    return {
        "batch": draw(st.sampled_from([1, 2])),
        "heads": draw(st.sampled_from([1, 2])),
        "queries": queries,
        "keys": queries + draw(st.sampled_from([0, 5, 33])),
        "length": draw(st.sampled_from([0, 1, 6, 40])),
        "dim": draw(st.sampled_from([16, 80])),
        "entries": draw(st.sampled_from([0, 2])),
        "mask": draw(st.sampled_from(["left", "right", "holes", "nothing"])),
        "bias": draw(st.sampled_from([None, (1, 1), "own"])),
        "gate": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 4])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "poison": draw(st.sampled_from(POISONS)),
        "seed": draw(st.integers(0, 1000)),
    }


def _mask(kind, batch, keys):
    """(B, M) bool."""
    count = torch.randint(0, keys + 1, (batch, 1), device=DEVICE)
    position = torch.arange(keys, device=DEVICE)
    return {
        "right": position < count,
        "left": position >= count,
        "holes": torch.rand(batch, keys, device=DEVICE) < 0.6,
        "nothing": torch.zeros(batch, keys, dtype=torch.bool, device=DEVICE),
    }[kind]


def _dense(call):
    """(tensors, options, where each tensor holds what is hidden) of a drawn call."""
    batch, heads, queries, keys, length, dim = (
        call[name] for name in ("batch", "heads", "queries", "keys", "length", "dim")
    )
    leading = (call["entries"],) if call["entries"] else ()
    shapes = {
        "q": (batch, heads, queries, dim), "k": (batch, 1, keys, dim), "v": (batch, 1, keys, dim),
        "prompt_k": (*leading, 1, length, dim), "prompt_v": (*leading, 1, length, dim),
    }  # fmt: skip
    mask = _mask(call["mask"], batch, keys)
    lens = torch.randint(0, length + 1, (max(1, call["entries"]),), device=DEVICE)
    absent = torch.arange(length, device=DEVICE) >= lens[:, None]  # (R, P)
    absent = absent if leading else absent[0]
    hidden = {"k": ~mask[:, None, :, None], "v": ~mask[:, None, :, None]}
    hidden |= {name: absent[..., None, :, None] for name in ("prompt_k", "prompt_v")}
    if call["bias"] is not None:
        own = call["bias"] == "own"
        shapes["bias"] = (batch if own else 1, heads if own else 1, queries, keys)
        # What a row of the batch shares with others is hidden where it is from all of them.
        hidden["bias"] = ~mask[:, None, None] if own else ~mask.any(0)
    if call["gate"]:
        shapes["prompt_bias"] = (*leading, heads, length)
        hidden["prompt_bias"] = absent[..., None, :]
    options = {name: call[name] for name in ("causal", "window", "softcap", "dropout_p")}
    options |= {"key_mask": mask, "prompt_lens": lens}
    if call["entries"]:
        options["prompt_index"] = torch.randint(0, call["entries"], (batch,), device=DEVICE)
    return _random(shapes), options, hidden


def _random(shapes):
    return {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}


def _run(tensors, options, backend, attend=prompt_attention):
    """Outputs, with and without log-sum-exp, and the gradient of every tensor."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    results = {}
    # The torch backend has a road of its own for each.
    for name, wants_lse in [("out", False), ("explicit", True)][: 2 if backend == "torch" else 1]:
        torch.manual_seed(1)
        out = attend(**leaves, **options, backend=backend, return_lse=wants_lse)
        out, lse = out if wants_lse else (out, None)
        upstream = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream, materialize_grads=True)
        results |= {
            name: out.detach(),
            **{f"d {leaf} ({name})": grad for leaf, grad in zip(leaves, grads, strict=True)},
        }
    return results


def _poisoned(tensors, hidden, value):
    return tensors | {name: tensors[name].masked_fill(where, value) for name, where in hidden.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_reaches_nothing(backend):
    """The same bits whatever it holds, and a gradient of zero."""
    check = given(_calls())(lambda call: _check_masked(backend, call))
    settings(max_examples=DRAWS[backend], deadline=None, derandomize=True)(check)()


def _check_masked(backend, call):
    torch.manual_seed(call["seed"])
    tensors, options, hidden = _dense(call)
    expected = _run(_poisoned(tensors, hidden, 0.5), options, backend)
    got = _run(_poisoned(tensors, hidden, call["poison"]), options, backend)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert torch.isfinite(value).all(), name
    for name, where in hidden.items():
        assert not got[f"d {name} (out)"].masked_select(where).any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 24])
def test_half_precision(backend, dtype, queries):
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("interpreted Triton has no bfloat16")
    call = {"batch": 2, "heads": 2, "queries": queries, "keys": 40, "length": 6, "dim": 16, "entries": 0,
            "mask": "holes", "bias": None, "gate": False, "causal": True, "window": None, "softcap": None,
            "dropout_p": 0.0}  # fmt: skip
    tensors, options, hidden = _dense(call)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, got = (_run(_poisoned(tensors, hidden, value), options, backend) for value in (0.5, float("nan")))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_rows_of_a_batch_do_not_meet(backend, form, causal, dropout_p):
    """A row that is NaN is NaN for itself and for the prompt that it shares, which sums over rows."""
    lengths = [20, 3, 17]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    packed = form == "packed"
    heads = [("q", 2), ("k", 1), ("v", 1)]
    shapes = {name: (40, count, 16) if packed else (3, count, 20, 16) for name, count in heads}
    tensors = _random({**shapes, "prompt_k": (2, 1, 5, 16), "prompt_v": (2, 1, 5, 16)})
    options = {"prompt_index": torch.tensor([0, 1, 0], device=DEVICE), "causal": causal, "dropout_p": dropout_p}
    if packed:
        options |= {"cu_seqlens": bounds, "max_seqlen": 20}
    row = slice(20, 23) if packed else slice(1, 2)
    spoilt = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, _ in heads:
        spoilt[name][row] = float("nan")
    expected, got = (_run(given, options, backend) for given in (tensors, spoilt))
    for name in ("out", "d q (out)", "d k (out)", "d v (out)"):
        assert got[name][row].isnan().all(), name
        assert _same_but(row, got[name], expected[name]), name
    for name in ("d prompt_k (out)", "d prompt_v (out)"):
        assert torch.equal(got[name][0], expected[name][0]), name


def _same_but(row, one, other):
    keep = torch.ones(len(one), dtype=torch.bool, device=one.device)
    keep[row] = False
    return torch.equal(one[keep], other[keep])


def _drawn():
    call = {"batch": 2, "heads": 2, "queries": 5, "keys": 9, "length": 6, "dim": 16, "entries": 2, "mask": "holes",
            "bias": "own", "gate": True, "causal": True, "window": None, "softcap": None, "dropout_p": 0.0}  # fmt: skip
    return _dense(call)


def test_compiled_too():
    """Where nobody looks at values, and the compiler sees what autograd does not."""
    tensors, options, hidden = _drawn()
    expected = _run(_poisoned(tensors, hidden, 0.5), options, "torch")
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    got = _run(_poisoned(tensors, hidden, float("nan")), options, "torch", compiled)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_traced_too():
    """A trace made with a mask that hides nothing serves one that does, and lengths too."""
    tensors, options, hidden = _drawn()
    numbers = {"causal": True, "backend": "torch"}

    def attend(tensors, integers):
        return prompt_attention(**tensors, **integers, **numbers)

    integers = {name: options[name] for name in ("key_mask", "prompt_lens", "prompt_index")}
    whole = integers | {name: torch.full_like(integers[name], 6) for name in ("key_mask", "prompt_lens")}
    traced = torch.jit.trace(attend, (tensors, whole), check_trace=False, strict=False)
    got = traced(_poisoned(tensors, hidden, float("nan")), integers)
    torch.testing.assert_close(got, attend(_poisoned(tensors, hidden, 0.5), integers))
