"""A model's own forward captured by a CUDA device, against the plain forward on the same device."""

from __future__ import annotations

import pytest
import torch

from captured_forwards import UNTIL_CAPTURED, captured, forward_loss, gradients
from graph_steps import OFF, batches_for, batches_of, model_for_kernels, optimizer_of, plain_options
from tiny_models import tiny_model
from tiny_seq2seq import tiny_model as tiny_seq2seq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _on_device(batch):
    return {name: value.cuda() for name, value in batch.items()}


def _losses(model, batches) -> torch.Tensor:
    optimizer, losses = optimizer_of(model), []
    for batch in batches:
        optimizer.zero_grad()
        loss = forward_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _warmed(model, batch) -> None:
    for _ in range(UNTIL_CAPTURED):
        forward_loss(model, batch).backward()
    model.zero_grad()
    assert captured(model) == 1


@pytest.mark.parametrize(
    "case",
    [
        "bert rows, first token", "bert tags, base head", "llama text", "deberta tags", "bert rows, base head",
        "llama rows, base head", "roberta rows, mean", "bert numbers", "bert spans, base head", "bert choices",
        "bert vectors",
    ],
)  # fmt: skip
def test_steps_are_the_plain_ones(case):
    batches = [_on_device(batch) for batch in batches_for(case, count=3)[:1] * 3 + batches_for(case, count=7)[::3]]
    model, plain = model_for_kernels(case).cuda(), model_for_kernels(case).cuda()
    plain.step_options = plain_options(case)
    _close(_losses(model, batches), _losses(plain, batches))
    assert captured(model) == 1 and captured(plain) == 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_steps_of_an_encoder_decoder_are_the_plain_ones(kind):
    changes = {"d_kv": 16} if kind == "t5" else {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model, plain = (tiny_seq2seq(kind, base_changes=changes).train().cuda() for _ in range(2))
    plain.step_options = OFF
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids, "attention_mask": (ids > 5).long(), "labels": ids[:, :5]}
    _close(_losses(model, [batch] * 6), _losses(plain, [batch] * 6))
    assert captured(model) == 1 and captured(plain) == 0


def test_several_forwards_before_one_backward():
    first, second = (_on_device(batches_of("CAUSAL_LM", count=1, seed=seed)[0]) for seed in (0, 7))
    model, plain = model_for_kernels("llama text").cuda(), model_for_kernels("llama text").cuda()
    plain.step_options = OFF
    _warmed(model, first)
    for one in (model, plain):
        (forward_loss(one, first) - 2 * forward_loss(one, second)).backward()
    for name, gradient in gradients(plain).items():
        _close(gradients(model)[name], gradient)


def _with_dropout():
    torch.manual_seed(5)
    config = {"base_changes": {"num_attention_heads": 2}, "heads": {"own": 3}, "prompt_dropout": 0.3}
    return tiny_model("bert", "deep", "TOKEN_CLS", **config).train().cuda()


def test_what_was_dropped_is_dropped_again_for_a_gradient_through_logits():
    model = _with_dropout()
    batch = {"input_ids": torch.arange(3, 15).view(2, 6).cuda(), "labels": (torch.arange(12) % 3).view(2, 6).cuda()}
    _warmed(model, batch)
    losses = [forward_loss(model, batch).item() for _ in range(3)]
    assert len(set(losses)) == 3, "a replay draws numbers of its own"
    output = model(**batch)
    output.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten()).backward()
    for name, gradient in gradients(model).items():
        _close(gradient, expected[name])


def test_another_stream():
    batch = _on_device(batches_of("SEQ_CLS", count=1)[0])
    model = model_for_kernels("bert rows, first token").cuda()
    _warmed(model, batch)
    expected = forward_loss(model, batch).item()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [forward_loss(model, batch) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    _close(torch.stack(found), torch.full((3,), expected, device="cuda"))
    _close(forward_loss(model, batch), found[0])


def test_a_model_that_leaves_the_device_gives_its_memory_back():
    batch = _on_device(batches_of("SEQ_CLS", count=1)[0])
    model = model_for_kernels("bert rows, first token").cuda()
    _warmed(model, batch)
    model.cpu()
    assert captured(model) == 0
    assert forward_loss(model, {name: value.cpu() for name, value in batch.items()}).isfinite()
