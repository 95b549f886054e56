"""Every refusal of prompt_attention, and the choice of its backend."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_fast.attention import api, prompt_attention

B, H, HKV, N, P, D, R = 2, 4, 2, 5, 3, 8, 3


def _arguments(**changes):
    arguments = {
        "q": torch.randn(B, H, N, D),
        "k": torch.randn(B, HKV, N, D),
        "v": torch.randn(B, HKV, N, D),
        "prompt_k": torch.randn(HKV, P, D),
        "prompt_v": torch.randn(HKV, P, D),
        "backend": "torch",
    }
    return arguments | changes


def _packed(**changes):
    return _arguments(
        **{
            "q": torch.randn(N, H, D),
            "k": torch.randn(N, HKV, D),
            "v": torch.randn(N, HKV, D),
            "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
            **changes,
        }
    )


def _bank(**changes):
    return _arguments(
        **{
            "prompt_k": torch.randn(R, HKV, P, D),
            "prompt_v": torch.randn(R, HKV, P, D),
            "prompt_index": torch.tensor([0, 2]),
            **changes,
        }
    )


CASES = {
    "q-rank": (_arguments(q=torch.zeros(B, N, D)), r"q must be \(B, H, N, D\).*got \(2, 5, 8\)"),
    "q-packed-rank": (_packed(q=torch.zeros(B, H, N, D)), r"q must be \(T, H, D\) with cu_seqlens"),
    "q-dtype": (_arguments(q=torch.zeros(B, H, N, D).long()), "q must be float16.*got torch.int64"),
    "k-rank": (_arguments(k=torch.zeros(B, N, D)), "k must have 4 dimensions like q"),
    "k-batch": (
        _arguments(k=torch.zeros(3, HKV, N, D), v=torch.zeros(3, HKV, N, D)),
        "k must agree with q .*dimensions 0 and -1; got \\(3,",
    ),
    "k-dim": (
        _arguments(k=torch.zeros(B, HKV, N, 4), v=torch.zeros(B, HKV, N, 4)),
        "k must agree with q",
    ),
    "k-heads": (
        _arguments(k=torch.zeros(B, 3, N, D), v=torch.zeros(B, 3, N, D)),
        "k must have a number of heads that divides q's 4; got 3",
    ),
    "k-no-heads": (
        _arguments(k=torch.zeros(B, 0, N, D), v=torch.zeros(B, 0, N, D)),
        "k must have a number of heads that divides q's 4; got 0",
    ),
    "k-dtype": (_arguments(k=torch.zeros(B, HKV, N, D).double()), "k must have q's dtype"),
    "v-shape": (_arguments(v=torch.zeros(B, HKV, N + 1, D)), "v must have the shape of k"),
    "v-dtype": (_arguments(v=torch.zeros(B, HKV, N, D).half()), "v must have q's dtype"),
    "v-device": (
        _arguments(v=torch.zeros(B, HKV, N, D, device="meta")),
        "v must be on q's device, cpu; got meta",
    ),
    "prompt_k-rank": (_arguments(prompt_k=torch.zeros(P, D)), r"prompt_k must be \(2, P, 8\) or"),
    "prompt_k-heads": (_arguments(prompt_k=torch.zeros(H, P, D)), r"prompt_k must be \(2, P, 8\)"),
    "prompt_k-dim": (_arguments(prompt_k=torch.zeros(HKV, P, 4)), r"prompt_k must be .*got"),
    "prompt_k-dtype": (
        _arguments(prompt_k=torch.zeros(HKV, P, D).double()),
        "prompt_k must have q's dtype",
    ),
    "prompt_v-shape": (
        _arguments(prompt_v=torch.zeros(HKV, P + 1, D)),
        "prompt_v must have the shape of prompt_k",
    ),
    "prompt_v-dtype": (
        _arguments(prompt_v=torch.zeros(HKV, P, D).double()),
        "prompt_v must have q's dtype",
    ),
    "cu_seqlens-dtype": (_packed(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens must be int32"),
    "cu_seqlens-rank": (
        _packed(cu_seqlens=torch.zeros(1, 2, dtype=torch.int32)),
        "cu_seqlens must be int32 of shape",
    ),
    "cu_seqlens-start": (
        _packed(cu_seqlens=torch.tensor([1, 5], dtype=torch.int32)),
        r"cu_seqlens must rise from 0 to the number of tokens, 5; got \[1, 5\]",
    ),
    "cu_seqlens-end": (
        _packed(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
        "cu_seqlens must rise from 0",
    ),
    "cu_seqlens-falls": (
        _packed(cu_seqlens=torch.tensor([0, 4, 2, 5], dtype=torch.int32)),
        "cu_seqlens must rise",
    ),
    "index-without-bank": (
        _arguments(prompt_index=torch.tensor([0, 0])),
        "prompt_index must be given exactly when prompt_k is a bank",
    ),
    "bank-without-index": (_bank(prompt_index=None), "prompt_index must be given exactly"),
    "index-shape": (_bank(prompt_index=torch.tensor([0])), r"prompt_index must be .*shape \(2,\)"),
    "index-dtype": (_bank(prompt_index=torch.tensor([0.0, 1.0])), "prompt_index must be integers"),
    "index-high": (
        _bank(prompt_index=torch.tensor([0, R])),
        r"prompt_index must lie in \[0, 2\]; got \[0, 3\]",
    ),
    "index-low": (_bank(prompt_index=torch.tensor([-1, 0])), r"prompt_index must lie in \[0, 2\]"),
    "lens-shape": (_bank(prompt_lens=torch.tensor([1])), r"prompt_lens must be .*shape \(3,\)"),
    "lens-high": (
        _bank(prompt_lens=torch.tensor([1, 2, P + 1])),
        r"prompt_lens must lie in \[0, 3\]",
    ),
    "mask-shape": (
        _arguments(key_mask=torch.ones(B, N + P)),
        r"key_mask must be bool or integer of shape \(2, 5\); got",
    ),
    "mask-dtype": (_arguments(key_mask=torch.ones(B, N)), "key_mask must be bool or integer"),
    "mask-packed": (_packed(key_mask=torch.ones(1, N)), "key_mask must be None with cu_seqlens"),
    "prompt_bias-shape": (
        _arguments(prompt_bias=torch.zeros(HKV, P)),
        r"prompt_bias must be floating point of shape \(4, 3\); got",
    ),
    "prompt_bias-bank": (_bank(prompt_bias=torch.zeros(H, P)), r"prompt_bias .*\(3, 4, 3\)"),
    "prompt_bias-dtype": (_arguments(prompt_bias=torch.zeros(H, P).int()), "prompt_bias must be"),
    "bias-shape": (
        _arguments(bias=torch.zeros(1, 1, N, N + P)),
        r"bias must be floating point of shape \(1 or 2, 1 or 4, 5, 5\)",
    ),
    "bias-rank": (_arguments(bias=torch.zeros(N, N)), "bias must be floating point of shape"),
    "bias-packed": (_packed(bias=torch.zeros(1, 1, N, N)), "bias must be None with cu_seqlens"),
    "dropout-one": (_arguments(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
    "dropout-negative": (_arguments(dropout_p=-0.1), r"dropout_p must be in \[0, 1\)"),
    "window-zero": (_arguments(window=0), "window must be at least 1 or None; got 0"),
    "softcap-zero": (_arguments(softcap=0.0), "softcap must be positive or None; got 0.0"),
    "softcap-nan": (_arguments(softcap=float("nan")), "softcap must be positive"),
    "softcap-infinite": (_arguments(softcap=float("inf")), "softcap must be positive or None; got inf"),
    "scale-zero": (_arguments(scale=0.0), "scale must be positive or None; got 0.0"),
    "scale-negative": (_arguments(scale=-0.5, backend="reference"), "scale must be positive or None; got -0.5"),
    "scale-nan": (_arguments(scale=float("nan")), "scale must be positive"),
    "backend": (_arguments(backend="nope"), "backend must be one of auto, triton.*got 'nope'"),
}


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_attention(**arguments)


@pytest.mark.parametrize("arguments", [_arguments(), _packed(), _bank()], ids=["dense", "packed", "bank"])
def test_the_unchanged_arguments_are_served(arguments):
    """What the cases above change one thing of is itself accepted."""
    assert prompt_attention(**arguments).shape == arguments["q"].shape


def test_triton_says_why_it_cannot_serve(monkeypatch):
    """A backend that is asked for by name is never replaced by another."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "backend='triton' cannot serve this call: .*on the CPU.*TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=message):
        prompt_attention(**_arguments(backend="triton"))
    assert prompt_attention(**_arguments(backend="auto")).shape == (B, H, N, D)


def test_auto_takes_torch_on_the_cpu(monkeypatch):
    from ptv2_fast.attention import torch_backend, triton_backend

    served = []
    real = torch_backend.prompt_attention

    def spy(*args, **kwargs):
        served.append("torch")
        return real(*args, **kwargs)

    def never(*args, **kwargs):
        raise AssertionError("triton was asked")

    monkeypatch.setattr(torch_backend, "prompt_attention", spy)
    monkeypatch.setattr(triton_backend, "prompt_attention", never)
    prompt_attention(**_arguments(backend="auto"))
    assert served == ["torch"]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "module"),
    [(64, torch.bfloat16, "triton"), (72, torch.bfloat16, "torch"), (64, torch.float64, "torch")],
)
def test_auto_takes_triton_on_cuda_for_what_it_has(head_dim, dtype, module):
    with FakeTensorMode():
        query = torch.empty(1, 2, 3, head_dim, dtype=dtype, device="cuda")
        assert api._backend("auto", query).__module__ == f"ptv2_fast.attention.{module}_backend"
