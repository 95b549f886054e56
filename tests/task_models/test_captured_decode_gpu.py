"""Decode steps captured by a CUDA device, against the same model's eager steps on that device."""

from __future__ import annotations

import gc

import pytest
import torch

from batches import padded, text_rows
from tiny_models import DISTINCT, tiny_model, tiny_prompts
from tolerances import assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = {"max_new_tokens": 12, "do_sample": False}
# Heads that kernels serve.
KERNELS = {"base_changes": {"head_dim": 16}}


def _batch(*lengths, seed=3, width=9):
    inputs = padded(text_rows(*(lengths or (5, 2, 7)), seed=seed), "left", width).inputs
    return {name: value.cuda() for name, value in inputs.items()}


def _both(model, inputs, **options):
    found = []
    for chosen in ({}, {"cache_implementation": "dynamic"}):
        torch.manual_seed(1)
        found.append(model.generate(**inputs, **{**GREEDY, **options}, **chosen))
    return found


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "opt", "gemma2", "qwen3") if name in DISTINCT])
def test_captured_tokens_are_the_eager_ones(family):
    changes = KERNELS if family == "llama" else {}
    model = tiny_model(family, "deep", "CAUSAL_LM", **changes).cuda()
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}):
        found, expected = _both(model, _batch(), **options)
        assert torch.equal(found, expected), options
    assert model._captured_decode.captured >= 1


def test_one_graph_serves_other_texts_prompts_and_weights():
    model = tiny_model("llama", "deep", "CAUSAL_LM", **KERNELS).cuda()
    assert torch.equal(*_both(model, _batch()))
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.neg_()
        model.base_model.get_output_embeddings().weight.mul_(-1)
    for inputs in (_batch(), _batch(3, 8, 1, seed=6, width=12)):
        options = {"return_dict_in_generate": True, "output_logits": True}
        found, expected = _both(model, inputs, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert_equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert model._captured_decode.captured == 1


def test_every_row_may_have_its_own_adapter():
    model = tiny_model("llama", "deep", "CAUSAL_LM", **KERNELS)
    model.add_adapter("long", tiny_prompts("prefix", "CAUSAL_LM", length=9, position_offset=9))
    model.eval().cuda()
    for names in (["long", "default", "__base__"], ["__base__", "long", "default"]):
        assert torch.equal(*_both(model, _batch(), adapter_names=names))
    assert model._captured_decode.captured == 1


def test_a_text_outgrows_its_slots():
    model = tiny_model("llama", "deep", "CAUSAL_LM", base_changes={"head_dim": 16, "max_position_embeddings": 256})
    model.cuda()
    for new in (80, 20, 150):
        assert torch.equal(*_both(model, _batch(58, 40, width=58), max_new_tokens=new))


def test_another_stream_and_the_memory_afterwards():
    model = tiny_model("llama", "deep", "CAUSAL_LM", **KERNELS).cuda()
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(*_both(model, _batch()))
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(*_both(model, _batch()))
    wide = _batch(*[7] * 64)
    assert torch.equal(*_both(model, wide))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.train()
    gc.collect()
    # Keys and values of two layers, of 64 rows with 64 slots, in float32.
    heads, width = model.base_model.config.num_key_value_heads, 16
    assert before - torch.cuda.memory_allocated() >= 2 * 2 * 64 * 64 * heads * width * 4
