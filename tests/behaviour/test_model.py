"""The model class: what it refuses, what trains, what Trainer sees of it."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from transformers.utils.generic import find_labels

from batches import padded, text_rows
from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from tiny_models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    INJECTIONS,
    LABELS,
    tiny_base,
    tiny_model,
    tiny_prompts,
)
from tolerances import assert_differs, assert_same_bits

BATCH = padded(text_rows(), "left")
IDS, MASK = BATCH.input_ids, BATCH.attention_mask


# Bases and configurations that do not fit.


class _Odd(torch.nn.Module):
    """A module that is no transformers model."""


def _fnet():
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return transformers.FNetModel(transformers.FNetConfig(**config))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_Odd, "base must be a transformers PreTrainedModel; got _Odd"),
        (_fnet, "base must be of a supported family .*bert.*got FNetModel with model_type 'fnet'"),
        (lambda: tiny_base("bert", is_decoder=True), "base must be an encoder; got BertModel"),
    ],
    ids=["module", "fnet", "decoder-bert"],
)
def test_unusable_bases_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(make(), PTuningV2Config("FEATURE_EXTRACTION"))


def test_a_base_without_the_attention_interface_is_refused():
    """Its attention never looks at its configuration for an implementation."""
    base = tiny_base("bert")
    for module in list(base.modules()):
        if hasattr(module, "query"):
            del module.config
    with pytest.raises(ValueError, match="base must use transformers' attention interface"):
        get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION"))


@pytest.mark.parametrize(
    ("family", "base_task", "task", "message"),
    [
        ("bert", "FEATURE_EXTRACTION", "SEQ_CLS", "heads must be given for task_type='SEQ_CLS'"),
        ("bert", "TOKEN_CLS", "SEQ_CLS", "base must be of type ...ForSequenceClassification"),
        ("gpt2", "SEQ_CLS", "TOKEN_CLS", "base must be of type ...ForTokenClassification"),
        ("llama", "CAUSAL_LM", "QUESTION_ANS", "base must be of type ...ForQuestionAnswering"),
        ("llama", "FEATURE_EXTRACTION", "CAUSAL_LM", "base must be a causal language model"),
        ("gpt2", "TOKEN_CLS", "CAUSAL_LM", "base must be a causal language model"),
    ],
)
def test_a_base_for_another_task_is_refused(family, base_task, task, message):
    base = tiny_base(family, base_task)
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(base, PTuningV2Config(task))
    assert base.config._attn_implementation == "sdpa", "the base was touched"
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("family", ENCODERS)
def test_a_bidirectional_model_is_no_causal_lm(family):
    with pytest.raises(ValueError, match="base must be a causal language model"):
        get_ptv2_model(tiny_base(family, "CAUSAL_LM"), PTuningV2Config("CAUSAL_LM"))


@pytest.mark.parametrize("config", [None, {"task_type": "SEQ_CLS"}, "SEQ_CLS"])
def test_something_else_than_a_configuration_is_refused(config):
    with pytest.raises(ValueError, match="config must be a PTuningV2Config; got"):
        get_ptv2_model(tiny_base("bert"), config)


@pytest.mark.parametrize("layers", [(2,), (-3,)])
def test_layers_that_the_base_lacks_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers must lie in \[-2, 1\]"):
        tiny_model("bert", "deep", layers=layers)


# Adapters.


def test_adapter_names():
    model = tiny_model("bert", "deep")
    with pytest.raises(ValueError, match="name must be unused; got 'default'"):
        model.add_adapter("default", tiny_prompts("deep"))
    unusable = ("", "a.b", "..", "a/b", "/etc", "a\\b", "C:", " a", "a\n", "a\0", "x" * 201, "keys", "training", 3)
    for name in (*unusable, None, "__base__"):
        with pytest.raises(ValueError, match=re.escape(f"got {name!r}")) as refused:
            model.add_adapter(name, tiny_prompts("deep"))
        assert str(refused.value).startswith("name must ")
    with pytest.raises(ValueError, match="name must .*got '__base__'"):
        get_ptv2_model(tiny_base("bert"), tiny_prompts("deep"), "__base__")
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="adapter must be one of default; got 'other'"):
            call("other")
        with pytest.raises(ValueError, match=r"adapter must be one of default; got \['default'\]"):
            call(["default"])
    assert list(model.adapters) == ["default"]


def test_adapters_are_chosen_and_deleted():
    model = tiny_model("bert", "deep")
    first = model(**BATCH.inputs).last_hidden_state
    model.add_adapter("second", tiny_prompts("prefix", length=2))
    assert model.active_adapter == "default"
    assert_same_bits(model(**BATCH.inputs).last_hidden_state, first)
    assert not any(p.requires_grad for p in model.adapters["second"].parameters())
    model.set_adapter("second")
    assert_differs(model(**BATCH.inputs).last_hidden_state, first)
    assert all(p.requires_grad for p in model.adapters["second"].parameters())
    assert not any(p.requires_grad for p in model.adapters["default"].parameters())
    model.delete_adapter("second")
    assert model.active_adapter == "default" and list(model.ptv2_config) == ["default"]
    assert_same_bits(model(**BATCH.inputs).last_hidden_state, first)
    assert all(p.requires_grad for p in model.adapters["default"].parameters())
    with pytest.raises(ValueError, match="name must leave at least one adapter"):
        model.delete_adapter("default")


def test_an_adapter_deleted_and_made_again_is_a_fresh_one():
    model = tiny_model("bert", "deep")
    model.add_adapter("other", tiny_prompts("deep"))
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            outputs.append(model(**BATCH.inputs, adapter_names=["other"] * 3).last_hidden_state)
        model.delete_adapter("other")
        model.add_adapter("other", tiny_prompts("deep"))
    assert_differs(*outputs)


# Inputs that do not fit.


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": IDS, "inputs_embeds": torch.zeros(3, 9, 32)},
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"input_ids": IDS[0]}, r"input_ids must be integers of shape \(B, N\); got .*\(9,\)"),
        ({"input_ids": IDS.float()}, "input_ids must be integers.*got torch.float32"),
        ({"inputs_embeds": torch.zeros(9, 32)}, r"inputs_embeds must have shape \(B, N, D\)"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(3, 14)},
            r"attention_mask must have shape \(3, 9\).*the prompt is not masked.*got \(3, 14\)",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 9)},
            r"attention_mask must have shape \(3, 9\)",
        ),
        ({"input_ids": IDS, "attention_mask": torch.ones(9)}, "attention_mask must have"),
        ({"input_ids": IDS.tolist()}, "input_ids must be a tensor; got list"),
        ({"input_ids": IDS, "attention_mask": [[1] * 9] * 3}, "attention_mask must be a tensor; got list"),
        ({"input_ids": IDS[:, :0]}, "input_ids must hold at least one row and one token; got 3 rows of 0"),
        ({"inputs_embeds": torch.zeros(0, 9, 32)}, "inputs_embeds must hold at least one row.*got 0 rows"),
        ({"input_ids": IDS.to("meta")}, "input_ids must be on the model's device cpu; got meta"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(3, 9, device="meta")},
            "attention_mask must be on the model's device cpu; got meta",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(14)[None]},
            r"position_ids must have shape \(3, 9\), beside the text; got \(1, 14\)",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(9)},
            r"position_ids must have shape \(3, 9\), beside the text; got \(9,\)",
        ),
    ],
    ids=[
        "none",
        "both",
        "1-d",
        "float",
        "embeds",
        "mask-with-prompt",
        "mask-rows",
        "mask-1-d",
        "list",
        "mask-list",
        "no-tokens",
        "no-rows",
        "device",
        "mask-device",
        "positions-with-prompt",
        "positions-1-d",
    ],
)
@pytest.mark.parametrize(("family", "injection"), [("bert", "deep"), ("bert", "shallow"), ("llama", "shallow")])
def test_unusable_inputs_are_refused(family, injection, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(family, injection)(**inputs)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_needs_attention_weights_is_refused(family, injection):
    model = tiny_model(family, injection)
    inputs = {"input_ids": torch.tensor([[4, 5, 6]])}
    for name, value in (("output_attentions", True), ("head_mask", torch.ones(2, 4))):
        with pytest.raises(ValueError, match=f"{name} must be .* never materialised"):
            model(**inputs, **{name: value})
    assert model(**inputs, output_attentions=False, head_mask=None).last_hidden_state.shape == (1, 3, 32)


def test_a_base_that_returns_attention_weights_is_refused_as_it_is():
    base = tiny_base("bert", attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION"))
    assert base.config._attn_implementation == "eager" and all(p.requires_grad for p in base.parameters())
    assert len(base(torch.tensor([[4, 5, 6]])).attentions) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "other", "default"], "adapter must be one of default; got 'other'"),
        (["default"] * 2, "adapter_names must name 3 rows; got 2 names"),
        (["default"] * 4, "adapter_names must name 3 rows; got 4 names"),
        ([], "adapter_names must name 3 rows; got 0 names"),
        ("default", "adapter_names must be one name per row; got the string 'default'"),
    ],
    ids=["unknown", "few", "many", "none", "string"],
)
@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS"])
def test_unusable_adapter_names_are_refused(task, names, message):
    model = tiny_model("bert", "deep", task)
    with pytest.raises(ValueError, match=message):
        model(**BATCH.inputs, adapter_names=names)


@pytest.mark.parametrize("names", [None, ["default"]])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds must be given"),
        ({"input_ids": [[4, 5]]}, "input_ids must be a tensor; got list"),
    ],
    ids=["none", "list"],
)
def test_what_is_no_text_is_refused_with_and_without_names(inputs, message, names):
    with pytest.raises(ValueError, match=message):
        tiny_model("bert", "deep")(adapter_names=names, **inputs)


def test_copies_of_the_bases_head_cannot_be_mixed():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    model.add_adapter("other", tiny_prompts("deep", "SEQ_CLS"))
    with pytest.raises(ValueError, match="adapter_names must name one adapter where each has its"):
        model(**BATCH.inputs, adapter_names=["other", "default", "other"])


@pytest.mark.parametrize(
    ("family", "injection", "config", "longest"),
    [
        ("bert", "deep", {}, 64),
        ("roberta", "prefix", {}, 62),
        ("gpt2", "deep", {}, 64),
        ("bert", "shallow", {}, 59),
        ("gpt2", "shallow", {}, 59),
        ("bert", "prefix", {"position_offset": 5}, 59),
        ("mpnet", "deep", {}, 62),
        ("mpnet", "shallow", {}, 57),
        ("llama", "shallow", {}, 90),
        ("deberta-v2", "shallow", {}, 90),
    ],
)
def test_texts_end_where_the_positions_do(family, injection, config, longest):
    """Deep and prefix prompts need no position; rotary models have no table to run out of."""
    model = tiny_model(family, injection, **config)
    ids = torch.randint(2, 40, (1, longest))
    assert model(input_ids=ids).last_hidden_state.shape[1] == longest
    if longest < 64 or family not in ("llama", "deberta-v2"):
        longer = torch.randint(2, 40, (1, longest + 1))
        with pytest.raises(ValueError, match="input_ids must leave the text's last position within"):
            model(input_ids=longer)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_tuples_have_the_rows_of_the_text(injection):
    model = tiny_model("bert", injection)
    options = {"return_dict": False, "output_hidden_states": True}
    output = model(**BATCH.inputs, **options)
    assert isinstance(output, tuple)
    assert output[0].shape == (3, 9, 32)
    assert {tuple(state.shape) for state in output[2]} == {(3, 9, 32)}


# What trains.


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_prompts_and_heads_train(family, injection):
    task = "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"
    model = tiny_model(family, injection, task).train()
    before = {name: t.clone() for name, t in model.base_model.state_dict().items()}
    prompts = model.adapters["default"].encoder.prompts.detach().clone()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("adapters.default.") for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = (IDS if task == "CAUSAL_LM" else IDS % LABELS).masked_fill(MASK == 0, -100)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**BATCH.inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(model.adapters["default"].encoder.prompts, prompts)
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_trainable_parameters_are_counted_and_printed(capsys):
    model = tiny_model("bert", "deep", "SEQ_CLS")
    prompts, head = 2 * 5 * 32, 32 * LABELS + LABELS
    total = sum(p.numel() for p in tiny_base("bert", "SEQ_CLS").parameters()) + prompts + head
    trained, counted = model.trainable_parameters()
    assert (trained, counted) == (prompts + head, total)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"{trained:,}" in printed and f"{total:,}" in printed
    assert f"{100 * trained / total:.4f} %" in printed


def test_prompt_dropout_is_on_while_training_only():
    model = tiny_model("bert", "deep", prompt_dropout=0.5)
    assert_same_bits(*(model(**BATCH.inputs).last_hidden_state for _ in range(2)))
    model.train()
    assert_differs(*(model(**BATCH.inputs).last_hidden_state for _ in range(2)))


# What Trainer and pipelines look at.


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("SEQ_CLS", ["labels"]),
        ("TOKEN_CLS", ["labels"]),
        ("QUESTION_ANS", ["start_positions", "end_positions"]),
        ("CAUSAL_LM", ["labels"]),
    ],
)
def test_trainer_finds_the_labels(task, labels):
    family = "gpt2" if task == "CAUSAL_LM" else "bert"
    assert find_labels(type(tiny_model(family, "deep", task))) == labels


def test_the_bases_facts_are_the_models():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    base = model.base_model
    assert model.config is base.config and model.generation_config is base.generation_config
    assert model.device == base.device and model.dtype == base.dtype
    assert isinstance(model, PTuningV2Model)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
