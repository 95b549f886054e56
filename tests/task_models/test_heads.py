"""Heads and losses: what they read, what they ignore, what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batches import padded, text_rows
from ptv2_fast import HeadConfig, get_ptv2_model
from ptv2_fast.heads import classification_loss, copied_heads, own_heads, span_loss
from ptv2_fast.inputs.pooling import pool
from tiny_models import FAMILIES, HIDDEN, LABELS, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

BATCH = padded(text_rows(), "left")
KINDS = {
    "topic": HeadConfig("SEQ_CLS", 4, pooling="mean"),
    "tags": HeadConfig("TOKEN_CLS", 5),
    "answer": HeadConfig("QUESTION_ANS", 2),
}


def _model(task_type, heads, family="bert", **config):
    base = tiny_base(family)
    return get_ptv2_model(base, tiny_prompts("deep", task_type, heads=heads, **config)).eval()


# Pooling.


def test_pooling_reads_real_tokens():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    assert torch.equal(pool(hidden, mask, "first"), hidden[[0, 1], [1, 0]])
    assert torch.equal(pool(hidden, mask, "last"), hidden[[0, 1], [3, 1]])
    mean = torch.stack([(hidden[0, 1] + hidden[0, 3]) / 2, (hidden[1, 0] + hidden[1, 1]) / 2])
    assert torch.equal(pool(hidden, mask, "mean"), mean)
    whole = torch.ones(2, 4)
    for how in ("first", "last", "mean"):
        assert torch.equal(pool(hidden, None, how), pool(hidden, whole, how))


def test_pooling_of_a_row_without_tokens_is_finite():
    hidden = torch.randn(1, 4, 3)
    nothing = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(pool(hidden, nothing, "mean"), torch.zeros(1, 3))
    for how in ("first", "last"):
        assert torch.isfinite(pool(hidden, nothing, how)).all()


# Losses.


def test_the_loss_is_the_mean_over_labelled_tokens():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, 4]])
    real = labels != -100
    assert_equal(classification_loss(logits, labels), F.cross_entropy(logits[real], labels[real]))


def test_a_batch_without_labels_has_a_loss_of_zero():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = classification_loss(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0.0 and not logits.grad.any()


def test_the_loss_of_a_span_is_the_mean_of_both_ends():
    logits = torch.randn(3, 6, 2)
    start, end = torch.tensor([0, -100, 2]), torch.tensor([5, -100, 3])
    kept = start != -100
    expected = [F.cross_entropy(logits[kept, :, i], x[kept]) for i, x in enumerate((start, end))]
    assert_equal(span_loss(logits, start, end), sum(expected) / 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5]), r"labels must lie in \[0, 4\] or be -100; got \[5\]"),
        (torch.tensor([-1, 0]), r"labels must lie in \[0, 4\] or be -100; got \[-1\]"),
        (torch.tensor([0]), r"labels must have shape \(2,\).*got \(1,\)"),
        (torch.tensor([0.0, 1.0]), "labels must be integers; got torch.float32"),
        (["good", "bad"], "labels must be a tensor of integers; got list"),
    ],
    ids=["high", "negative", "shape", "float", "strings"],
)
def test_refused_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        classification_loss(torch.zeros(2, 5), labels)


def test_refused_spans():
    fine = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"end_positions must lie in \[0, 2\] or be -100; got \[3\]"):
        span_loss(torch.zeros(2, 3, 2), fine, torch.tensor([0, 3]))


@pytest.mark.parametrize("heads", [None, {"own": LABELS}], ids=["base-head", "own-head"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_labels_out_of_range_are_refused_by_the_model(task, heads):
    if heads:
        model = _model(task, heads)
    else:
        model = tiny_model("bert", "deep", task)
    shape = (3,) if task == "SEQ_CLS" else (3, 9)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\] or be -100; got \[7\]"):
        model(**BATCH.inputs, labels=torch.full(shape, 7))


def test_causal_labels_out_of_range_or_shape_are_refused():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 39\] or be -100; got \[40\]"):
        model(**BATCH.inputs, labels=torch.full((3, 9), 40))
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 9\); got \(3, 14\)"):
        model(**BATCH.inputs, labels=torch.zeros(3, 14, dtype=torch.long))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_labels_of_another_shape_or_kind_are_refused_by_the_bases_head(task):
    model = tiny_model("bert", "deep", task)
    shape = r"\(3,\)" if task == "SEQ_CLS" else r"\(3, 9\)"
    with pytest.raises(ValueError, match=f"labels must have shape {shape}"):
        model(**BATCH.inputs, labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must be a tensor of integers; got list"):
        model(**BATCH.inputs, labels=["a", "b", "c"])


@pytest.mark.parametrize("heads", [None, {"own": 2}], ids=["base-head", "own-head"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_spans_ignore_unlabelled_rows_and_refuse_what_lies_outside(family, heads):
    """transformers' own loss would train unlabelled rows towards their first token."""
    if heads:
        model = _model("QUESTION_ANS", heads, family)
    else:
        model = tiny_model(family, "deep", "QUESTION_ANS")
    batch = padded(text_rows(), "right")
    starts, ends = torch.tensor([1, -100, 0]), torch.tensor([2, -100, 1])
    loss = model(**batch.inputs, start_positions=starts, end_positions=ends).loss
    kept = {name: value[[0, 2]] for name, value in batch.inputs.items()}
    assert_equal(loss, model(**kept, start_positions=starts[[0, 2]], end_positions=ends[[0, 2]]).loss)
    with pytest.raises(ValueError, match=r"end_positions must lie in \[0, 8\] or be -100; got \[9\]"):
        model(**batch.inputs, start_positions=starts, end_positions=torch.tensor([2, 9, 1]))
    with pytest.raises(ValueError, match=r"start_positions must have shape \(3,\); got \(2,\)"):
        model(**batch.inputs, start_positions=starts[:2], end_positions=ends[:2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [None, {"own": LABELS}], ids=["base-head", "own-head"])
def test_ignored_labels_change_nothing(family, heads):
    """Padding labelled -100: the loss of the padded batch is that of its real tokens."""
    if heads:
        model = _model("TOKEN_CLS", heads, family)
    else:
        model = tiny_model(family, "deep", "TOKEN_CLS")
    real = BATCH.attention_mask.bool()
    labels = (BATCH.input_ids % LABELS).masked_fill(~real, -100)
    output = model(**BATCH.inputs, labels=labels)
    assert_equal(output.loss, F.cross_entropy(output.logits[real], labels[real]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_causal_loss_ignores_unlabelled_tokens(family):
    model = tiny_model(family, "prefix", "CAUSAL_LM")
    real = BATCH.attention_mask.bool()
    labels = BATCH.input_ids.masked_fill(~real, -100)
    labels[:, :4] = -100
    output = model(**BATCH.inputs, labels=labels)
    # What stands in the slot behind padding is predicted by nothing of its own row.
    labels[:, 1:][~real[:, :-1]] = -100
    logits, shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert_equal(output.loss, F.cross_entropy(logits, shifted))


# The base's own head.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_bases_head_is_copied_and_the_copy_trains(family, task):
    base = tiny_base(family, task)
    original = {name: head for name, head in own_heads(base).items()}
    assert original and all(any(True for _ in head.parameters()) for head in original.values())
    copies = copied_heads(base)
    assert set(copies) == set(original)
    for name, head in original.items():
        for own, copied in zip(head.parameters(), copies[name].parameters(), strict=True):
            assert torch.equal(own, copied) and own.data_ptr() != copied.data_ptr()
            assert copied.requires_grad


# Several heads on one prompt.


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_heads_of_every_kind_on_one_prompt(task_type, family):
    model = _model(task_type, KINDS, family)
    states = model.run(model.backbone, BATCH.inputs).last_hidden_state
    heads = model.adapters["default"].heads
    topic = model(**BATCH.inputs, task="topic").logits
    assert_equal(topic, heads["topic"].linear(pool(states, BATCH.attention_mask, "mean")))
    tags = model(**BATCH.inputs, task="tags").logits
    assert_equal(tags, heads["tags"].linear(states))
    answer = model(**BATCH.inputs, task="answer")
    both = torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    assert_equal(both, heads["answer"].linear(states))


def test_each_head_learns_from_its_own_targets():
    model = _model("FEATURE_EXTRACTION", KINDS).train()
    targets = {
        "topic": {"labels": torch.tensor([0, 3, 1])},
        "tags": {"labels": (BATCH.input_ids % 5).masked_fill(BATCH.attention_mask == 0, -100)},
        "answer": {
            "start_positions": torch.tensor([4, 7, 2]),
            "end_positions": torch.tensor([5, 8, -100]),
        },
    }
    for task, labels in targets.items():
        model.zero_grad()
        model(**BATCH.inputs, **labels, task=task).loss.backward()
        assert model.adapters["default"].encoder.prompts.grad.abs().max() > 0
        for name, head in model.adapters["default"].heads.items():
            trained = head.linear.weight.grad is not None and bool(head.linear.weight.grad.any())
            assert trained == (name == task)


def test_feature_extraction_without_a_task_gives_the_states():
    model = _model("FEATURE_EXTRACTION", KINDS)
    assert model(**BATCH.inputs).last_hidden_state.shape == (3, 9, HIDDEN)
    with pytest.raises(ValueError, match="task must name the head that labels belong to"):
        model(**BATCH.inputs, labels=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("task", ["weather", ""])
def test_an_unknown_task_is_refused(task_type, task):
    with pytest.raises(ValueError, match=f"task must be one of topic, tags, answer; got '{task}'"):
        _model(task_type, KINDS)(**BATCH.inputs, task=task)


def test_a_language_model_has_no_tasks():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with pytest.raises(ValueError, match="task must be None: a causal language model has the one head"):
        model(**BATCH.inputs, task="topic")
    assert model(**BATCH.inputs, task=None).logits.shape[:2] == (3, 9)


def test_a_missing_task_is_refused_where_it_is_ambiguous():
    with pytest.raises(ValueError, match="task must be one of topic, tags, answer; got None"):
        _model("SEQ_CLS", KINDS)(**BATCH.inputs)
    one = _model("SEQ_CLS", {"topic": 4})
    assert_same_bits(one(**BATCH.inputs).logits, one(**BATCH.inputs, task="topic").logits)


def test_a_task_without_heads_is_refused():
    for model in (tiny_model("bert", "deep", "SEQ_CLS"), tiny_model("bert", "deep")):
        with pytest.raises(ValueError, match="task must be None where no adapter has heads"):
            model(**BATCH.inputs, task="topic")


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        ("topic", {"start_positions": torch.zeros(3).long()}, "start_positions"),
        ("answer", {"labels": torch.zeros(3).long()}, "labels"),
        ("answer", {"start_positions": torch.zeros(3).long()}, "end_positions"),
    ],
    ids=["span-for-rows", "labels-for-span", "half-a-span"],
)
def test_targets_of_another_kind_are_refused(task, targets, message):
    with pytest.raises(ValueError, match=message):
        _model("FEATURE_EXTRACTION", KINDS)(**BATCH.inputs, **targets, task=task)


def test_head_dropout_is_on_while_training_only():
    heads = {"topic": HeadConfig("SEQ_CLS", 4, dropout=0.5)}
    model = _model("SEQ_CLS", heads)
    assert_same_bits(model(**BATCH.inputs).logits, model(**BATCH.inputs).logits)
    model.train()
    assert_differs(model(**BATCH.inputs).logits, model(**BATCH.inputs).logits)


# Heads of mixed rows.


def test_mixed_rows_of_heads_with_different_labels():
    model = _model("SEQ_CLS", {"topic": 4})
    config = tiny_prompts("prefix", "SEQ_CLS", heads={"topic": HeadConfig("SEQ_CLS", 2)})
    model.add_adapter("other", config)
    names = ["other", "default", "other"]
    logits = model(**BATCH.inputs, adapter_names=names).logits
    assert [tuple(row.shape) for row in logits] == [(2,), (4,), (2,)]
    for index, name in enumerate(names):
        row = text_rows()[index][None]
        alone = model(input_ids=row, adapter_names=[name]).logits[0]
        assert_equal(logits[index], alone)
    with pytest.raises(ValueError, match="labels must be None with several adapters"):
        model(**BATCH.inputs, adapter_names=names, labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match="must not hold '__base__' with heads"):
        model(**BATCH.inputs, adapter_names=["other", "__base__", "other"])


def test_every_row_of_a_mixed_batch_gets_its_logits():
    """Fewer names than rows are refused, or each stands for several rows: no row is dropped."""
    model = _model("SEQ_CLS", {"topic": 4})
    model.add_adapter("other", tiny_prompts("prefix", "SEQ_CLS", heads={"topic": 4}))
    batch = padded(text_rows(3, 4, 5, 6), "left")
    try:
        logits = model(**batch.inputs, adapter_names=["other", "default"]).logits
    except ValueError as error:
        assert "adapter_names" in str(error)
    else:
        assert len(logits) == 4
