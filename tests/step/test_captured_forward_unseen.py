"""What a captured pass would not see of a model or of a call: nothing stale is replayed, and nothing is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from captured_forwards import OPTIONS, UNTIL_CAPTURED, captured, forward_loss, fresh, gradients, warmed
from graph_steps import CASES, batches_of
from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.options import StepOptions
from tolerances import assert_equal

TAGS, TEXT = "roberta tags, own head", "llama text"
UNCAPTURED = StepOptions(labelled_rows_loss=True, cuda_graphs=False)


def _batch(case):
    return batches_of(CASES[case][2], count=1)[0]


def _linear(model):
    return model.adapters["default"].heads["own"].linear


def _same_as_uncaptured(model, batch, **beside) -> None:
    """Fail unless a forward and its backward give what they give without captures."""
    found = []
    for options in (OPTIONS, UNCAPTURED):
        model.step_options = options
        model.zero_grad()
        loss = model(**batch, **beside).loss
        loss.sum().backward()
        found.append((loss.detach(), gradients(model)))
    model.step_options = OPTIONS
    model.zero_grad()
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert_equal(ours, theirs, "loss")
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert_equal(our_gradients[name], gradient, name)


def _drop_prompts(model):
    model.adapters["default"].encoder.dropout = 0.5


def _drop_attention(model):
    model.backbone.layers[0].self_attn.attention_dropout = 0.5


def _scale_attention(model):
    model.backbone.layers[0].self_attn.scaling *= 2


@pytest.mark.parametrize("change", [_drop_prompts, _drop_attention, _scale_attention])
def test_numbers_that_modules_compute_with(change, counts, said):
    model, batch = warmed(TEXT)
    change(model)
    forward_loss(model, batch)
    assert captured(model) == 0 and counts.replays == 1 and len(said("scale otherwise")) == 1


def test_weights_that_a_functional_call_puts_in_place(counts):
    model, batch = warmed(TAGS)
    name = next(name for name, p in model.named_parameters() if p is _linear(model).weight)
    weights = [_linear(model).weight.detach() * factor for factor in range(UNTIL_CAPTURED + 1)]
    for weight in weights:
        functional_call(model, {name: weight}, kwargs=batch).loss.backward()
    assert counts.captures == 1
    _same_as_uncaptured(model, batch)


def test_prompts_that_somebody_computes(counts, said):
    model, batch = fresh(TAGS), _batch(TAGS)
    encoder = model.adapters["default"].encoder
    source = nn.Parameter(encoder.prompts.detach().clone())
    del encoder.prompts
    for _ in range(UNTIL_CAPTURED):
        encoder.prompts = source * 2
        source.grad = None
        forward_loss(model, batch).backward()
        assert source.grad is not None and source.grad.any()
    assert counts.warm_ups == 0 and len(said("a tensor that is no parameter")) == 1


def test_a_head_with_somebodys_own_module(counts, said):
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, states):
            return super().forward(states) * self.scale

    model, batch = warmed(TAGS)
    old = _linear(model)
    model.adapters["default"].heads["own"].linear = Scaled(old.in_features, old.out_features)
    for _ in range(UNTIL_CAPTURED):
        _same_as_uncaptured(model, batch)
    assert counts.replays == 1 and len(said("the adapter has a Scaled of ")) == 1


def test_a_parametrized_head(counts):
    model, batch = warmed(TAGS)
    parametrizations.weight_norm(_linear(model))
    for _ in range(UNTIL_CAPTURED):
        _same_as_uncaptured(model, batch)
    assert captured(model) == 1
    with parametrize.cached():
        forward_loss(model, batch)
    assert counts.replays == 2


@pytest.mark.parametrize("items", [torch.tensor([7]), torch.tensor([[7]])])
def test_a_count_of_labels_with_dimensions(items, counts):
    model, batch = warmed(TEXT)
    _same_as_uncaptured(model, batch, num_items_in_batch=items)
    assert counts.replays == 1


def test_another_default_dtype(counts):
    model, batch = fresh("bert rows, first token"), _batch("bert rows, first token")
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(UNTIL_CAPTURED):
            _same_as_uncaptured(model, batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts.captures == 1


def test_padding_without_a_mask(counts, said):
    """The positions of some families are counted by the padding's id where there is no mask."""
    model, batch = warmed(TAGS)
    del batch["attention_mask"]
    assert (batch["input_ids"] == 1).any()
    _same_as_uncaptured(model, batch)
    assert counts.replays == 1 and len(said("padding and no attention_mask")) == 1
    batch["input_ids"] = batch["input_ids"] + 2
    _same_as_uncaptured(model, batch)
    assert not said("dropped")


def test_a_batch_that_its_caller_fills_again(counts):
    model, batch = warmed(TAGS)
    expected = forward_loss(model, batch)
    expected.backward()
    before = gradients(model)
    model.zero_grad()
    labels, real = batch["labels"].clone(), batch["labels"] != -100
    logits = model(**batch).logits
    for tensor in batch.values():
        tensor.zero_()
    nn.functional.cross_entropy(logits[real], labels[real]).backward()
    for name, gradient in gradients(model).items():
        assert_equal(gradient, before[name], name)


def test_a_row_of_padding_with_a_label(counts, said):
    """What a head reads there differs from family to family: it is what the model's own forward says."""
    model, batch = warmed("mpnet rows, first token")
    batch["attention_mask"][0] = 0
    _same_as_uncaptured(model, batch)
    assert counts.replays == 1 and len(said("a row with a label has no token")) == 1
    batch["labels"][0] = -100
    _same_as_uncaptured(model, batch)
    assert not said("dropped")


def test_zeros_that_come_through_the_logits(counts):
    """As under DDP that finds unused parameters: they change nothing and end no captures."""
    model, batch = warmed(TAGS)
    forward_loss(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    output = model(**batch)
    (output.loss + 0 * output.logits.sum()).backward()
    for name, gradient in gradients(model).items():
        assert_equal(gradient, expected[name], name)
    model.zero_grad()
    (0 * model(**batch).logits.sum()).backward()
    assert gradients(model).keys() == expected.keys() and not any(g.any() for g in gradients(model).values())
    assert captured(model) == 1 and counts.replays == 4


class _Doubled(TorchFunctionMode):
    """Attention steered from outside, as long as the mode is on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


def test_modes_around_a_call(counts, said):
    model, batch = warmed(TAGS)
    with _Doubled():
        _same_as_uncaptured(model, batch)
    with forward_ad.dual_level():
        _same_as_uncaptured(model, batch)
    assert counts.replays == 1 and len(said("not captured")) == 2
    with torch.device("cpu"):
        _same_as_uncaptured(model, batch)
    assert counts.replays == 2


def test_graphs_share_no_memory_with_those_that_are_gone(counts, monkeypatch):
    made, make = [], CAPTURES["cpu"]
    monkeypatch.setitem(CAPTURES, "cpu", lambda device: made.append(make(device)) or made[-1])
    model, batch = warmed(TAGS)
    model.base_model.eval()
    for _ in range(UNTIL_CAPTURED):
        forward_loss(model, batch).backward()
    assert len(made) == 2 and counts.captures == 2
