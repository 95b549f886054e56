"""Multiple choice: a score for each choice, by the base's head or ours, judged by literal prompts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.reference.float64 import to_exact_float64
from tiny_models import (
    DISTINCT,
    ENCODERS,
    PADDING_ID,
    TOKEN_TYPES,
    VOCABULARY,
    literal_states,
    tiny_config,
    tiny_prompts,
)
from tolerances import assert_equal, assert_same_bits

EXAMPLES, CHOICES, TOKENS = 3, 4, 9
LABELS = torch.tensor([3, 0, 2])
WITH_HEAD = [f for f in ENCODERS if f in DISTINCT]


def _base(family, auto=transformers.AutoModelForMultipleChoice, exact=False):
    torch.manual_seed(0)
    base = auto.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return to_exact_float64(base) if exact else base


def _batch(family, side="right"):
    generator = torch.Generator().manual_seed(1)
    shape = (EXAMPLES, CHOICES, TOKENS)
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    lengths = torch.randint(3, TOKENS + 1, shape[:2], generator=generator)
    mask = torch.arange(TOKENS).expand(shape) < lengths[..., None]
    mask = mask if side == "right" else mask.flip(-1)
    batch = {"input_ids": ids.masked_fill(~mask, PADDING_ID), "attention_mask": mask.long()}
    if family in TOKEN_TYPES:
        batch["token_type_ids"] = (torch.arange(TOKENS).expand(shape) > 3).long()
    return batch


def _flat(batch):
    return {name: value.flatten(0, 1) for name, value in batch.items()}


def _model(family, injection="deep", exact=False, auto=transformers.AutoModelForMultipleChoice, **config):
    model = get_ptv2_model(_base(family, auto, exact), tiny_prompts(injection, "MULTIPLE_CHOICE", **config)).eval()
    if exact:
        model.adapters.double()
    return model


def _own(family="bert", pooling="first", **more):
    heads = {"score": HeadConfig("MULTIPLE_CHOICE", 1, pooling=pooling)}
    return _model(family, auto=transformers.AutoModel, heads=heads, **more)


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("family", WITH_HEAD)
def test_the_base_s_head_scores_the_literal_states(family, injection, monkeypatch):
    """transformers' own forward over a backbone whose states are those of prompts by concatenation."""
    model = _model(family, injection, exact=True)
    batch = _batch(family)
    base = _base(family, exact=True)
    backbone = backbone_of(base)
    flat = _flat(batch)
    expected = literal_states(model, backbone, flat["input_ids"], flat["attention_mask"], **_types(flat))
    pooler = getattr(backbone, "pooler", None)
    if family == "albert":
        pooler = lambda states: backbone.pooler_activation(backbone.pooler(states[:, 0]))  # noqa: E731

    def literal(*args, **kwargs):
        pooled = () if pooler is None else (pooler(expected),)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(expected, *pooled)

    head = model.adapters["default"].base_heads
    monkeypatch.setattr(backbone, "forward", literal)
    truth = base(**batch, labels=LABELS)
    output = model(**batch, labels=LABELS)
    assert isinstance(output, transformers.modeling_outputs.MultipleChoiceModelOutput)
    assert output.logits.shape == (EXAMPLES, CHOICES) and len(head) > 0
    assert_equal(output.logits, truth.logits)
    assert_equal(output.loss, truth.loss)
    ours = torch.autograd.grad(output.loss, model.adapters["default"].encoder.prompts)[0]
    theirs = torch.autograd.grad(truth.loss, model.adapters["default"].encoder.prompts)[0]
    assert_equal(ours, theirs)


def _types(flat):
    return {name: flat[name] for name in ("token_type_ids",) if name in flat}


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama", "gpt2"])
def test_our_head_scores_the_literal_states(family, pooling):
    model = _own(family, pooling, exact=True)
    batch = _batch(family, "left")
    flat = _flat(batch)
    backbone = _base(family, transformers.AutoModel, exact=True)
    states = literal_states(model, backbone, flat["input_ids"], flat["attention_mask"], **_types(flat))
    scores = model.adapters["default"].heads["score"].linear(pool(states, flat["attention_mask"], pooling))
    scores = scores[:, 0].view(EXAMPLES, CHOICES)
    output = model(**batch, labels=LABELS)
    assert_equal(output.logits, scores)
    assert_equal(output.loss, F.cross_entropy(scores, LABELS))
    prompts = model.adapters["default"].encoder.prompts
    expected = torch.autograd.grad(F.cross_entropy(scores, LABELS), prompts)[0]
    assert_equal(torch.autograd.grad(output.loss, prompts)[0], expected)


@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_an_example_without_a_label_counts_nowhere(own):
    model = _own() if own else _model("bert")
    batch = _batch("bert")
    loss = model(**batch, labels=torch.tensor([3, -100, 2])).loss
    kept = {name: value[[0, 2]] for name, value in batch.items()}
    assert_equal(loss, model(**kept, labels=LABELS[[0, 2]]).loss)
    assert model(**batch, labels=torch.full((3,), -100)).loss == 0.0


