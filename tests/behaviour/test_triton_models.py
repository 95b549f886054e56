"""Whole models through the kernels (interpreted without a GPU) against the same models through the reference."""

from __future__ import annotations

import copy

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast.step.options import StepOptions
from tiny_models import DECODERS, ENCODERS, GROUPED, INJECTIONS, tiny_model, tiny_prompts
from tolerances import assert_equal

# The interpreter takes seconds for each: the other families bring the kernels nothing that these do not.
KINDS = ("bert", "roberta", "gpt2", "llama", "qwen3")
# A causal window with a softcap, a bidirectional window, weights that no table may keep, a bias for distances, and
# one that is made of queries and keys.
ONCE = ("gemma2", "modernbert", "gpt_neox", "mpnet", "deberta-v2")
EVERY = [
    *((family, injection) for family in KINDS for injection in INJECTIONS),
    *((family, "deep") for family in ONCE),
]
EVERY = [pytest.param(*pair, id="-".join(pair)) for pair in EVERY]


def _model(family: str, injection: str, task: str, **config):
    """A tiny model with heads of 16, the smallest that the kernels take: two, each a program; four in pairs once."""
    heads = 4 if family == "qwen3" else 2
    changes = {"hidden_size": 16 * heads, "num_attention_heads": heads}
    changes |= {"num_key_value_heads": heads // 2, "head_dim": 16} if family in GROUPED else {}
    return tiny_model(family, injection, task, base_changes=changes, **config)


def _task_of(family: str) -> str:
    return "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"


def _with_backend(model, backend: str):
    for adapter in model.adapters.values():
        adapter.config.backend = backend
    return model


def _inputs(family: str) -> dict:
    batch = padded(text_rows(), "left")
    labels = batch.inputs["input_ids"] % 3 if family in ENCODERS else batch.inputs["input_ids"].clone()
    # The first real token of a left-padded row would be predicted from padding.
    inside = batch.inputs["attention_mask"].cumsum(-1) > (0 if family in ENCODERS else 1)
    return {**batch.inputs, "labels": labels.masked_fill(~inside, -100)}


def _step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, grads


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_logits_and_gradients_are_the_references(family, injection):
    model = _model(family, injection, _task_of(family))
    inputs = _inputs(family)
    expected, expected_grads = _step(_with_backend(model, "reference"), inputs)
    got, grads = _step(_with_backend(model, "triton"), inputs)
    real = inputs["attention_mask"].bool()
    assert_equal(got.logits[real], expected.logits[real], "logits")
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_equal(grad, expected_grads[name], name)


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpadded"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_steps_give_the_same_losses(family, unpad):
    # The interpreter takes its time over every program: one layer, two heads, two short rows.
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2} | ({"head_dim": 16} if family == "llama" else {})
    start = tiny_model(family, "deep", _task_of(family), init_std=0.02, base_changes=sizes)
    inputs = {name: tensor[:2] for name, tensor in _inputs(family).items()}
    losses = {}
    for backend in ("reference", "triton"):
        model = _with_backend(copy.deepcopy(start), backend).train()
        model.step_options = StepOptions(unpad=unpad and backend == "triton", labelled_rows_loss=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[backend] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.detach())
    assert losses["triton"][-1] < losses["triton"][0]
    # Rounding grows from step to step; a wrong gradient shows in the first ones at full size.
    torch.testing.assert_close(torch.stack(losses["triton"]), torch.stack(losses["reference"]), rtol=1e-4, atol=1e-5)


def test_generation_reads_the_prompt_through_the_decode_kernel(monkeypatch):
    from ptv2_fast.kernels import prompt_decode

    model = _model("llama", "deep", "CAUSAL_LM")
    inputs = padded(text_rows(), "left").inputs
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = _with_backend(model, "reference").generate(**inputs, **options)
    calls = []
    decode = prompt_decode.prompt_attention_decode

    def counted(*args, **kwargs):
        calls.append(args[0].shape[2])
        return decode(*args, **kwargs)

    monkeypatch.setattr(prompt_decode, "prompt_attention_decode", counted)
    got = _with_backend(model, "triton").generate(**inputs, **options)
    assert torch.equal(got, expected)
    # Two layers, and three steps after the one that read the whole text.
    assert calls.count(1) == 2 * 3


def test_a_mixed_batch_through_the_kernels():
    model = _model("llama", "deep", "CAUSAL_LM")
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM", length=3))
    inputs = padded(text_rows(), "right").inputs
    rows = inputs["input_ids"].shape[0]
    names = ["default", "other", "__base__", "other"][:rows]
    with torch.no_grad():
        expected = _with_backend(model, "reference")(**inputs, adapter_names=names).logits
        got = _with_backend(model, "triton")(**inputs, adapter_names=names).logits
    real = inputs["attention_mask"].bool()
    assert_equal(got[real], expected[real], "mixed batch")
