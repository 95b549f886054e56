"""One version of each kernel serves a whole training run, whatever its batches' sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function

from ptv2_fast.attention import hook
from ptv2_fast.kernels import launch

# Asks Triton's own binder, which only kernels have that are not interpreted, and needs no GPU for it.
_VERSIONS = """
import random

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward

random.seed(0)
binders = {}
backend = make_backend(GPUTarget("cuda", 90, 32))
heads, head_dim, length, entries = 2, 16, 20, 3


def record(form, tokens):
    rows = random.randint(1, 5)
    shape = (tokens, heads, head_dim) if "packed" in form else (rows, tokens, heads, head_dim)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
    if "packed" not in form:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bank = entries if "bank" in form else 1
    prompts = [torch.empty(bank, heads, length, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    arguments = {"causal": "causal" in form}
    if "packed" in form:
        arguments |= {"cu_seqlens": torch.zeros(rows + 1, dtype=torch.int32), "max_seqlen": tokens // rows + 1}
    if "bank" in form:
        arguments["prompt_index"] = torch.zeros(rows, dtype=torch.int64)
    if "dropout" in form:
        arguments |= {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64)}
    if "mask" in form:  # as the attention hook hands it over
        arguments["key_mask"] = torch.ones(rows, -(-tokens // 16) * 16, dtype=torch.bool)[:, :tokens]
    with launch.record(90) as launches:
        if "decode" in form:
            prompt_attention_decode(q[:, :, :1], k, v, *prompts, **arguments)
        else:
            o, lse = prompt_attention_forward(q, k, v, *prompts, **arguments)
            for needs in (Needs(query=True, text=True, prompt=True), Needs(prompt=True)):
                prompt_attention_backward(o, q, k, v, *prompts, o, lse, needs=needs, **arguments)
    return launches


def specialization(recorded):
    kernel = recorded.kernel
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, options = binders[kernel](debug=False, **recorded.arguments)
    return str((special, options)), dict(zip(bound, special))


for form in FORMS:
    seen = {}
    for tokens in (17, 127, 128, 129, 143, 144, 145, 160, 512, *random.sample(range(17, 600), 8)):
        for recorded in record(form, tokens):
            key, named = specialization(recorded)
                # Rows of up to 64 queries and of up to 128 have tiles of their own.
            name = recorded.kernel.__name__
            name += f" {recorded.arguments['BLOCK_M']}" if "rows_kernel" in name else ""
            seen.setdefault(name, {}).setdefault(key, named)
    for name, versions in seen.items():
        first, *others = versions.values()
        varying = sorted({argument for other in others for argument in other if other[argument] != first[argument]})
        print(form, name, len(versions), *varying, sep="|")
"""
FORMS = ("packed", "packed bank", "packed causal dropout", "dense causal", "dense mask", "dense bank", "decode causal")


def test_sizes_make_no_further_version_of_a_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"FORMS = {FORMS}\n{_VERSIONS}"], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert Counter(form for form, *_ in lines) == {
        form: 2 if "decode" in form else 8 + ("bank" in form) for form in FORMS
    }  # fmt: skip
    assert [line for line in lines if line[2:] != ["1"]] == []


class _OnACard(torch.Tensor):
    """A tensor on the CPU that says otherwise."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("keys", [1, 33, 48])
def test_masks_of_a_model_have_even_rows_on_a_card(keys):
    given = torch.ones(3, keys, dtype=torch.bool).as_subclass(_OnACard)
    many, one = (
        hook.padding_mask(3, queries, keys, keys - queries, 0, bidirectional_mask_function, given) for queries in (2, 1)
    )
    assert many.shape == given.shape and many.stride(0) % 16 == 0
    assert one.stride(0) == keys  # while decoding a copy for each token would cost more than a version


def test_even_rows_keep_what_is_masked():
    mask = torch.rand(3, 33) < 0.5
    assert torch.equal(hook._even_rows(mask), mask)


def test_statistics_begin_at_multiples_of_16(device):
    made = launch.allocate_statistics((2, 33), device)
    assert made.shape == (2, 33) and made.stride() == (48, 1) and made.dtype == torch.float32
    assert launch.allocate_statistics((2, 3, 32), device).is_contiguous()
    assert launch.allocate_statistics((2, 0), device).shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 33), (0, 3), (3, 0), (1, 2, 5)], ids=str)
def test_like_a_tensor_means_its_strides_too(shape):
    given = torch.empty(*shape[:-1], 48)[..., : shape[-1]]
    pair = launch.allocate_pair_like(given, 7)
    for made in pair:
        assert made.shape == given.shape
        assert made.stride() == given.stride()
        assert made.storage_offset() % 16 == 0
    # What may be read behind the last element of each is there, and belongs to nothing else.
    first, second = pair
    reach = (
        1 + sum((size - 1) * stride for size, stride in zip(given.shape, given.stride(), strict=True))
        if given.numel()
        else 0
    )
    whole = first.untyped_storage().nbytes() // first.element_size()
    assert second.storage_offset() >= first.storage_offset() + reach + 7
    assert whole >= second.storage_offset() + reach + 7
