"""Sentence retrieval: pooled states of length 1 and the loss of in-batch negatives, against literal prompts."""

from __future__ import annotations

import math

import pytest
import torch

import tiny_seq2seq
from batches import padded, text_rows
from ptv2_fast import PTuningV2Config, PTuningV2Model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.losses import in_batch_negatives_loss
from ptv2_fast.task_models.retrieval import PTuningV2ModelForSentenceRetrieval
from tiny_models import DECODERS, DISTINCT, ENCODERS, TOKEN_TYPES, literal_states, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

TASK = "SENTENCE_RETRIEVAL"
BATCH = padded(text_rows(), "left")
# Four examples of a query, its text and a wrong one.
GROUPS = padded(text_rows(5, 2, 7, 4, 9, 3, 6, 6, 1, 8, 2, 5), "right")
GROUPED = {name: value.unflatten(0, (4, 3)) for name, value in GROUPS.inputs.items()}
PAIRS = {name: value[:, :2] for name, value in GROUPED.items()}


def _unit(vectors):
    return vectors / vectors.pow(2).sum(-1, keepdim=True).sqrt()


def _by_hand(embeddings, scale=20.0):
    """-log of the share of each query's own text, one number at a time."""
    texts = [group[part] for part in range(1, embeddings.shape[1]) for group in embeddings]
    losses = []
    for index, group in enumerate(embeddings):
        scores = [scale * float(group[0] @ text) for text in texts]
        losses.append(math.log(sum(math.exp(score - scores[index]) for score in scores)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_loss_is_the_share_of_the_right_text(group):
    embeddings = _unit(torch.randn(5, group, 8, dtype=torch.float64))
    assert float(in_batch_negatives_loss(embeddings)) == pytest.approx(_by_hand(embeddings), rel=1e-12)
    assert float(in_batch_negatives_loss(embeddings, 3.0)) == pytest.approx(_by_hand(embeddings, 3.0), rel=1e-12)
    # Half precision compares in float32.
    assert in_batch_negatives_loss(embeddings.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("family", [f for f in (*ENCODERS, *DECODERS) if f in DISTINCT])
def test_embeddings_and_gradients_are_those_of_literal_prompts(family, pooling):
    model = tiny_model(family, "deep", TASK, exact=True, pooling=pooling)
    backbone = tiny_base(family, exact=True)
    flat = GROUPS.inputs
    states = literal_states(model, backbone, flat["input_ids"], flat["attention_mask"])
    expected = _unit(pool(states, flat["attention_mask"], pooling))
    output = model(**GROUPED)
    assert_equal(output.embeddings, expected.unflatten(0, (4, 3)))
    scores = 20 * expected[::3] @ torch.cat([expected[1::3], expected[2::3]]).T
    literal = -scores.log_softmax(-1).diagonal().mean()
    assert_equal(output.loss, literal)
    prompts = model.adapters["default"].encoder.prompts
    assert_equal(torch.autograd.grad(output.loss, prompts)[0], torch.autograd.grad(literal, prompts)[0])


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("on", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_s_vectors_are_pooled_from_its_encoder(kind, on, pooling, injection):
    model = tiny_seq2seq.tiny_model(kind, injection, on, exact=True, task_type=TASK, pooling=pooling)
    backbone = backbone_of(tiny_seq2seq.tiny_base(kind, on, exact=True))
    prompts, batch = model.adapters["default"].encoder.prompts, padded(text_rows(5, 2, 7, 4), "left")
    states = tiny_seq2seq.literal(model, backbone, *batch.inputs.values())[1]
    expected = _unit(pool(states, batch.attention_mask, pooling))
    output = model(**{name: value.unflatten(0, (2, 2)) for name, value in batch.inputs.items()})
    assert_equal(output.embeddings.flatten(0, 1), expected)
    assert_equal(model.encode(**batch.inputs), expected)
    scores = 20 * expected[::2] @ expected[1::2].T
    literal = -scores.log_softmax(-1).diagonal().mean()
    assert_equal(torch.autograd.grad(output.loss, prompts)[0], torch.autograd.grad(literal, prompts)[0])
    # Without prompts it is the bare encoder that is pooled.
    text = text_rows()[0][None]
    bare = _unit(pool(backbone.encoder(input_ids=text).last_hidden_state, None, pooling))
    assert_differs(model.encode(input_ids=text), bare)
    with model.disable_adapter():
        assert_equal(model.encode(input_ids=text), bare)


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_texts_alone_have_the_vectors_that_they_have_in_groups(family, injection):
    model = tiny_model(family, injection, TASK)
    grouped = model(**GROUPED).embeddings
    alone = model.encode(**GROUPS.inputs)
    assert alone.shape == (12, 32) and not alone.requires_grad
    assert_equal(alone, grouped.flatten(0, 1))
    assert_equal(alone.norm(dim=-1), torch.ones(12))
    assert model(**GROUPS.inputs).loss is None and model(**GROUPED, return_loss=False).loss is None
    # Whatever stands beside a row, on whichever side it is padded.
    for row, text in enumerate(text_rows()):
        assert_equal(model.encode(**BATCH.inputs)[row], model.encode(input_ids=text[None])[0])


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("llama", "last")])
def test_what_is_pooled_where_nobody_says(family, pooling):
    said, unsaid = (tiny_model(family, "deep", TASK, **more) for more in ({"pooling": pooling}, {}))
    said.load_state_dict(unsaid.state_dict())
    assert_same_bits(said.encode(**BATCH.inputs), unsaid.encode(**BATCH.inputs))


def test_adapters_of_several_poolings_in_one_batch():
    model = tiny_model("bert", "deep", TASK, pooling="first")
    model.add_adapter("other", tiny_prompts("prefix", TASK, pooling="mean"))
    names = ["other", "default", "__base__"]
    mixed = model.encode(**BATCH.inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in BATCH.inputs.items()}
        assert_equal(mixed[row], model.encode(**one, adapter_names=[name])[0])
    text = text_rows()[2][None]
    with model.disable_adapter():
        assert_equal(mixed[2], model.encode(input_ids=text)[0])
    pairs = {key: value[:3] for key, value in PAIRS.items()}
    assert model.encode(**pairs, adapter_names=names).shape == (3, 2, 32)
    with pytest.raises(ValueError, match="return_loss must be False with several adapters in one batch"):
        model(**pairs, adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names must be one name for each of 3 examples"):
        model.encode(**pairs, adapter_names=["other"] * 6)
    with pytest.raises(ValueError, match="adapter_names must be one name for each of 3 examples; got 'other'"):
        model(**pairs, adapter_names="other")


def test_it_learns_to_find_what_belongs_together():
    model = tiny_model("bert", "deep", TASK).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**PAIRS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())


def test_it_is_saved_and_loaded(tmp_path):
    model = tiny_model("bert", "deep", TASK, pooling="first")
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert"), tmp_path)
    assert isinstance(loaded, PTuningV2ModelForSentenceRetrieval)
    model.requires_grad_(False)
    assert_same_bits(loaded.encode(**BATCH.inputs), model.encode(**BATCH.inputs))
    assert "pooling" not in PTuningV2Config("SEQ_CLS").to_dict()
    with pytest.raises(ValueError, match=f"PEFT has no task type for {TASK}"):
        model.save_pretrained(tmp_path / "peft", format="peft")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling": "middle"}, "pooling must be one of first, last, mean; got 'middle'"),
        ({"heads": {"own": 2}}, f"heads must be None with task_type='{TASK}': its pooled states are its output"),
        ({"task_type": "SEQ_CLS", "pooling": "mean"}, "pooling must be None for SEQ_CLS: heads have it"),
    ],
)
def test_configurations_that_contradict_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2Config(**{"task_type": TASK, **config})


