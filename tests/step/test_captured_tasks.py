"""Rows, spans, choices and vectors as captured passes compute them: what the padded forward gives, to the last bit
what an eager pass gives; and what steps aside, with one line that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForQuestionAnsweringLoss

from captured_forwards import (
    UNTIL_CAPTURED,
    assert_same_gradients,
    captured,
    fresh,
    gradients,
    packed_loss,
)
from graph_steps import batches_for, batches_of, optimizer_of, plain_of
from ptv2_fast import GraphRunner
from ptv2_fast.step.forward_batch import on_host
from ptv2_fast.step.options import StepOptions
from tiny_models import DISTINCT, has_head, tiny_model
from tolerances import assert_equal, assert_same_bits

NEW = (
    "bert rows, base head", "llama rows, base head", "roberta rows, mean", "bert numbers", "bert spans, base head",
    "llama spans, own head", "bert choices", "bert vectors",
)  # fmt: skip


@pytest.mark.parametrize("case", NEW)
def test_a_replay_is_an_eager_pass_and_gives_what_the_padded_forward_gives(case, counts):
    model, plain = fresh(case), plain_of(case)
    first, *_, other = batches_for(case, count=4)
    for _ in range(UNTIL_CAPTURED):
        model(**first)
    # Of the same size, other texts.
    found = model(**other)
    found.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    assert counts.captures == captured(model) == 1 and counts.replays == 2
    eager = packed_loss(model, other)
    eager.backward()
    assert_same_bits(found.loss.detach(), eager.detach(), "loss")
    assert_same_gradients(ours, gradients(model), case)
    expected = plain(**other)
    expected.loss.backward()
    assert type(found) is type(expected) and found.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(found[name], value, name)
    # Some of them are sums that vanish.
    theirs = gradients(plain)
    assert_equal(*(torch.cat([one[name].flatten() for name in theirs]) for one in (ours, theirs)), "gradients")


def _padded(tokens=7):
    """Two texts, padded in front and behind."""
    ids = torch.randint(3, 30, (2, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def _same_as_padded(model, batch, read=lambda output: output.logits):
    """Fail unless a captured forward's logits are those of the padded one."""
    expected = model(**{**batch, "labels": None})
    found = model(**batch)
    assert_equal(read(found), read(expected), "logits")


@pytest.mark.parametrize("family", [name for name in DISTINCT if has_head(name, "SEQ_CLS")])
def test_a_bases_own_classifier_reads_what_it_reads_of_padded_rows(family, counts, said):
    model = tiny_model(family, "deep", "SEQ_CLS").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _same_as_padded(model, {**_padded(), "labels": torch.tensor([2, 0])})
    assert counts.warm_ups == 1 and not said("not captured")


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "gpt2", "deberta-v2"])
def test_a_bases_own_spans_are_those_of_padded_rows(family, counts):
    model = tiny_model(family, "deep", "QUESTION_ANS").train()
    batch = {name: value[:, :5] for name, value in _padded().items()} if family == "deberta-v2" else _padded()
    if family == "deberta-v2":
        # Where padding is computed there may be none.
        batch.pop("attention_mask")
    expected = model(**batch)
    found = model(**batch, start_positions=torch.tensor([1, 4]), end_positions=torch.tensor([2, -100]))
    assert_equal(found.start_logits, expected.start_logits, "starts")
    assert_equal(found.end_logits, expected.end_logits, "ends")
    assert counts.warm_ups == 1


def test_the_loss_of_a_bases_own_spans_is_transformers(counts):
    model = tiny_model("bert", "deep", "QUESTION_ANS").train()
    places = torch.tensor([0, 3]), torch.tensor([2, 5])
    found = model(**_padded(), start_positions=places[0], end_positions=places[1])
    assert_equal(found.loss, ForQuestionAnsweringLoss(found.start_logits, found.end_logits, *places), "loss")
    assert counts.warm_ups == 1


def test_the_last_token_of_a_text_is_found_by_the_id_of_padding(counts, said):
    """Whatever the mask says, as transformers' classifiers of decoders find it."""
    model = tiny_model("llama", "deep", "SEQ_CLS").train()
    batch = {**_padded(), "labels": torch.tensor([2, 0])}
    batch["input_ids"][1, -1] = 1
    _same_as_padded(model, batch)
    assert counts.warm_ups == 1
    batch["input_ids"][0, -1] = 4
    _same_as_padded(model, batch)
    assert counts.warm_ups == 1 and len(said("a row with a label has no token to read")) == 1


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problems_of_a_bases_own_classifier(problem, counts):
    changes = {"classifier_dropout": 0.0, "problem_type": problem}
    model = tiny_model("bert", "deep", "SEQ_CLS", base_changes=changes).train()
    batch = {**_padded(), "labels": torch.eye(2, 3)}
    found = model(**batch).loss
    model.step_options = StepOptions(cuda_graphs=False)
    assert_equal(found, model(**batch).loss, "loss")
    assert counts.warm_ups == 1


