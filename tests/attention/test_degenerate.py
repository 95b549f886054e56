"""Dtypes that count, sides that are empty: every backend gives the same, and every gradient that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptv2_fast.attention import prompt_attention
from tolerances import assert_equal

ROOT = Path(__file__).parents[2]
BACKENDS = ["torch", "reference", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
INTEGERS = [*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]


def _random(**shapes):
    return {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}


def _bank(queries=4):
    shapes = {"q": (3, 2, queries, 16), "k": (3, 1, 5, 16), "v": (3, 1, 5, 16)}
    tensors = _random(**shapes, prompt_k=(3, 1, 6, 16), prompt_v=(3, 1, 6, 16))
    integers = {"prompt_index": [1, 0, 2], "prompt_lens": [6, 0, 3], "key_mask": [[1, 0, 1, 1, 0]] * 3}
    return tensors, {name: torch.tensor(values, device=DEVICE) for name, values in integers.items()}


def _packed():
    tensors = _random(q=(9, 2, 16), k=(9, 1, 16), v=(9, 1, 16), prompt_k=(3, 1, 6, 16), prompt_v=(3, 1, 6, 16))
    integers = {"prompt_index": torch.tensor([1, 2, 1], device=DEVICE), "prompt_lens": torch.tensor([0, 6, 3])}
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=DEVICE)
    return tensors, integers | {"prompt_lens": integers["prompt_lens"].to(DEVICE), "cu_seqlens": bounds}


def _results(tensors, options, backend):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = prompt_attention(**leaves, **options, backend=backend)
    assert out.requires_grad
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [_bank, _packed])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype_is_the_same_integer(form, dtype, backend):
    tensors, integers = form()
    expected = _results(tensors, integers, "reference")
    integers = {name: values if name == "cu_seqlens" else values.to(dtype) for name, values in integers.items()}
    for got, truth in zip(_results(tensors, integers, backend), expected, strict=True):
        assert_equal(got, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_true_where_it_is_not_zero(backend):
    tensors, integers = _bank()
    expected = _results(tensors, integers, backend)
    for dtype, nonzero in [(torch.int64, 256), (torch.int64, 1 << 40), (torch.int8, -1), (torch.uint8, 128)]:
        mask = integers["key_mask"].to(dtype) * nonzero
        for got, truth in zip(_results(tensors, integers | {"key_mask": mask}, backend), expected, strict=True):
            assert torch.equal(got, truth)
    for got, truth in zip(
        _results(tensors, integers | {"key_mask": integers["key_mask"].bool()}, backend), expected, strict=True
    ):
        assert torch.equal(got, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("name", ["prompt_index", "prompt_lens", "key_mask"])
def test_what_is_no_integer_is_refused(name, dtype, backend):
    if name == "key_mask" and dtype == torch.bool:
        return
    tensors, integers = _bank()
    with pytest.raises(ValueError, match=f"{name} must be .*integer.*got {dtype}"):
        prompt_attention(**tensors, **integers | {name: integers[name].to(dtype)}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [dtype for dtype in [*INTEGERS, *OTHERS] if dtype != torch.int32], ids=str)
def test_bounds_are_int32_by_name(dtype, backend):
    tensors, integers = _packed()
    with pytest.raises(ValueError, match=f"cu_seqlens must be int32 .*got {dtype}"):
        prompt_attention(**tensors, **integers | {"cu_seqlens": integers["cu_seqlens"].to(dtype)}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint64], ids=str)
def test_integers_out_of_range_are_refused_in_every_dtype(dtype):
    tensors, integers = _bank()
    high = torch.full((3,), torch.iinfo(dtype).max, dtype=dtype, device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"prompt_index must lie in \[0, 2\]"):
            prompt_attention(**tensors, **integers | {"prompt_index": high}, backend="torch")


@pytest.mark.skipif(DEVICE != "cpu", reason="looking at bounds on a card is not free")
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_longer_than_max_seqlen_are_refused(backend):
    tensors, integers = _packed()
    with pytest.raises(ValueError, match="max_seqlen must be at least the longest row's 5; got 4"):
        prompt_attention(**tensors, **integers, max_seqlen=4, backend=backend)
    for longest in (5, 50):
        prompt_attention(**tensors, **integers, max_seqlen=longest, backend=backend)


# (queries, keys, prompt) and which tensors nothing depends on
SIDES = {
    "no-prompt": ((3, 4, 0), {"prompt_k", "prompt_v", "prompt_bias"}),
    "no-text": ((3, 0, 5), {"k", "v", "bias"}),
    "no-key": ((3, 0, 0), {"q", "k", "v", "prompt_k", "prompt_v", "prompt_bias", "bias"}),
    "no-query": ((0, 4, 5), {"q", "k", "v", "prompt_k", "prompt_v", "prompt_bias", "bias"}),
    "nothing": ((0, 0, 0), {"q", "k", "v", "prompt_k", "prompt_v", "prompt_bias", "bias"}),
    "many-queries": ((20, 0, 5), {"k", "v", "bias"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("side", SIDES)
def test_empty_tensors_have_gradients(side, batch, wants_lse, backend):
    """Each tensor alone, and all together: of zeros where nothing depends on it."""
    (queries, keys, length), unused = SIDES[side]
    tensors = _random(
        q=(batch, 2, queries, 16),
        k=(batch, 1, keys, 16),
        v=(batch, 1, keys, 16),
        prompt_k=(1, length, 16),
        prompt_v=(1, length, 16),
        prompt_bias=(2, length),
        bias=(1, 2, queries, keys),
    )
    # The log-sum-exp has no gradient, so whose gradient is asked for is nothing to it: once.
    alone = [] if wants_lse else [[name] for name in tensors]
    for asking in [*alone, list(tensors)]:
        leaves = {name: tensor.clone().requires_grad_(name in asking) for name, tensor in tensors.items()}
        out = prompt_attention(**leaves, backend=backend, return_lse=wants_lse)
        out, lse = out if wants_lse else (out, None)
        assert out.shape == (batch, 2, queries, 16) and out.requires_grad
        assert lse is None or lse.shape == out.shape[:3] and not lse.requires_grad
        grads = torch.autograd.grad(out.sin().sum(), [leaves[name] for name in asking])
        for name, grad in zip(asking, grads, strict=True):
            assert grad.shape == tensors[name].shape and torch.isfinite(grad).all()
            assert not grad.any() or (batch and name not in unused), name
    with torch.no_grad():
        assert not prompt_attention(**leaves, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 3]], ids=str)
@pytest.mark.parametrize("length", [0, 5])
def test_packed_batches_may_be_empty(bounds, length, backend):
    tokens = bounds[-1]
    tensors = _random(
        q=(tokens, 2, 16), k=(tokens, 1, 16), v=(tokens, 1, 16), prompt_k=(1, length, 16), prompt_v=(1, length, 16)
    )
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE)}
    for asking in [[name] for name in tensors] + [list(tensors)]:
        leaves = {name: tensor.clone().requires_grad_(name in asking) for name, tensor in tensors.items()}
        out = prompt_attention(**leaves, **options, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), [leaves[name] for name in asking])
        assert all(torch.isfinite(grad).all() for grad in grads)


_LATE = """
import os, torch
from ptv2_fast.attention import prompt_attention
from ptv2_fast.kernels import prompt_forward
tensors = [torch.randn(1, 2, 3, 16) for _ in range(3)] + [torch.randn(2, 3, 16) for _ in range(2)]
for late in (False, True):
    if late:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        prompt_attention(*tensors, backend="triton")
    except RuntimeError as error:
        print(error)
"""
_MODEL = """
import torch
from transformers import BertConfig, BertModel
from ptv2_fast import PTuningV2Config, get_ptv2_model
base = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32))
model = get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION", backend="triton"))
try:
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
except RuntimeError as error:
    print(error)
"""


def test_triton_without_a_card_says_so_in_one_sentence():
    """Also where Triton was imported before the variable was set, and where the first kernel is the projection's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _MODEL + _LATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 3 * [
        "backend='triton' cannot serve this call: the tensors are on the CPU, where Triton only runs interpreted "
        "(start Python with TRITON_INTERPRET=1); backend='torch' runs anywhere"
    ]
