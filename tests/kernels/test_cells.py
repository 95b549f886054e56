"""What the first cells of the benchmarks launch on Hopper is compiled ahead of time: the table holds every code."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.attention.cases import DTYPES, kernel_cases
from benchmarks.attention.inputs import BANK_TASKS
from ptv2_fast import PTuningV2Config, PTuningV2Model
from ptv2_fast.kernels import aot, aot_compile, launch
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward
from tiny_models import tiny_base

HOPPER, PROGRAMS = 90, 4 * 132
HEADLINE = 9
FULL = Needs(query=True, text=True, prompt=True)


@pytest.fixture(scope="module")
def compiled() -> set[str]:
    """The digests of the codes that the table holds for Hopper."""
    _, reports = aot.read_table(Path(__file__).parents[2] / "kernels" / "aot_table.json")
    return {report.source for report in reports if report.arch == HOPPER}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    """As many programs as an H100 wants; the number of chunks in decoding is part of the code."""
    monkeypatch.setattr(launch, "target_programs", lambda device: PROGRAMS)
    monkeypatch.setattr(launch, "allocate", lambda shape, dtype, device: torch.zeros(
        tuple(shape), dtype=dtype, device=device))  # fmt: skip
    monkeypatch.setattr(launch, "allocate_strided", lambda shape, strides, dtype, device: torch.empty_strided(
        shape, strides, dtype=dtype, device=device).zero_())  # fmt: skip


def check(launches, compiled):
    """Every launch is in the table."""
    assert launches
    missing = {
        f"{aot_compile.kernel_name(one)} {aot_compile.tile_of(one)} {one.arguments.get('switches')}"
        for one in launches
        if aot_compile.fingerprint(one) not in compiled
    }
    assert not missing


@pytest.mark.parametrize("case", kernel_cases()[:HEADLINE], ids=lambda case: case.id)
def test_kernel_cells(case, compiled):
    """Ours: dense, packed where there is padding, and with a bank; on tensors without memory."""

    def empty(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    def attend(q, k, v, entries, **arguments):
        prompt_k, prompt_v = (empty(entries, case.Hkv, case.P, case.d) for _ in range(2))
        output, lse = prompt_attention_forward(q, k, v, prompt_k, prompt_v, causal=case.causal, **arguments)
        prompt_attention_backward(
            output, q, k, v, prompt_k, prompt_v, output, lse, needs=FULL, causal=case.causal, **arguments
        )

    heads = (case.H, case.Hkv, case.Hkv)
    dense = [empty(case.B, case.N, count, case.d).transpose(1, 2) for count in heads]
    mask = empty(case.B, case.N, dtype=torch.bool) if case.padding else None
    index = empty(case.B, dtype=torch.int64)
    with launch.record(HOPPER) as launches:
        attend(*dense, 1, key_mask=mask)
        attend(*dense, BANK_TASKS, key_mask=mask, prompt_index=index)
        if case.padding:
            bounds = empty(case.B + 1, dtype=torch.int32)
            packed = [empty(case.tokens, count, case.d) for count in heads]
            attend(*packed, 1, cu_seqlens=bounds, max_seqlen=max(case.lengths))
    check(launches, compiled)


def _model(family: str, length: int, tasks: int = 1, **changes) -> PTuningV2Model:
    """A tiny model with the heads of a large one, whose prompts go through the kernels."""
    base = tiny_base(family, **changes).to(torch.bfloat16)
    config = PTuningV2Config("FEATURE_EXTRACTION", num_virtual_tokens=length, backend="triton")
    model = PTuningV2Model(base, config, "task0")
    for number in range(1, tasks):
        model.add_adapter(f"task{number}", config)
    for adapter in model.adapters.values():
        adapter.encoder.requires_grad_()
    return model.train()


BERT = {"hidden_size": 128, "num_attention_heads": 2}
LLAMA = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
QWEN = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
# Family and heads, P, dropout, tasks: the groups at the head of the steps suite.
STEPS = {
    "bert-P20": ("bert", BERT, 20, 0.0, 1), "bert-P8": ("bert", BERT, 8, 0.0, 1),
    "bert-P128": ("bert", BERT, 128, 0.0, 1), "bert-P512": ("bert", BERT, 512, 0.0, 1),
    "bert-P20-dropout": ("bert", BERT, 20, 0.1, 1), "bert-P128-dropout": ("bert", BERT, 128, 0.1, 1),
    "bert-P20-tasks": ("bert", BERT, 20, 0.0, 3),
    "qwen3-P64": ("qwen3", QWEN, 64, 0.0, 1), "qwen3-P20": ("qwen3", QWEN, 20, 0.0, 1),
    "llama-P128": ("llama", LLAMA, 128, 0.0, 1), "llama-P20": ("llama", LLAMA, 20, 0.0, 1),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a recorded step computes nothing; it runs on the CPU")
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize(("name", "tokens"), [*((name, 144) for name in STEPS), ("bert-P20", 96)])
def test_steps(name, tokens, padded, compiled, monkeypatch):
    if tokens <= 128:
        # Three rows stand for a batch that fills the card.
        monkeypatch.setattr(launch, "target_programs", lambda device: 12)
    family, heads, length, dropout, tasks = STEPS[name]
    if tasks > 1 and padded:
        pytest.skip("the cell of many tasks has no padding")
    dropouts = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout} if dropout else {}
    model = _model(family, length, tasks, **heads, **dropouts, max_position_embeddings=1024)
    ids = torch.randint(5, 30, (3, tokens))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 30:] = mask[1, 41:] = 0
    names = {"adapter_names": [f"task{row}" for row in range(3)]} if tasks > 1 else {}
    with launch.record(HOPPER) as launches:
        states = model(input_ids=ids, attention_mask=mask, **names).last_hidden_state
        states.float().nan_to_num().sum().backward()
    launched = {aot_compile.kernel_name(one) for one in launches}
    assert {"prompt_attention_backward_prompt", "prompt_attention_forward", "layered_matmul"} <= launched
    assert ("prompt_attention_backward_rows" in launched) == (tokens <= 128)
    check(launches, compiled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a recorded step computes nothing; it runs on the CPU")
@pytest.mark.parametrize(("family", "rows"), [*itertools.product(["qwen3", "llama"], [1, 8, 64, 128])])
def test_decoding(family, rows, compiled):
    """A prefill and two further tokens through the model, growing cache."""
    heads = QWEN if family == "qwen3" else LLAMA
    model = _model(family, 512, **heads, num_hidden_layers=1, max_position_embeddings=1024).eval()
    ids = torch.randint(5, 30, (rows, 32))
    with torch.no_grad(), launch.record(HOPPER) as launches:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for length in (33, 34):
            mask = torch.ones(rows, length, dtype=torch.long)
            model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=mask)
    assert "merge_chunks" in {aot_compile.kernel_name(one) for one in launches}
    check(launches, compiled)
