"""A model's own forward, captured by a stand-in: what every loop around it finds is what an eager pass gives."""

from __future__ import annotations

import pytest
import torch

from captured_forwards import (
    OPTIONS,
    UNTIL_CAPTURED,
    assert_same_gradients,
    assert_same_steps,
    captured,
    forward_loss,
    fresh,
    gradients,
    packed_loss,
    training,
    warmed,
)
from graph_steps import CASES, OFF, batches_of, model_of
from ptv2_fast.step import captured_forward
from ptv2_fast.step.options import StepOptions
from ptv2_fast.step.pass_loss import PassGradients
from ptv2_fast.step.random_state import RandomState
from tiny_models import tiny_model
from tolerances import assert_equal, assert_same_bits

SERVED = ("bert rows, first token", "roberta tags, own head", "bert tags, base head", "llama text", "gpt2 text")


def _without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("case", SERVED)
def test_steps_are_those_of_eager_passes_to_the_last_bit(case, counts):
    batches = batches_of(CASES[case][2], count=12)
    found = list(training(fresh(case), forward_loss, batches))
    assert counts.captures == 1 and counts.replays == 12 - UNTIL_CAPTURED + 1
    assert_same_steps(found[-1:], list(training(fresh(case), packed_loss, batches))[-1:])
    plain = list(training(_plain(case), forward_loss, batches))
    assert_equal(torch.stack([s.losses for s in found]), torch.stack([s.losses for s in plain]), "plain losses")


def _plain(case):
    model = model_of(case)
    model.step_options = OFF
    return model


def test_every_step_is_the_same_to_the_last_bit(counts):
    batches = batches_of("TOKEN_CLS", count=8)
    found = training(fresh("roberta tags, own head"), forward_loss, batches)
    assert_same_steps(found, training(fresh("roberta tags, own head"), packed_loss, batches))
    assert counts.replays == 6


def _reparameterised():
    torch.manual_seed(5)
    model = tiny_model("bert", "deep", "TOKEN_CLS", heads={"own": 3}, reparameterization=8, prompt_dropout=0.3)
    model.step_options = OPTIONS
    return model.train()


def test_an_mlp_and_dropout(counts):
    batches = batches_of("TOKEN_CLS", count=8)
    torch.manual_seed(1)
    found = list(training(_reparameterised(), forward_loss, batches))
    torch.manual_seed(1)
    assert_same_steps(found[-1:], list(training(_reparameterised(), packed_loss, batches))[-1:])
    assert counts.replays > 0


def test_sizes_that_vary(counts, monkeypatch, said):
    monkeypatch.setattr(captured_forward, "MAX_GRAPHS", 2)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        for rows in (2, 9, 17):
            ids = torch.randint(3, 30, (rows, 6), generator=generator)
            batches.append({"input_ids": ids, "labels": ids % 3})
    model = fresh("roberta tags, own head")
    for batch in batches:
        found, expected = forward_loss(model, batch), packed_loss(model, batch)
        assert_equal(found, expected, "loss")
        found.backward()
        ours = gradients(model)
        model.zero_grad()
        expected.backward()
        for name, gradient in gradients(model).items():
            assert_equal(ours[name], gradient, name)
        model.zero_grad()
    assert counts.captures == 2 and len([line for line in said("captured") if "more than 2 sizes" in line]) == 1


def test_logits_are_the_plain_ones(counts):
    for case in SERVED[:3]:
        model, batch = warmed(case)
        found = model(**batch)
        plain = _plain(case)
        plain.load_state_dict(model.state_dict())
        expected = plain(**batch)
        assert type(found) is type(expected) and found.logits.shape == expected.logits.shape
        assert found.keys() == expected.keys()
        real = batch["attention_mask"].bool() if expected.logits.dim() == 3 else slice(None)
        assert_equal(found.logits[real], expected.logits[real], case)
        assert found.to_tuple()[0] is found.loss and model(**batch, return_dict=False)[0].shape == ()
    assert captured(model) == 1


@pytest.mark.parametrize("case", ["bert rows, first token", "bert tags, base head"])
def test_a_loss_of_the_users_own_trains_and_ends_captures(case, counts, said):
    model, batch = warmed(case)
    plain = _plain(case)
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        for one in (model, plain):
            output = one(**batch)
            real = batch["attention_mask"].bool() if output.logits.dim() == 3 else slice(None)
            (output.logits[real].square().sum() + output.loss).backward()
        for name, gradient in gradients(plain).items():
            assert_equal(gradients(model)[name], gradient, name)
    assert counts.replays == 2 and captured(model) == 0
    assert [line for line in said("captured") if "not captured" in line] == [
        "training step: not captured: a gradient comes through the logits, as of a loss of one's own"
    ]


