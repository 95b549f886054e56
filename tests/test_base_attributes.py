"""What is set on a wrapper and read on its base arrives there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from ptv2_fast import HeadConfig, PTuningV2Model, get_ptv2_model
from tiny_models import LABELS, tiny_base, tiny_model, tiny_prompts
from tiny_seq2seq import T5_SERVED
from tiny_seq2seq import tiny_model as tiny_seq2seq
from tolerances import assert_equal

NAMES = ("low", "middle", "high")


def own_head(task_type: str = "SEQ_CLS", count: int = LABELS) -> PTuningV2Model:
    prompts = tiny_prompts("deep", task_type, heads={"task": HeadConfig(task_type, count)})
    return get_ptv2_model(tiny_base("bert"), prompts).eval()


def forty_two(*args, logits=None, **kwargs) -> torch.Tensor:
    return 0 * (args[0] if logits is None else logits).sum() + 42.0


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_function_is_called(training):
    model = tiny_model("llama", "deep", "CAUSAL_LM").train(training)
    model.loss_function = forty_two
    assert model(input_ids=IDS, labels=IDS).loss.item() == 42.0
    assert model.loss_function is forty_two and model.base_model.loss_function is forty_two


def test_what_the_next_forward_would_stumble_over_is_refused():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with pytest.raises(ValueError, match="nope"):
        model.active_adapter = "nope"
    with pytest.raises(ValueError, match="step_options must be StepOptions; got dict"):
        model.step_options = {"unpad": True}
    model.active_adapter = "default"
    assert model(input_ids=IDS).logits.shape[:2] == IDS.shape


def test_a_loss_that_transformers_takes_by_default_is_taken_without_a_word(caplog, monkeypatch):
    """transformers logs that in each forward, where the compiler breaks the graph."""
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.get_logger("transformers").warning_once.cache_clear()
    model = tiny_model("gpt2", "deep", "CAUSAL_LM")
    expected = nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    assert "loss_type" not in caplog.text
    model.loss_function = forty_two
    assert model(input_ids=IDS, labels=IDS).loss.item() == 42.0


@pytest.mark.parametrize(
    ("task_type", "count", "targets"),
    [
        ("SEQ_CLS", LABELS, {"labels": torch.tensor([0, 2])}),
        ("TOKEN_CLS", LABELS, {"labels": torch.zeros(2, 4, dtype=torch.long)}),
        ("QUESTION_ANS", 2, {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}),
    ],
)
def test_a_loss_function_is_called_for_heads_of_our_own(task_type, count, targets):
    model = own_head(task_type, count)
    model.loss_function = forty_two
    assert model(input_ids=IDS, **targets).loss.item() == 42.0
    assert model.why_not_packed() is not None


@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.skipif(not T5_SERVED, reason="old"))])
def test_a_generation_config_is_used(kind):
    model = tiny_seq2seq("t5") if kind == "t5" else tiny_model("llama", "deep", "CAUSAL_LM")
    before = model.generate(input_ids=IDS, do_sample=False)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, decoder_start_token_id=2, pad_token_id=1
    )
    after = model.generate(input_ids=IDS)
    assert after.shape[1] == (IDS.shape[1] if kind == "llama" else 1) + 3
    assert before.shape[1] != after.shape[1]


def test_settings_of_the_configuration_arrive_where_a_head_names_labels():
    model = own_head()
    model.config.pad_token_id = 7
    model.config.output_hidden_states = True
    assert model.base_model.config.pad_token_id == model.config.pad_token_id == 7
    assert model(input_ids=IDS).hidden_states is not None
    model.base_model.config.return_dict = False
    assert isinstance(model(input_ids=IDS), tuple)
    assert model.base_model.config.id2label == {i: f"LABEL_{i}" for i in range(LABELS)}


def test_a_configuration_that_is_set_is_the_bases():
    for model in (own_head(), tiny_model("llama", "deep", "CAUSAL_LM")):
        config = copy.deepcopy(model.base_model.config)
        config.output_hidden_states = True
        model.config = config
        assert model.base_model.config is config


def test_label_names_that_are_set_are_the_adapters(tmp_path):
    model = own_head()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    model.config.label2id = {"a": 2, "b": 1, "c": 0}
    assert model.config.id2label == {0: "c", 1: "b", 2: "a"}
    model.config.id2label[1] = "x"
    assert model.config.id2label == {0: "c", 1: "x", 2: "a"} and model.config.num_labels == 3
    model.save_pretrained(tmp_path)
    assert PTuningV2Model.from_pretrained(tiny_base("bert"), tmp_path).config.id2label == {0: "c", 1: "x", 2: "a"}
    for wrong in ({0: "a"}, {1: "a", 2: "b", 3: "c"}, None):
        with pytest.raises(ValueError, match="id2label must name the head's 3 classes"):
            model.config.id2label = wrong
    with pytest.raises(ValueError, match="id2label must name the head's 3 classes"):
        model.config.num_labels = 5


def test_every_adapter_has_its_own_label_names():
    model = own_head()
    model.add_adapter("other", tiny_prompts("deep", "SEQ_CLS", heads={"task": HeadConfig("SEQ_CLS", 2)}))
    model.config.id2label = dict(enumerate(NAMES))
    model.set_adapter("other")
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    model.set_adapter("default")
    assert tuple(model.config.id2label.values()) == NAMES


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_of_a_configuration_are_plain_and_have_the_label_names(copied):
    model = own_head()
    model.config.id2label = dict(enumerate(NAMES))
    config = copied(model.config)
    assert type(config) is transformers.BertConfig and tuple(config.id2label.values()) == NAMES
    config.pad_token_id = 9
    assert model.config.pad_token_id != 9
    assert tuple(model.config.to_dict()["id2label"].values()) == NAMES
    assert NAMES[2] in model.config.to_json_string()


def test_modules_and_marks_that_are_set_are_the_bases():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    head = nn.Linear(32, 40, bias=False)
    model.lm_head = head
    assert model.base_model.lm_head is head and "lm_head" not in dict(model.named_children())
    model.loss_type = "ForTokenClassification"
    assert model.base_model.loss_type == "ForTokenClassification"
    model.prepare_inputs_for_generation = forty_two
    assert model.base_model.prepare_inputs_for_generation is forty_two


def test_what_the_wrapper_has_itself_stays_its_own():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    model.active_adapter = "default"
    model.accepts_loss_kwargs = True
    model.mark_of_a_user = "kept"
    model.train()
    for name in ("active_adapter", "accepts_loss_kwargs", "mark_of_a_user"):
        assert name not in model.base_model.__dict__, name
    assert model.mark_of_a_user == "kept"


def test_a_head_that_the_adapter_copied_is_not_set_behind_its_back():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    with pytest.raises(ValueError, match=r"classifier must be set in the adapter .*base_heads\['classifier'\]"):
        model.classifier = nn.Linear(32, LABELS)


def test_a_copied_wrapper_is_whole():
    model = own_head()
    again = copy.deepcopy(model)
    again.config.pad_token_id = 11
    assert model.config.pad_token_id != 11
    assert_equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits, "logits")


@pytest.mark.parametrize("kind", ["bert", "llama", "bart", "mbart", "t5"])
def test_a_wrapper_can_be_pickled_after_a_forward(kind):
    decodes = kind in ("bart", "mbart", "t5")
    task = "CAUSAL_LM" if kind == "llama" else "SEQ_CLS"
    model = tiny_seq2seq(kind) if decodes else tiny_model(kind, "deep", task)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if decodes else {})}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert_equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected, "logits")