def test_a_problem_that_the_bases_forward_settles_is_captured_from_then_on(counts, said):
    model = tiny_model("bert", "deep", "SEQ_CLS", base_changes={"num_labels": 1}).train()
    for _ in range(UNTIL_CAPTURED + 1):
        model(**_padded(), labels=torch.rand(2)).loss.backward()
    assert model.base_model.config.problem_type == "regression" and captured(model) == 1
    assert len(said("not captured")) == 1


def test_a_mean_in_a_bases_own_classifier(counts):
    changes = {"classifier_pooling": "mean", "classifier_dropout": 0.0}
    model = tiny_model("modernbert", "deep", "SEQ_CLS", base_changes=changes).train()
    _same_as_padded(model, {**_padded(), "labels": torch.tensor([2, 0])})
    loss = model(**_padded(), labels=torch.tensor([2, 0])).loss
    loss.backward()
    assert counts.warm_ups == 2 and all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_bases_own_choices(counts):
    model = tiny_model("albert", "deep", "MULTIPLE_CHOICE").train()
    _same_as_padded(model, batches_of("MULTIPLE_CHOICE", count=1)[0])
    assert counts.warm_ups == 1


def test_what_a_head_solves_is_asked_again(counts):
    """A pass that was captured for another problem would be replayed with its loss."""
    changes = {"classifier_dropout": 0.0, "problem_type": "regression"}
    model = tiny_model("bert", "deep", "SEQ_CLS", base_changes=changes).train()
    batch = {**_padded(), "labels": torch.eye(2, 3)}
    for _ in range(UNTIL_CAPTURED):
        model(**batch)
    model.base_model.config.problem_type = "multi_label_classification"
    found = model(**batch).loss
    assert_same_bits(found.detach(), packed_loss(model, batch).detach(), "loss")
    assert_equal(found, nn.functional.binary_cross_entropy_with_logits(model(**batch).logits, batch["labels"]), "loss")
    assert counts.replays == 1


def test_numbers_come_to_the_host_as_they_are():
    labels = torch.tensor([-1.5, 3e-8, torch.pi])
    found = on_host({"input_ids": torch.arange(3), "labels": labels})
    assert_same_bits(found["labels"], labels)
    assert found["input_ids"].tolist() == [0, 1, 2]


def _own_loss(model):
    model.loss_function = lambda *args, **_: torch.zeros((), requires_grad=True)


def _without_padding_id(model):
    model.base_model.config.pad_token_id = None


def _outside(batch):
    return {**batch, "start_positions": batch["start_positions"] + 90}


SPANS, LLAMA, NUMBERS = "bert spans, base head", "llama rows, base head", "bert numbers"
REASONS = {
    "several heads": (NUMBERS, {"one": 2, "two": 2}, None, None, "the adapter has several heads"),
    "own loss": (SPANS, None, _own_loss, None, "the loss is another one than its task's"),
    "no padding id": (LLAMA, None, _without_padding_id, None, "names no padding token"),
    "padding is computed": (
        SPANS, None, lambda model: setattr(model, "step_options", StepOptions(unpad=False)), None, "reads padding",
    ),
    "outside": (SPANS, None, None, _outside, "a place outside the text"),
    "double": (NUMBERS, None, None, lambda batch: {**batch, "labels": batch["labels"].double()}, "torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_steps_aside_says_why(name, counts, said):
    case, heads, change, spoil, reason = REASONS[name]
    if heads is None:
        model = fresh(case)
    else:
        model = tiny_model("bert", "deep", "SEQ_CLS", heads=heads).train()
    batch = batches_for(case, count=1)[0] if heads is None else batches_of("SEQ_CLS", count=1)[0]
    if change is not None:
        change(model)
    batch = spoil(batch) if spoil is not None else batch
    try:
        model(**batch, **({} if heads is None else {"task": "one"}))
    except ValueError as error:
        # The padded forward refuses these in its own words.
        assert name in ("outside", "no padding id"), error
    assert counts.warm_ups == 0
    (line,) = said("not captured")
    assert reason in line


def test_the_loss_of_a_base_in_bfloat16_keeps_its_dtype(counts):
    model = tiny_model("bert", "deep", "SEQ_CLS").train().to(torch.bfloat16)
    batch = {**_padded(), "labels": torch.tensor([2, 0])}
    found = [model(**batch).loss.dtype for _ in range(UNTIL_CAPTURED)]
    model.step_options = StepOptions(cuda_graphs=False)
    assert set(found) == {model(**batch).loss.dtype} and counts.replays == 1


@pytest.mark.parametrize(
    ("task", "batch"),
    [
        ("SEQ_CLS", {**_padded(), "labels": torch.eye(2, 3)}),
        ("SENTENCE_RETRIEVAL", {"inputs_embeds": torch.ones(2, 2, 4, 32)}),
    ],
)
def test_a_runner_takes_a_batch_that_the_plain_loop_takes(task, batch, counts):
    """Numbers before anybody said that rows have several labels; embeddings in the place of a text."""
    model = tiny_model("bert", "deep", task).train()
    assert GraphRunner(model, optimizer_of(model)).step(batch).isfinite()