def test_gradients_through_logits_are_of_the_very_same_pass(counts):
    """The prompts that were dropped are dropped again, and the generator goes on from where it was."""
    model = _reparameterised()
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.arange(12).view(2, 6) % 3}
    for _ in range(UNTIL_CAPTURED):
        output = model(**batch)
    output.loss.backward(retain_graph=True)
    expected = gradients(model)
    model.zero_grad()
    before = torch.get_rng_state()
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten()).backward()
    assert torch.equal(torch.get_rng_state(), before)
    for name, gradient in gradients(model).items():
        assert_equal(gradient, expected[name], name)


def test_several_forwards_before_one_backward(counts):
    model, batch = warmed("llama text")
    others = [batch, *batches_of("CAUSAL_LM", count=2, seed=7)]
    losses = [forward_loss(model, one) for one in others]
    (losses[0] - 2 * losses[1]).backward()
    losses[2].backward()
    found = gradients(model)
    model.zero_grad()
    expected = [packed_loss(model, one) for one in others]
    (expected[0] - 2 * expected[1]).backward()
    expected[2].backward()
    assert_same_gradients(found, gradients(model))
    assert counts.replays == 4


def test_backward_twice_and_a_forward_in_between(counts):
    model, batch = warmed("llama text")
    loss = forward_loss(model, batch)
    loss.backward(retain_graph=True)
    once = gradients(model)
    forward_loss(model, batches_of("CAUSAL_LM", count=1, seed=7)[0])
    loss.backward()
    for name, gradient in gradients(model).items():
        assert_same_bits(gradient, 2 * once[name], name)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_loss_that_nobody_differentiates_costs_no_copy(counts, monkeypatch):
    """In a plain loop the gradients of a step have been handed on before the next one overwrites them."""
    copies = []
    keep = PassGradients.keep

    def counted(self):
        copies.append(self._tensors is not None)
        keep(self)

    monkeypatch.setattr(PassGradients, "keep", counted)
    model, batch = warmed("llama text")
    kept = []
    for _ in range(3):
        kept.append(forward_loss(model, batch))
        kept[-1].backward()
    # The first one comes after losses that are gone.
    assert copies == [False, False]


def test_a_loss_is_differentiated_twice(counts, said):
    model, batch = warmed("bert rows, first token")
    plain = _plain("bert rows, first token")
    plain.load_state_dict(model.state_dict())
    found = []
    for one in (model, plain):
        # Attention has no second derivative, in no backend.
        weight = one.adapters["default"].heads["own"].linear.weight
        (gradient,) = torch.autograd.grad(forward_loss(one, batch), weight, create_graph=True)
        found += [gradient, *torch.autograd.grad(gradient.square().sum(), weight)]
    assert_equal(found[0], found[2], "gradient")
    assert_equal(found[1], found[3], "gradient of the gradient")
    forward_loss(model, batch)
    assert said("captured")[-1] == "training step: not captured: a loss is differentiated twice"


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_trainers_count_of_labels(items, counts):
    model, batch = warmed("llama text")
    plain = _plain("llama text")
    plain.load_state_dict(model.state_dict())
    loss = model(**batch, num_items_in_batch=items).loss
    assert_equal(loss, plain(**batch, num_items_in_batch=items).loss, "loss")
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    packed_loss(model, batch, items).backward()
    assert_same_gradients(found, gradients(model))
    assert counts.replays == 2
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert model(**nothing, num_items_in_batch=torch.tensor(3)).loss == 0


def test_what_is_no_training_step_runs_as_it_did(counts):
    model, batch = warmed("bert rows, first token")
    before = counts.replays, counts.warm_ups
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch).loss.backward()
    model.train()(**_without_labels(batch)).logits.sum().backward()
    with model.disable_adapter():
        model(**_without_labels(batch))
    model.step_options = StepOptions(cuda_graphs=False)
    model(**batch).loss.backward()
    assert (counts.replays, counts.warm_ups) == before and captured(model) == 1
    model.step_options = OPTIONS
    model(**batch).loss.backward()
    assert counts.replays == before[0] + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, counts, said):
    case = "bert rows, first token"
    batches = batches_of("SEQ_CLS", count=UNTIL_CAPTURED + 1)

    def loss_of(compute):
        def under(model, batch):
            with torch.autocast("cpu", dtype):
                return compute(model, batch)

        return under

    found = list(training(fresh(case), loss_of(forward_loss), batches, accumulate=1))
    if dtype == torch.float16:
        assert counts.captures == 0 and said("captured")[-1].endswith("float16 needs a scaled loss")
        return
    assert counts.replays == 2
    assert_same_steps(found[-1:], list(training(fresh(case), loss_of(packed_loss), batches, accumulate=1))[-1:])


def test_random_numbers_come_again():
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    after = torch.get_rng_state()
    with state.again():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)
