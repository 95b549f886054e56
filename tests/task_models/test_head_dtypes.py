"""All that trains is float32, over bases of any dtype."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast import PTuningV2Model, get_ptv2_model
from tiny_models import LABELS, tiny_base, tiny_prompts
from tiny_seq2seq import T5_SERVED
from tiny_seq2seq import tiny_base as tiny_seq2seq
from tolerances import assert_same_bits

IDS = torch.tensor([[5, 6, 7, 8, 3], [9, 10, 11, 12, 3]])
# Heads that are a linear layer, a module of several, a pooler beside one, and one behind a decoder.
HEADS = (
    ("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("electra", "SEQ_CLS"), ("deberta-v2", "SEQ_CLS"),
    ("modernbert", "TOKEN_CLS"), ("distilbert", "QUESTION_ANS"), ("llama", "SEQ_CLS"), ("gpt2", "TOKEN_CLS"),
    ("bart", "SEQ_CLS"), ("mbart", "SEQ_CLS"), ("t5", "SEQ_CLS"),
)  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)


def base_of(family: str, task_type: str, dtype: torch.dtype):
    if family == "t5" and not T5_SERVED:
        pytest.skip("this transformers' T5 has an attention of its own")
    if family in ("t5", "bart", "mbart"):
        return tiny_seq2seq(family, task_type, eos_token_id=3).to(dtype)
    return tiny_base(family, task_type).to(dtype)


def targets_of(task_type: str) -> dict[str, torch.Tensor]:
    if task_type == "QUESTION_ANS":
        return {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    return {"labels": torch.tensor([0, 1]) if task_type == "SEQ_CLS" else IDS % LABELS}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("family", "task_type"), HEADS)
def test_a_copied_head_trains_in_float32(family, task_type, dtype):
    model = get_ptv2_model(base_of(family, task_type, dtype), tiny_prompts("deep", task_type)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in model.base_model.parameters()} == {dtype}, "the base's own stays as it is"
    optimizer = torch.optim.SGD(trained, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = model(input_ids=IDS, **targets_of(task_type)).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # raises for gradients of float16
    heads = model.adapters["default"].base_heads
    assert any(p.grad is not None and bool(p.grad.abs().sum()) for p in heads.parameters())


@pytest.mark.parametrize(("family", "task_type"), HEADS[:6])
def test_a_half_base_gives_what_the_whole_one_gives(family, task_type):
    half = get_ptv2_model(base_of(family, task_type, torch.bfloat16), tiny_prompts("deep", task_type)).eval()
    whole = get_ptv2_model(base_of(family, task_type, torch.float32), tiny_prompts("deep", task_type)).eval()
    whole.adapters.load_state_dict(half.adapters.state_dict())
    key = "start_logits" if task_type == "QUESTION_ANS" else "logits"
    with torch.no_grad():
        expected, found = whole(input_ids=IDS)[key], half(input_ids=IDS)[key].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_saved_heads_load_whether_they_were_saved_narrow_or_not(tmp_path):
    model = get_ptv2_model(base_of("bert", "SEQ_CLS", torch.float16), tiny_prompts("deep", "SEQ_CLS")).eval()
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(base_of("bert", "SEQ_CLS", torch.float16), tmp_path)
    assert_same_bits(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    # As earlier versions had the heads of such a base.
    model.adapters["default"].base_heads.half()
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(base_of("bert", "SEQ_CLS", torch.float16), tmp_path)
    assert {p.dtype for p in loaded.adapters.parameters()} == {torch.float32}
    expected = model(input_ids=IDS).logits.detach().float()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("default", HALVES, ids=str)
def test_adapters_are_float32_whatever_torchs_default_is(default):
    base = tiny_base("bert")
    torch.set_default_dtype(default)
    try:
        model = get_ptv2_model(base, tiny_prompts("deep", "SEQ_CLS", heads={"task": LABELS}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}


# torch announces that its own quantization goes to torchao.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_quantized_as_a_whole_runs():
    """Its head has no parameters any more, and its projections keep theirs packed."""
    model = get_ptv2_model(tiny_base("bert", "SEQ_CLS"), tiny_prompts("deep", "SEQ_CLS")).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    difference = quantized(input_ids=IDS).logits - model(input_ids=IDS).logits
    assert 0 < difference.abs().max() < 0.2