def test_calls_that_cannot_be_meant_are_refused():
    model = tiny_model("bert", "deep", TASK)
    with pytest.raises(ValueError, match="input_ids must hold a query and a text for each example; got rows 1"):
        model(**{name: value[:, :1] for name, value in PAIRS.items()})
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor of shape \(B, C, N\)"):
        model(PAIRS["input_ids"], attention_mask=GROUPS.attention_mask)
    with pytest.raises(ValueError, match="task must be None: pooled states are the output"):
        model(**PAIRS, task="topic")
    with pytest.raises(ValueError, match="labels must be None: a text's place in its group says what it is"):
        model(**PAIRS, labels=torch.zeros(4).long())
    model.add_adapter("ner", PTuningV2Config("TOKEN_CLS", 3, heads={"ner": 2}))
    for names in (["ner"] * 4, ["ner", "default"] * 2):
        with pytest.raises(ValueError, match="adapter_names must be for SENTENCE_RETRIEVAL, .*; got TOKEN_CLS"):
            model.encode(PAIRS["input_ids"][:, 0], adapter_names=names)
    assert model.why_not_packed() is None


def test_tuples_and_embeddings_as_elsewhere():
    model = tiny_model("bert", "deep", TASK)
    loss, embeddings = model(**PAIRS, return_dict=False)
    output = model(**PAIRS)
    assert_same_bits(loss, output.loss)
    assert_same_bits(embeddings, output.embeddings)
    words = model.get_input_embeddings()(PAIRS["input_ids"])
    assert_equal(model(inputs_embeds=words, attention_mask=PAIRS["attention_mask"]).embeddings, embeddings)
    assert len(model(**PAIRS, output_hidden_states=True).hidden_states) == 3
    assert "bert" in TOKEN_TYPES
    types = torch.ones_like(PAIRS["input_ids"])
    assert not torch.allclose(model(**PAIRS, token_type_ids=types).embeddings, embeddings)