@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_a_choice_alone_has_the_score_that_it_has_beside_others(own):
    model = _own() if own else _model("bert")
    batch = _batch("bert")
    whole = model(**batch).logits
    for index in range(CHOICES):
        one = {name: value[:, index : index + 1] for name, value in batch.items()}
        assert_equal(model(**one).logits, whole[:, index : index + 1])


@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_embeddings_may_be_given_in_the_place_of_ids(own):
    model = _own() if own else _model("bert")
    batch = _batch("bert")
    words = model.get_input_embeddings()(batch["input_ids"])
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    assert_equal(model(inputs_embeds=words, **given).logits, model(**batch).logits)


def test_adapters_are_named_one_an_example():
    model = _own()
    config = tiny_prompts("prefix", "MULTIPLE_CHOICE", heads={"score": HeadConfig("MULTIPLE_CHOICE", 1)})
    model.add_adapter("other", config)
    batch = _batch("bert")
    names = ["other", "default", "other"]
    mixed = model(**batch, adapter_names=names).logits
    assert mixed.shape == (EXAMPLES, CHOICES)
    for index, name in enumerate(names):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        assert_equal(mixed[index : index + 1], model(**one, adapter_names=[name]).logits)
    for wrong in (["other"] * 12, ["other", "default"], "other"):
        with pytest.raises(ValueError, match="adapter_names must be one name for each of 3 examples"):
            model(**batch, adapter_names=wrong)


def test_other_tasks_are_not_mixed_with_it():
    model = _own()
    model.add_adapter("topic", tiny_prompts("deep", "SEQ_CLS", heads={"score": 1}))
    with pytest.raises(
        ValueError, match="adapter_names must not mix MULTIPLE_CHOICE, .* with other tasks; got SEQ_CLS"
    ):
        model(**_batch("bert"), adapter_names=["default", "topic", "topic"])


def test_a_head_of_this_kind_on_an_adapter_of_another():
    heads = {"score": HeadConfig("MULTIPLE_CHOICE", 1), "topic": HeadConfig("SEQ_CLS", 3)}
    base = _base("bert", transformers.AutoModel)
    model = get_ptv2_model(base, tiny_prompts("deep", "FEATURE_EXTRACTION", heads=heads)).eval()
    batch = _batch("bert")
    assert model(**batch, task="score", labels=LABELS).logits.shape == (EXAMPLES, CHOICES)
    assert model(**_flat(batch), task="topic").logits.shape == (EXAMPLES * CHOICES, 3)
    with model.disable_adapter():
        states = model(**batch, task="score").last_hidden_state
        assert_same_bits(states, model(**_flat(batch), task="topic").last_hidden_state)
        assert_same_bits(states, model(**_flat(batch)).last_hidden_state)


def test_without_prompts_it_is_the_bare_model():
    model, base = _model("bert"), _base("bert")
    batch = _batch("bert")
    with model.disable_adapter():
        assert_same_bits(model(**batch).logits, base(**batch).logits)
        assert_equal(model(**batch, labels=LABELS).loss, base(**batch, labels=LABELS).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.ones(3, 9).long()}, r"input_ids must be a tensor of shape \(B, C, N\).*got \(3, 9\)"),
        ({"attention_mask": torch.ones(3, 9)}, r"attention_mask must be a tensor of shape \(B, C, N\).*got \(3, 9\)"),
        ({"attention_mask": torch.ones(3, 5, 9)}, r"attention_mask must be of 3 examples of 4 rows; got \(3, 5, 9\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"labels": torch.tensor([0, 4, 1])}, r"labels must lie in \[0, 3\] or be -100; got \[4\]"),
        ({"labels": torch.zeros(3, 4).long()}, r"labels must have shape \(3,\); got \(3, 4\)"),
        ({"start_positions": torch.zeros(3).long()}, "labels must be given for a MULTIPLE_CHOICE head"),
    ],
    ids=["flat", "flat-mask", "other-choices", "nothing", "label-outside", "label-shape", "spans"],
)
@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_other_shapes_are_refused_by_name(own, change, message):
    model = _own() if own else _model("bert")
    with pytest.raises(ValueError, match=message):
        model(**{**_batch("bert"), **change})


def test_a_head_has_one_score():
    with pytest.raises(ValueError, match="num_labels must be 1 for MULTIPLE_CHOICE .*; got 2"):
        PTuningV2Config("MULTIPLE_CHOICE", heads={"score": 2})
    with pytest.raises(ValueError, match="base must be of type ...ForMultipleChoice for task_type='MULTIPLE_CHOICE'"):
        _model("bert", auto=transformers.AutoModelForSequenceClassification)


@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_it_is_saved_and_loaded(own, tmp_path):
    model = _own() if own else _model("bert")
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    base = _base("bert", transformers.AutoModel if own else transformers.AutoModelForMultipleChoice)
    # A head with one score has no classes, however many the base's configuration speaks of.
    base.config.num_labels = 7
    loaded = PTuningV2Model.from_pretrained(base, tmp_path)
    model.requires_grad_(False)
    assert_same_bits(loaded(**_batch("bert")).logits, model(**_batch("bert")).logits)


@pytest.mark.parametrize("own", [False, True], ids=["base-head", "own-head"])
def test_it_learns(own):
    model = (_own() if own else _model("bert")).train()
    assert model.why_not_packed() is None
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**_batch("bert"), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
