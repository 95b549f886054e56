"""Encoder-decoders as captured steps run them: padded rows in sizes that repeat, with what the plain forward gives."""

from __future__ import annotations

import pytest
import torch

from captured_forwards import OPTIONS, UNTIL_CAPTURED, assert_same_gradients, captured, gradients, packed_loss
from graph_steps import OFF, optimizer_of
from no_waiting import NoWaiting, attend_without_looking
from ptv2_fast import GraphRunner
from ptv2_fast.step.capture import WARM_UP_STEPS
from ptv2_fast.step.packed import Buckets
from ptv2_fast.step.padded import pad
from tiny_models import PADDING_ID
from tiny_seq2seq import tiny_model
from tolerances import assert_equal, assert_same_bits


def _model(kind="t5", injection="deep", **config):
    model = tiny_model(kind, injection, **config).train()
    model.step_options = OPTIONS
    return model


def _batches(count=6):
    """Texts padded on either side, of one size once they are filled."""
    generator = torch.Generator().manual_seed(4)
    for step in range(count):
        tokens, written = 5 + step % 3, 4 + step % 2
        mask = torch.arange(tokens) < torch.randint(2, tokens + 1, (3, 1), generator=generator)
        mask = (mask if step % 2 else mask.flip(1)).long()
        ids = torch.randint(3, 30, (3, tokens), generator=generator).masked_fill(mask == 0, PADDING_ID)
        labels = torch.randint(3, 30, (3, written), generator=generator)
        labels[torch.arange(written) >= torch.randint(2, written + 1, (3, 1), generator=generator)] = -100
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("kind", "injection"), [("t5", "deep"), ("bart", "prefix"), ("mbart", "deep"), ("bart", "shallow")]
)
def test_a_replay_gives_what_the_plain_forward_gives(kind, injection, counts):
    model, plain = _model(kind, injection), _model(kind, injection)
    plain.step_options = OFF
    for batch in _batches(UNTIL_CAPTURED + 1):
        found = model(**batch)
    found.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    assert counts.captures == captured(model) == 1 and counts.replays == 2
    expected = plain(**batch)
    expected.loss.backward()
    assert type(found) is type(expected) and found.keys() == expected.keys()
    real = batch["attention_mask"].bool()
    assert_equal(found.loss, expected.loss, "loss")
    assert_equal(found.logits, expected.logits, "logits")
    states = (one.encoder_last_hidden_state for one in (found, expected))
    assert_equal(*(one[real] for one in states), "states")
    for name, gradient in gradients(plain).items():
        assert_equal(ours[name], gradient, name)
    eager = packed_loss(model, batch)
    eager.backward()
    assert_same_bits(found.loss.detach(), eager.detach(), "loss")
    assert_same_gradients(ours, gradients(model))


@pytest.mark.parametrize("stacks", [None, ("decoder",)])
def test_a_loss_of_ones_own_reads_logits_and_states(stacks, counts):
    model, plain = _model(stacks=stacks), _model(stacks=stacks)
    plain.step_options = OFF
    for batch in _batches(UNTIL_CAPTURED):
        model(**batch)
    for one in (model, plain):
        output = one(**batch)
        states = output.encoder_last_hidden_state[batch["attention_mask"].bool()]
        (output.logits.square().mean() + states.square().mean()).backward()
    for name, gradient in gradients(plain).items():
        assert_equal(gradients(model)[name], gradient, name)


def test_a_collators_own_decoder_inputs_and_no_mask(counts):
    """As DataCollatorForSeq2Seq(model=model) gives them; without a mask every slot is text."""
    model, plain = _model("bart"), _model("bart")
    plain.step_options = OFF
    for batch in _batches(UNTIL_CAPTURED):
        del batch["attention_mask"]
        batch["decoder_input_ids"] = torch.full_like(batch["labels"], 5)
        assert_equal(model(**batch).loss, plain(**batch).loss, "loss")
    assert captured(model) == 1


def test_a_runner_takes_the_plain_loops_steps(counts):
    model, plain = _model(), _model()
    plain.step_options = OFF
    optimizers = [optimizer_of(one) for one in (model, plain)]
    runner = GraphRunner(model, optimizers[0])
    for batch in _batches(WARM_UP_STEPS + 4):
        optimizers[1].zero_grad()
        expected = plain(**batch).loss
        expected.backward()
        optimizers[1].step()
        assert_equal(runner.step(batch), expected.detach(), "loss")
    assert runner.captured == 1 and counts.replays > 2


@pytest.mark.parametrize(("kind", "injection"), [("t5", "prefix"), ("bart", "shallow"), ("mbart", "deep")])
def test_a_pass_never_waits_for_the_device(kind, injection, monkeypatch):
    attend_without_looking(monkeypatch)
    model = _model(kind, injection)
    packed = Buckets().fill(pad(model.packable(next(_batches()), model.packed_task())))
    with NoWaiting():
        loss = model.packed_loss(packed)
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"decoder_attention_mask": torch.ones(3, 4).long()}, "the call has decoder_attention_mask"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 5, 32)}, "the call has inputs_embeds"),
        ({"output_hidden_states": True}, "the call has output_hidden_states"),
    ],
)
def test_what_steps_aside_says_why(beside, reason, counts, said):
    batch = next(_batches())
    assert _model()(**{**batch, **beside}).loss.isfinite()
    assert counts.warm_ups == 0 and said("not captured") == [f"training step: not captured: {reason}"]


def test_a_text_of_the_most_tokens_is_not_filled_beyond_them(counts):
    """Learned positions end there."""
    model = _model("bart")
    batch = {"input_ids": torch.full((1, 60), 4), "labels": torch.full((1, 61), 5)}
    assert model(**batch).logits.shape == (1, 61, 40) and counts.warm_ups == 1
