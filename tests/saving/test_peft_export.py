"""Adapters of ours load in PEFT with the logits that they have here, or are not written."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from batches import padded, text_rows
from families import changed
from peft_models import LENGTH, counted, said, trained
from ptv2_fast import PTuningV2Config, from_peft, get_ptv2_model
from ptv2_fast.saving import peft_export
from tiny_models import tiny_base, tiny_model, wide_window
from tolerances import assert_differs, assert_equal

peft = pytest.importorskip("peft")
# PEFT asks transformers for this; nothing of ours does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*sliding window:UserWarning"),
]

RIGHT, LEFT = padded(text_rows(), "right"), padded(text_rows(), "left")
LEARNED = ("bert", "roberta", "xlm-roberta", "electra", "gpt2", "opt")
ROTARY = (
    "llama",
    "qwen3",
    "mixtral",
    "smollm3",
    "olmo2",
    "glm4",
    "cohere",
    "cohere2",
    "gpt_neox",
    "phi3",
    "gemma2",
    "gemma3_text",
)
# Angles that a model scales must not be scaled twice.
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64}


def _task(family):
    return "TOKEN_CLS" if family in LEARNED[:4] else "CAUSAL_LM"


def _model(family, injection, task=None, changes=None, **config):
    """A wrapped tiny model whose prompts and head have moved."""
    changes = {**wide_window(family), **(changes or {})}
    model = tiny_model(family, injection, task or _task(family), length=LENGTH, base_changes=changes, **config)
    trained(model.adapters)
    return model


def _loaded(folder, family, task=None, changes=None):
    """The folder in PEFT, which must know every entry of its configuration."""
    base = tiny_base(family, task or _task(family), **wide_window(family), **(changes or {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(Unexpected keyword|missing adapter keys)")
        return peft.PeftModel.from_pretrained(base, folder)


CASES = [
    *[(family, injection, {"position_offset": LENGTH}) for family in LEARNED for injection in ("prefix", "deep")],
    *[(family, injection, {}) for family in ROTARY for injection in ("prefix", "deep")],
    *[(family, "shallow", {}) for family in (*LEARNED, *ROTARY[:2], "albert", "distilbert")],
    *[("llama", injection, {"position_offset": offset}) for injection in ("prefix", "deep") for offset in (2, 3, 7)],
]


@pytest.mark.parametrize(("family", "injection", "config"), CASES, ids=lambda v: None if isinstance(v, str) else str(v))
def test_peft_gives_our_logits(tmp_path, family, injection, config):
    task = "TOKEN_CLS" if family in ("albert", "distilbert") else _task(family)
    model = _model(family, injection, task, **config)
    expected = said(model, RIGHT, task)
    model.save_pretrained(tmp_path, format="peft")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    there = _loaded(tmp_path, family, task)
    assert_equal(said(there, RIGHT, task), expected)
    assert_differs(expected, said(there.get_base_model(), RIGHT, task))


@pytest.mark.parametrize("injection", ["prefix", "deep"])
def test_rotary_angles_that_are_scaled(tmp_path, injection):
    model = _model("llama", injection, changes=YARN)
    assert model.backbone.rotary_emb.attention_scaling != 1
    expected = said(model, RIGHT, "CAUSAL_LM")
    model.save_pretrained(tmp_path, format="peft")
    assert_equal(said(_loaded(tmp_path, "llama", changes=YARN), RIGHT, "CAUSAL_LM"), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_where_peft_counts_positions(tmp_path, family):
    model = _model(family, "deep", position_offset=LENGTH)
    expected = said(model, LEFT, "CAUSAL_LM")
    model.save_pretrained(tmp_path, format="peft")
    there = _loaded(tmp_path, family)
    assert_equal(said(there, LEFT, "CAUSAL_LM", position_ids=counted(LEFT)), expected)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    ours = model.generate(**LEFT.inputs, **settings)
    assert torch.equal(there.generate(**LEFT.inputs, **settings), ours)


@pytest.mark.parametrize(
    ("family", "injection", "task"),
    [
        ("bert", "prefix", "SEQ_CLS"),
        ("roberta", "deep", "SEQ_CLS"),
        ("bert", "deep", "QUESTION_ANS"),
        ("bert", "shallow", "QUESTION_ANS"),
        ("bert", "prefix", "FEATURE_EXTRACTION"),
        ("gpt2", "deep", "TOKEN_CLS"),
        ("gpt2", "prefix", "SEQ_CLS"),
    ],
)
def test_heads_go_along(tmp_path, family, injection, task):
    offset = {} if injection == "shallow" else {"position_offset": LENGTH}
    model = _model(family, injection, task, **offset)
    expected = said(model, RIGHT, task)
    model.save_pretrained(tmp_path, format="peft")
    assert_equal(said(_loaded(tmp_path, family, task), RIGHT, task), expected)
    back = from_peft(tiny_base(family, task), tmp_path)
    assert_equal(said(back, RIGHT, task), expected)


@pytest.mark.parametrize("injection", ["prefix", "deep"])
def test_an_mlp_is_merged_and_dropout_left_out(tmp_path, injection):
    model = _model("llama", injection, reparameterization=6, prompt_dropout=0.5)
    expected = said(model, RIGHT, "CAUSAL_LM")
    model.train()
    model.save_pretrained(tmp_path, format="peft")
    assert model.training and model.adapters["default"].encoder.training
    assert_equal(said(_loaded(tmp_path, "llama"), RIGHT, "CAUSAL_LM"), expected)


def test_a_low_precision_base_does_not_round_the_prefix(tmp_path):
    model = get_ptv2_model(
        tiny_base("bert", "TOKEN_CLS").to(torch.bfloat16),
        PTuningV2Config("TOKEN_CLS", LENGTH, injection="prefix", position_offset=LENGTH),
    )
    model.save_pretrained(tmp_path, format="peft")
    back = from_peft(tiny_base("bert", "TOKEN_CLS"), tmp_path)
    assert torch.equal(back.adapters["default"].encoder.prompts, model.adapters["default"].encoder.prompts)


def test_a_token_stands_where_peft_has_it(tmp_path):
    """Element by element: token, layer, key before value, head, channel."""
    model = _model("bert", "prefix", position_offset=LENGTH)
    model.save_pretrained(tmp_path, format="peft")
    flat = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    prompts = model.adapters["default"].encoder.prompts
    layers, _, heads, length, channels = prompts.shape
    for layer, part, head, token, channel in [(0, 0, 0, 0, 0), (1, 0, 3, 2, 7), (0, 1, 2, 1, 5), (1, 1, 3, 2, 7)]:
        place = ((layer * 2 + part) * heads + head) * channels + channel
        assert flat[token, place] == prompts[layer, part, head, token, channel]
    assert flat.shape == (length, layers * 2 * heads * channels)


def test_several_adapters_have_a_folder_each(tmp_path):
    model = _model("llama", "prefix")
    model.add_adapter("other", PTuningV2Config("CAUSAL_LM", LENGTH, injection="shallow", init_std=0.8))
    model.save_pretrained(tmp_path, format="peft")
    for name in ("default", "other"):
        expected = said(model, RIGHT, "CAUSAL_LM", adapter_names=[name] * 3)
        assert_equal(said(_loaded(tmp_path / name, "llama"), RIGHT, "CAUSAL_LM"), expected)


# What is refused.


def _refused(model, folder, message, **arguments):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(folder, **{"format": "peft", **arguments})
    assert not folder.exists()


@pytest.mark.parametrize("injection", ["prefix", "deep"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_learned_positions_that_peft_shifts(tmp_path, family, injection):
    model = _model(family, injection)
    _refused(model, tmp_path / "new", "from P = 3 behind a prefix.*position_offset 0; train it with position_offset=3")


def test_what_peft_does_not_have(tmp_path):
    folder = tmp_path / "new"
    _refused(_model("llama", "deep", prompt_init="gated"), folder, "'default'.*bias on the prompt's scores")
    _refused(_model("llama", "prefix", layers=(1,)), folder, r"only layers \(1,\) have prompts")
    _refused(_model("llama", "prefix", "TOKEN_CLS", layers=(0,)), folder, "only layers")
    _refused(_model("bert", "shallow", "SEQ_CLS"), folder, "first virtual token")
    for family in ("albert", "distilbert", "modernbert"):
        _refused(_model(family, "prefix", "TOKEN_CLS"), folder, f"PEFT has no prefix tuning for {family} models")
    with_heads = tiny_model("bert", "prefix", "TOKEN_CLS", base_changes={}, heads={"tags": 3})
    _refused(with_heads, folder, "the heads tags are ours")


def test_one_adapter_that_is_refused_keeps_the_others_unwritten(tmp_path):
    model = _model("llama", "prefix")
    model.add_adapter("gated", PTuningV2Config("CAUSAL_LM", LENGTH, prompt_init="gated"))
    _refused(model, tmp_path / "new", "adapter 'gated'")
    model.save_pretrained(tmp_path / "new", format="peft", adapter_names=["default"])
    assert (tmp_path / "new" / "adapter_config.json").is_file()


def test_arguments(tmp_path):
    model = _model("llama", "prefix")
    _refused(model, tmp_path / "new", "format must be 'ptv2' or 'peft'; got 'onnx'", format="onnx")
    model.save_pretrained(tmp_path / "new", format="peft", is_main_process=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        model.save_pretrained(tmp_path / "file", format="peft")


def test_a_sliding_window_is_spoken_of(tmp_path):
    model = _model("mistral", "prefix")
    with pytest.warns(UserWarning, match="sliding window of 64"):
        model.save_pretrained(tmp_path, format="peft")


def test_positions_that_are_no_rotation(tmp_path, monkeypatch):
    """A family that turns its keys in another way is found out."""
    model = _model("llama", "prefix")
    finished = model._family.finish_keys

    def other(backbone, layer, keys):
        return finished(backbone, layer, keys) * len(keys)

    family = peft_export.family_of(model.backbone)
    monkeypatch.setattr(peft_export, "family_of", lambda backbone: changed(family, finish_keys=other))
    _refused(model, tmp_path / "new", "layer 0 of LlamaModel must turn its keys by rotary positions")


def test_what_stands_in_the_folder_is_plain_json(tmp_path):
    model = _model("bert", "prefix", position_offset=LENGTH)
    model.save_pretrained(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", "TOKEN_CLS", 3)
    assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (32, 4, 2)
    assert config["modules_to_save"] == ["classifier"]
