"""The triton backend: autograd, custom ops, torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.attention import prompt_attention, triton_backend
from ptv2_fast.kernels import launch
from ptv2_fast.kernels.dropout import dropout_keep_mask
from ptv2_fast.reference.attention import prompt_attention as reference
from tolerances import assert_same_bits

# More queries than go to the decode kernel.
QUERIES = triton_backend.DECODE_QUERIES + 3


@pytest.fixture
def tensors(make_call):
    """q, k, v, prompt_k, prompt_v, prompt_bias, all trainable, and a mask."""
    call = make_call(queries=QUERIES, prompt_bias=True, mask="right", scaled=False)
    return [tensor.requires_grad_() for tensor in call.tensors], call.arguments["key_mask"]


def attend(tensors, mask, backend, **options):
    *inputs, prompt_bias = tensors
    return prompt_attention(
        *inputs[:3], inputs[3][0], inputs[4][0], prompt_bias=prompt_bias[0], key_mask=mask, backend=backend, **options
    )


def gradients(output, tensors):
    return torch.autograd.grad(output.sin().sum(), tensors)


@pytest.mark.parametrize("queries", [1, QUERIES], ids=["decode", "forward"])
def test_serves_the_public_function_with_gradients(make_call, budget, queries):
    call = make_call(queries=queries, keys=QUERIES, prompt_bias=True, mask="right", scaled=False)
    tensors, mask = [tensor.requires_grad_() for tensor in call.tensors], call.arguments["key_mask"]
    got, expected = (attend(tensors, mask, backend, causal=True) for backend in ("triton", "reference"))
    budget.check("o", got, expected, None)
    for name, a, b in zip(
        "q k v prompt_k prompt_v prompt_bias".split(),
        gradients(got, tensors),
        gradients(expected, tensors),
        strict=True,
    ):
        budget.check(f"d {name}", a, b, None)


def test_returns_lse_without_gradient(tensors):
    output, lse = attend(*tensors, "triton", return_lse=True)
    assert output.requires_grad and not lse.requires_grad
    assert lse.shape == output.shape[:3] and lse.dtype == torch.float32


def test_compiles_whole_forward_and_backward(tensors):
    inputs, mask = tensors
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, got = attend(inputs, mask, "triton"), compiled(inputs, mask, "triton")
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True))


def test_compiled_dropout_follows_the_global_seed(tensors):
    inputs, mask = tensors
    compiled = torch.compile(functools.partial(attend, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(inputs, mask, "triton"))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("form", ["dense", "bias", "packed", "decode"])
def test_opcheck(make_call, form):
    options = {
        "dense": {"queries": QUERIES, "mask": "right", "prompt_bias": True},
        "bias": {"queries": QUERIES, "bias": (2, 2)},
        "packed": {"packed": (5, 14), "options": {"dropout_p": 0.2, "window": 4}},
        "decode": {"queries": 1, "keys": 9, "options": {"causal": True, "softcap": 3.0}},
    }[form]
    call = make_call(scaled=False, **options)
    tensors = [tensor.requires_grad_() for tensor in call.tensors] + [None] * (6 - len(call.tensors))
    arguments = {"max_seqlen": None, "window": None, "softcap": None, "dropout_p": 0.0, **call.arguments}
    if arguments.get("bias") is not None:
        arguments["bias"].requires_grad_()
    rest = [arguments.get(name) for name in ("bias", "key_mask", "cu_seqlens", "prompt_index", "prompt_lens", "seed")]
    numbers = [arguments[name] for name in ("max_seqlen", "causal", "window", "softcap", "scale", "dropout_p")]
    torch.library.opcheck(triton_backend.forward_op, (*tensors, *rest, *numbers))


class _Clones(TorchDispatchMode):
    """Counts copies made of whole tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.clone.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_of_projected_prompts_are_laid_out_as_the_projections_are(make_call, compiled):
    call = make_call(queries=QUERIES, scaled=False)
    q, k, v, prompt_k, prompt_v = call.tensors
    _, heads, length, head_dim = prompt_k.shape
    # As a model projects them: (P, Hkv * d).
    projected = [x[0].transpose(0, 1).reshape(length, heads * head_dim).requires_grad_() for x in (prompt_k, prompt_v)]

    def attend_to(projected):
        prompts = [x.view(length, heads, head_dim).transpose(0, 1) for x in projected]
        return prompt_attention(q, k, v, *prompts, backend="triton")

    run = torch.compile(attend_to, fullgraph=True, backend="aot_eager") if compiled else attend_to
    output = run(projected)
    with _Clones() as clones:
        got = gradients(output, projected)
    if not compiled:
        assert clones.count == 0
    apart = [x.requires_grad_() for x in (prompt_k, prompt_v)]
    expected = gradients(prompt_attention(q, k, v, apart[0][0], apart[1][0], backend="triton"), apart)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b[0].transpose(0, 1).reshape(length, heads * head_dim))


def test_dropout_is_replayed_in_backward(make_call, budget, monkeypatch):
    seed = torch.tensor([1234567890123])
    call = make_call(queries=QUERIES, scaled=False)
    tensors = [tensor.requires_grad_() for tensor in call.tensors]
    monkeypatch.setattr(torch, "randint", lambda *_, **options: seed.to(options["device"]))
    output = prompt_attention(*tensors[:3], tensors[3][0], tensors[4][0], dropout_p=0.4, backend="triton")
    keep = dropout_keep_mask(*output.shape[:3], tensors[3].shape[2] + QUERIES, 0.4, seed.to(output.device))
    truth = reference(
        *(tensor.double() for tensor in tensors), scale=call.arguments["scale"], dropout_p=0.4, dropout_keep=keep
    )
    budget.check("o", output, truth, None)
    for got, expected in zip(gradients(output, tensors), gradients(truth, tensors), strict=True):
        budget.check("gradient", got, expected, None)


def test_frozen_inputs_launch_nothing_for_themselves(make_call, monkeypatch):
    call = make_call(queries=QUERIES, scaled=False)
    for tensor in call.tensors[3:]:
        tensor.requires_grad_()
    launched = []
    original = launch.run

    def spy(kernel, *arguments):
        launched.append(kernel.__name__)
        original(kernel, *arguments)

    monkeypatch.setattr(launch, "run", spy)
    output = prompt_attention(*call.tensors[:3], call.tensors[3][0], call.tensors[4][0], backend="triton")
    launched.clear()
    output.sum().backward()
    assert launched == [
        "_prompt_attention_delta_kernel",
        "_prompt_attention_backward_prompt_kernel",
        "_sum_slots_kernel",
    ]


def test_saves_nothing_of_the_size_of_the_scores(make_call):
    call = make_call(queries=QUERIES, scaled=False)
    tensors = [tensor.requires_grad_() for tensor in call.tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        prompt_attention(*tensors[:3], tensors[3][0], tensors[4][0], backend="triton")
    assert max(saved) == tensors[0].numel()


def test_unavailable_reason(monkeypatch):
    assert triton_backend.unavailable_reason("cuda") is None
    assert "mps" in triton_backend.unavailable_reason("mps")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable_reason("cpu") is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in triton_backend.unavailable_reason("cpu")
    monkeypatch.setattr(triton_backend, "_HAS_TRITON", False)
    assert "not installed" in triton_backend.unavailable_reason("cuda")
