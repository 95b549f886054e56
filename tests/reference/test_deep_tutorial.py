"""P_Tuning_Model: learns, trains prompts and heads only, and computes what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptv2_fast.reference.deep_tutorial import DeepPromptEncoder, P_Tuning_Model
from ptv2_fast.reference.literal import literal_deep

HEADS = ["sequence", "token"]


def _model(backbone, labels=(2, 3)) -> P_Tuning_Model:
    torch.manual_seed(1)
    model = P_Tuning_Model(backbone, 3, labels).eval()
    return model.to(model.base_model.dtype)


def _loss(model, batch, task_idx) -> torch.Tensor:
    """Task 0: is the first word even? Task 1: each word modulo 3, padding not counted."""
    args = batch.input_ids, batch.attention_mask, task_idx
    real = batch.attention_mask.bool()
    if task_idx == 0:
        first = real.long().argmax(dim=1)
        labels = batch.input_ids[torch.arange(len(first)), first] % 2
        return nn.functional.cross_entropy(model(*args), labels)
    return nn.functional.cross_entropy(model.token_logits(*args)[real], batch.input_ids[real] % 3)


@pytest.fixture
def batch(pad):
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randint(2, 40, (int(n),), generator=generator) for n in [5, 2, 7, 9, 4, 6, 8, 3]]
    return pad(rows, "right")


@pytest.mark.parametrize("task_idx", [0, 1], ids=HEADS)
@pytest.mark.parametrize(("trained", "share"), [("prompts", 0.85), ("prompts and heads", 0.5)])
def test_loss_falls_and_the_base_stays_bit_identical(make_backbone, batch, task_idx, trained, share):
    model = _model(make_backbone("bert", exact=False))
    model.classification_heads.requires_grad_("heads" in trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    losses = []
    for _ in range(40):
        loss = _loss(model, batch, task_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]

    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    expected = {f"prompt_encoder.prompts.{layer}.weight" for layer in (0, 1)}
    if "heads" in trained:
        expected |= {f"classification_heads.{task_idx}.{part}" for part in ("weight", "bias")}
    assert changed == expected


@pytest.mark.parametrize("task_idx", [0, 1], ids=HEADS)
def test_only_prompts_and_the_tasks_head_get_gradients(make_backbone, batch, task_idx):
    model = _model(make_backbone("bert"))
    _loss(model, batch, task_idx).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    prompts = [f"prompt_encoder.prompts.{layer}.weight" for layer in (0, 1)]
    assert with_gradient == {*prompts, *(f"classification_heads.{task_idx}.{part}" for part in ("weight", "bias"))}
    assert all(prompt.weight.grad.abs().max() > 1e-5 for prompt in model.prompt_encoder.prompts)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encode_is_the_literal_deep_injection(make_backbone, batch, family, attention):
    backbone = make_backbone(family, attn_implementation=attention)
    model = _model(backbone)
    hidden = model.encode(batch.input_ids, batch.attention_mask.bool())
    prompts = torch.stack([prompt.weight for prompt in model.prompt_encoder.prompts])
    expected = literal_deep(backbone, prompts, batch.input_ids, batch.attention_mask)
    real = batch.attention_mask.bool()
    assert hidden.shape == (8, 9, 32)
    torch.testing.assert_close(hidden[real], expected[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padded_rows_are_the_rows_alone(make_backbone, rows, pad, family):
    model = _model(make_backbone(family))
    for side in ("left", "right"):
        padded = pad(rows, side)
        args = padded.input_ids, padded.attention_mask
        sequence, token = model(*args, task_idx=0), model.token_logits(*args, task_idx=1)
        assert sequence.shape == (3, 2) and token.shape == (3, 9, 3)
        for index, row in enumerate(rows):
            alone = model(row[None], None, task_idx=0)[0]
            torch.testing.assert_close(sequence[index], alone, rtol=0, atol=1e-10)
            alone = model.token_logits(row[None], None, task_idx=1)[0]
            torch.testing.assert_close(padded.real(token, index), alone, rtol=0, atol=1e-10)


def test_prompts_change_the_logits(make_backbone, batch):
    model = _model(make_backbone("bert"))
    before = model(batch.input_ids, batch.attention_mask)
    model.prompt_encoder.prompts[0].weight.data += 1
    assert (model(batch.input_ids, batch.attention_mask) - before).abs().max() > 1e-3


def test_a_layer_does_not_take_the_two_dimensional_mask(make_backbone):
    """The published code's mask, (B, P+N) of ones and zeros, is refused or hides nothing."""
    layer = make_backbone("bert", attn_implementation="eager").encoder.layer[0]
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        layer(hidden, attention_mask=mask)
    mask[0, 3:] = 0
    masked = layer(hidden[:1], attention_mask=mask[:1])
    hidden[0, 3:] += 1
    assert (layer(hidden[:1], attention_mask=mask[:1]) - masked)[0, :3].abs().max() > 1e-3


def test_a_base_is_loaded_from_a_folder(make_backbone, batch, tmp_path):
    backbone = make_backbone("bert", exact=False)
    backbone.save_pretrained(tmp_path)
    loaded, given = _model(str(tmp_path)), _model(backbone)
    assert not any(p.requires_grad for p in loaded.base_model.parameters())
    loaded.prompt_encoder.load_state_dict(given.prompt_encoder.state_dict())
    loaded.classification_heads.load_state_dict(given.classification_heads.state_dict())
    args = batch.input_ids, batch.attention_mask
    torch.testing.assert_close(loaded(*args), given(*args), rtol=0, atol=1e-5)


def test_prompts_of_a_layer_are_its_embeddings():
    encoder = DeepPromptEncoder(2, 4, 3, "cpu")
    assert encoder(1).shape == (3, 4) and torch.equal(encoder(1), encoder.prompts[1].weight)


def test_other_bases_are_refused(make_backbone):
    with pytest.raises(ValueError, match="base_model_name .*GPT2Model"):
        P_Tuning_Model(make_backbone("gpt2"), 3, [2])
    with pytest.raises(ValueError, match="base_model_name .*without a head"):
        P_Tuning_Model(make_backbone("bert").encoder, 3, [2])
    backbone = make_backbone("bert")
    backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="eager or sdpa.*'flex_attention'"):
        P_Tuning_Model(backbone, 3, [2])
