"""The configuration: what it refuses, and that it survives being written down."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.config import MAX_VIRTUAL_TOKENS
from tiny_models import tiny_base


def _config(**changes):
    return PTuningV2Config(**{"task_type": "SEQ_CLS", **changes})


REFUSED = {
    "task": ({"task_type": "seq_cls"}, "task_type must be one of SEQ_CLS.*got 'seq_cls'"),
    "no-tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens must be .*at least 1.*got 0"),
    "negative": ({"num_virtual_tokens": -3}, "num_virtual_tokens must be .*got -3"),
    "huge": (
        {"num_virtual_tokens": MAX_VIRTUAL_TOKENS + 1},
        f"num_virtual_tokens must be .*at most {MAX_VIRTUAL_TOKENS}; got",
    ),
    "float": ({"num_virtual_tokens": 2.0}, "num_virtual_tokens must be an integer.*got 2.0"),
    "bool": ({"num_virtual_tokens": True}, "num_virtual_tokens must be an integer.*got True"),
    "injection": ({"injection": "lora"}, "injection must be one of deep, shallow, prefix"),
    "init": ({"prompt_init": "zeros"}, "prompt_init must be one of text, normal, gated"),
    "dropout-one": ({"prompt_dropout": 1.0}, r"prompt_dropout must be in \[0, 1\); got 1.0"),
    "dropout-negative": ({"prompt_dropout": -0.1}, "prompt_dropout must be in"),
    "dropout-nan": ({"prompt_dropout": float("nan")}, "prompt_dropout must be in"),
    "dropout-text": ({"prompt_dropout": "0.1"}, "prompt_dropout must be in"),
    "backend": ({"backend": "cuda"}, "backend must be one of auto, triton, torch, reference"),
    "mlp": ({"reparameterization": 0}, "reparameterization must be an integer of at least 1"),
    "offset": ({"position_offset": -1}, "position_offset must be an integer of at least 0"),
    "std": ({"init_std": 0.0}, "init_std must be a positive number .*or None; got 0.0"),
    "std-nan": ({"init_std": float("nan")}, "init_std must be a positive number"),
    "std-infinite": ({"init_std": float("inf")}, "init_std must be a positive number"),
    "std-beyond-floats": ({"init_std": 10**400}, "init_std must be .*at most 10000, or None; got 1000"),
    "std-too-large": ({"init_std": 1e39}, "init_std must be a positive number of at most 10000"),
    "std-bool": ({"init_std": True}, "init_std must be a positive number"),
    "dropout-bool": ({"prompt_dropout": False}, "prompt_dropout must be in"),
    "dropout-beyond-floats": ({"prompt_dropout": 10**400}, "prompt_dropout must be in"),
    "mlp-huge": ({"reparameterization": 10**30}, "reparameterization must be an integer .*at most 2147483647"),
    "offset-huge": ({"position_offset": 10**30}, "position_offset must be an integer .*at most 2147483647"),
    "stacks-nested": ({"stacks": [["encoder"]]}, "stacks must be a sequence of distinct names"),
    "std-text": ({"init_std": "0.1"}, "init_std must be a positive number"),
    "layers-empty": ({"layers": ()}, "layers must name at least one layer"),
    "layers-twice": ({"layers": (1, 1)}, "layers must name .*none of them twice"),
    "layers-text": ({"layers": "12"}, "layers must be a sequence of integers or None; got '12'"),
    "layers-number": ({"layers": 3}, "layers must be a sequence of integers or None; got 3"),
    "layers-float": ({"layers": (1.5,)}, "layers must be an integer; got 1.5"),
    "stacks-empty": ({"stacks": ()}, "stacks must be a sequence of distinct names or None"),
    "stacks-twice": ({"stacks": ("cross", "cross")}, "stacks must be a sequence of distinct names"),
    "stacks-text": ({"stacks": "cross"}, "stacks must be a sequence of distinct names or None; got 'cross'"),
    "stacks-unknown": ({"stacks": ("both",)}, "stacks must be one of encoder, decoder, cross; got 'both'"),
    "shallow-stacks": ({"injection": "shallow", "stacks": ("encoder",)}, "stacks must be None with injection"),
    "heads-seq2seq": ({"task_type": "SEQ_2_SEQ_LM", "heads": {"a": 2}}, "heads must be None with task_type='SEQ_2"),
    "shallow-layers": (
        {"injection": "shallow", "layers": (0,)},
        "layers must be None with injection='shallow'",
    ),
    "shallow-mlp": (
        {"injection": "shallow", "reparameterization": 8},
        "reparameterization must be None with injection='shallow'",
    ),
    "shallow-offset": (
        {"injection": "shallow", "position_offset": 0},
        "position_offset must be None or num_virtual_tokens with injection='shallow'",
    ),
    "shallow-gated": (
        {"injection": "shallow", "prompt_init": "gated"},
        "prompt_init must be 'text' or 'normal' with injection='shallow'",
    ),
    "text-mlp": (
        {"prompt_init": "text", "reparameterization": 8},
        "prompt_init must be 'normal' or 'gated' with reparameterization",
    ),
    "heads-empty": ({"heads": {}}, "heads must be a non-empty mapping"),
    "heads-list": ({"heads": ["a"]}, "heads must be a non-empty mapping"),
    "heads-name": ({"heads": {"a.b": 2}}, "heads must have identifiers as names; got 'a.b'"),
    "heads-taken": ({"heads": {"keys": 2}}, "heads must not be named like an attribute.*got 'keys'"),
    "heads-taken-late": ({"heads": {"training": 2}}, "heads must not be named like an attribute.*got 'training'"),
    "heads-count": ({"heads": {"a": 0}}, r"heads\['a'\] must be an integer of at least 1, .*got 0"),
    "heads-kind": ({"heads": {"a": "two"}}, r"heads\['a'\] must be an integer.*got 'two'"),
    "heads-count-missing": ({"heads": {"a": {}}}, r"heads\['a'\] lacks num_labels; got \{\}"),
    "heads-keys": ({"heads": {"a": {"size": 2}}}, r"heads\['a'\] has unknown keys \['size'\]"),
    "heads-lm": (
        {"task_type": "CAUSAL_LM", "heads": {"a": 2}},
        "heads must be None with task_type='CAUSAL_LM'",
    ),
    "heads-feature": (
        {"task_type": "FEATURE_EXTRACTION", "heads": {"a": 2}},
        r"heads\['a'\] must be a HeadConfig where task_type='FEATURE_EXTRACTION'",
    ),
    "heads-qa": (
        {"task_type": "QUESTION_ANS", "heads": {"a": 3}},
        r"num_labels must be 2 for QUESTION_ANS \(start, end\); got 3",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CAUSAL_LM", 2), "task_type must be one of SEQ_CLS, TOKEN_CLS, QUESTION_ANS"),
        (("SEQ_CLS", 0), "num_labels must be an integer of at least 1, .*got 0"),
        (("SEQ_CLS", 2, "cls"), "pooling must be one of first, last, mean; got 'cls'"),
        (("SEQ_CLS", 2, "first", 1.0), "dropout must be in"),
        (("SEQ_CLS", 2, "first", 0.0, ["a"]), "labels must be 2 distinct names"),
        (("SEQ_CLS", 2, "first", 0.0, ["a", "a"]), "labels must be 2 distinct names"),
        (("SEQ_CLS", 2, "first", 0.0, ["a", "a", "b"]), "labels must be 2 distinct names"),
        (("SEQ_CLS", 2, "first", 0.0, "ab"), "labels must be 2 distinct names; got 'ab'"),
        (("SEQ_CLS", 2, "first", 0.0, [0, 1]), "labels must be 2 distinct names"),
        (("SEQ_CLS", 2, "first", 0.0, 5), "labels must be 2 distinct names; got 5"),
        (("SEQ_CLS", 2, "first", 0.0, {"a", "b"}), "labels must be 2 distinct names"),
        (("SEQ_CLS", 2, "first", 0.0, [["a"], ["b"]]), "labels must be 2 distinct names"),
        (("SEQ_CLS", 10**30), "num_labels must be an integer of at least 1, at most 2147483647"),
    ],
    ids=[
        "task",
        "count",
        "pooling",
        "dropout",
        "too-few",
        "twice",
        "too-many",
        "text",
        "numbers",
        "number",
        "set",
        "nested",
        "huge",
    ],
)
def test_refused_heads(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(*arguments)


@pytest.mark.parametrize("task", ["SEQ_CLS", "MULTIPLE_CHOICE"])
def test_a_head_reads_the_token_that_has_seen_the_text(task):
    """On a decoder the last one, where nobody says otherwise: two texts with one beginning are two."""
    assert HeadConfig(task, 1).pooling is None
    rows = torch.tensor([[[5, 6, 7], [5, 8, 9]]])
    rows = rows if task == "MULTIPLE_CHOICE" else rows[0]
    for name, read in (("llama", "last"), ("bert", "first")):
        model = get_ptv2_model(tiny_base(name), PTuningV2Config(task, num_virtual_tokens=2, heads={"own": 1})).eval()
        assert model.adapters["default"].config.heads["own"].pooling == read
        first, second = model(input_ids=rows).logits.flatten().tolist()
        assert first != second
    said = PTuningV2Config(task, heads={"own": HeadConfig(task, 1, pooling="first")})
    assert said.on_base(causal=True).heads["own"].pooling == "first"


@pytest.mark.parametrize("layers", [(2,), (-3,), (0, 5)])
def test_layers_that_a_model_lacks_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers must lie in \[-2, 1\] for this model; got"):
        _config(layers=layers).resolve_layers(2)


def test_layers_resolve_to_sorted_indices():
    assert _config().resolve_layers(3) == (0, 1, 2)
    assert _config(layers=[-1, 0]).resolve_layers(3) == (0, 2)
    with pytest.raises(ValueError, match=r"layers names a layer twice for 3 layers; got \(2, -1\)"):
        _config(layers=(2, -1)).resolve_layers(3)


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        (_config(), 0),
        (_config(injection="prefix"), 0),
        (_config(injection="prefix", position_offset=7), 7),
        (_config(injection="shallow", num_virtual_tokens=4), 4),
        (_config(injection="shallow", num_virtual_tokens=4, position_offset=4), 4),
    ],
)
def test_how_far_the_text_moves(config, offset):
    assert config.text_offset == offset


@pytest.mark.parametrize(
    "config",
    [
        _config(),
        _config(injection="prefix", layers=[0, -1], reparameterization=8, position_offset=20),
        _config(injection="shallow", prompt_init="text", prompt_dropout=0.1, init_std=0.5),
        _config(heads={"a": 2, "b": HeadConfig("TOKEN_CLS", 3, labels=["x", "y", "z"])}),
        _config(task_type="FEATURE_EXTRACTION", heads={"q": HeadConfig("QUESTION_ANS", 2)}),
    ],
    ids=["defaults", "prefix", "shallow", "heads", "feature"],
)
def test_written_down_and_read_back(config):
    written = json.dumps(config.to_dict())
    assert PTuningV2Config.from_dict(json.loads(written)) == config


def test_a_head_takes_the_kind_of_the_task():
    heads = _config(task_type="TOKEN_CLS", heads={"a": 5, "b": {"num_labels": 2}}).heads
    assert heads == {"a": HeadConfig("TOKEN_CLS", 5), "b": HeadConfig("TOKEN_CLS", 2)}


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match=r"unknown configuration keys \['colour'\]; known are"):
        PTuningV2Config.from_dict({"task_type": "SEQ_CLS", "colour": 1})
    with pytest.raises(ValueError, match="the configuration lacks task_type"):
        PTuningV2Config.from_dict({"num_virtual_tokens": 3})


# Of an encoder of three layers and a decoder of two.
_PLACES = {"encoder": (0, 1, 2), "decoder": (3, 4), "cross": (5, 6)}


def test_stacks_choose_layers_of_an_encoder_decoder():
    """The encoder's layers first, then the decoder's, then its cross-attention; indices count inside each."""
    config = _config(stacks=["cross", "encoder"], layers=(-1,))
    assert config.stacks == ("encoder", "cross")
    assert config.resolve_layers(3 + 2 * 2, 2) == (2, 6)
    assert _config().resolve_layers(7, 2) == (0, 1, 2, 3, 4)
    assert _config(injection="shallow").resolve_layers(7, 2) == (0, 1, 2)
    assert _config(stacks=("cross",)).resolve_layers(7, 2) == (5, 6)
    assert PTuningV2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"layers must lie in \[-2, 1\]"):
        _config(layers=(2,)).resolve_layers(7, 2)
    with pytest.raises(ValueError, match="stacks must be None on a base that is no encoder-decoder"):
        config.resolve_layers(7)


@pytest.mark.parametrize(
    ("config", "stacks"),
    [
        ({}, ("encoder", "decoder")),
        ({"injection": "shallow"}, ("encoder",)),
        ({"stacks": ["cross", "decoder"]}, ("decoder", "cross")),
        ({"task_type": "FEATURE_EXTRACTION"}, ("encoder", "decoder")),
        (
            {"task_type": "FEATURE_EXTRACTION", "heads": {"own": {"task_type": "TOKEN_CLS", "num_labels": 2}}},
            ("encoder",),
        ),
        ({"task_type": "TOKEN_CLS", "heads": {"own": 2}}, ("encoder",)),
        ({"task_type": "SENTENCE_RETRIEVAL"}, ("encoder",)),
    ],
    ids=str,
)
def test_prompts_stand_where_something_reads_them(config, stacks):
    made = PTuningV2Config(**{"task_type": "SEQ_2_SEQ_LM", **config})
    assert made.prompted_stacks == stacks
    assert made.resolve_layers(7, 2) == tuple(sorted(i for stack in stacks for i in _PLACES[stack]))


class TestOfAnAdapter:
    """What an adapter was made with is its own, whoever goes on with the configuration or writes to it."""

    def test_a_configuration_can_be_used_again(self, tmp_path):
        base = tiny_base("bert", "SEQ_CLS")
        config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=3)
        first = get_ptv2_model(base, config)
        config.num_virtual_tokens = 5
        assert first.ptv2_config["default"].num_virtual_tokens == 3
        first.save_pretrained(tmp_path)
        again = PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path)
        assert again.adapters["default"].encoder.prompts.shape[1] == 3
        assert get_ptv2_model(base, config).adapters["default"].encoder.prompts.shape[1] == 5

    @pytest.mark.parametrize(("name", "value"), [("num_virtual_tokens", 9), ("prompt_dropout", 0.5), ("typo", 1)])
    def test_what_would_not_happen_is_refused(self, name, value):
        model = get_ptv2_model(tiny_base("bert", "SEQ_CLS"), PTuningV2Config("SEQ_CLS", num_virtual_tokens=3))
        with pytest.raises(ValueError, match=f"{name} must stay what the adapter was made with, .*; got {value}"):
            setattr(copy.deepcopy(model).ptv2_config["default"], name, value)
        model.ptv2_config["default"].backend = "reference"
        assert model.ptv2_config["default"].backend == "reference"
