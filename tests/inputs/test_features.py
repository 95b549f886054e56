"""What families that read images or sounds refuse, and why."""

from __future__ import annotations

import pytest
import torch
import transformers

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from tiny_features import (
    DINOV2_SERVED,
    FEATURES,
    HIDDEN,
    IMAGES,
    LABELS,
    MAIN_INPUT,
    TASK,
    TOKENS,
    features,
    tiny_base,
    tiny_config,
    tiny_model,
)
from tiny_models import INJECTIONS
from tolerances import assert_same_bits


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FEATURES)
def test_inputs_that_do_not_fit_are_refused(family, injection):
    model, name = tiny_model(family, injection, TASK[family]), MAIN_INPUT[family]
    inputs = features(family)
    shape = r"\(B, C, H, W\)" if family in IMAGES else r"\(B, M, F\)"
    with pytest.raises(ValueError, match=rf"{name} must be a tensor of shape {shape}; got NoneType"):
        model()
    with pytest.raises(ValueError, match=rf"{name} must be a tensor of shape {shape}; got list"):
        model([1.0])
    with pytest.raises(ValueError, match=rf"{name} must be a tensor of shape {shape}; got \(8,\)"):
        model(torch.zeros(8))
    with pytest.raises(ValueError, match=f"{name} must be floating-point numbers; got torch.int64"):
        model(inputs[name].long())
    with pytest.raises(ValueError, match=f"{name} must hold at least one row and no empty axis; got"):
        model(inputs[name][:0])
    with pytest.raises(ValueError, match=f"{name} must be on the model's device cpu; got meta"):
        model(inputs[name].to("meta"))
    with pytest.raises(ValueError, match=f"input_ids must be None: .* reads {name}, not text"):
        model(**inputs, input_ids=torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        model(**inputs, labels=torch.tensor([0, 1, LABELS]))
    if family in IMAGES:
        mask = torch.ones(3, TOKENS[family])
        with pytest.raises(ValueError, match="attention_mask must be None: every patch of an image is read"):
            model(**inputs, attention_mask=mask)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_mask_over_mel_frames_is_ignored_as_the_encoder_ignores_it(injection):
    """Whisper's feature extractor returns one; padding is silence that the encoder hears."""
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[:, 9:] = 0
    for heads in (None, {"label": HeadConfig("AUDIO_CLS", 3, pooling="mean")}):
        model = tiny_model("whisper", injection, "AUDIO_CLS", **({"heads": heads} if heads else {})).train()
        inputs = features("whisper")
        assert_same_bits(model(**inputs, attention_mask=mask).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FEATURES)
def test_images_and_sounds_have_no_limit_of_positions(family):
    """Prompts have no position: the model's own table is full without them, and no longer with them."""
    for injection in INJECTIONS:
        model = tiny_model(family, injection, TASK[family], length=100)
        assert model.text_limit() is None
        assert model(**features(family)).logits.shape == (3, LABELS)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("vit", {"task_type": "SEQ_CLS", "heads": {"label": 2}}, "task_type must be IMAGE_CLS or FEATURE_EXTRACTION"),
        ("vit", {"task_type": "AUDIO_CLS", "heads": {"label": 2}}, "task_type must be IMAGE_CLS or FEATURE_EXTRACTION"),
        ("whisper", {"task_type": "IMAGE_CLS", "heads": {"a": 2}}, "task_type must be AUDIO_CLS or FEATURE_EXTRACTION"),
        ("vit", {"task_type": "CAUSAL_LM"}, "task_type must be IMAGE_CLS or FEATURE_EXTRACTION"),
        ("vit", {"heads": {"label": HeadConfig("SEQ_CLS", 2)}}, "heads must be IMAGE_CLS or TOKEN_CLS"),
        ("vit", {"prompt_init": "text"}, "prompt_init must be 'normal' or 'gated' .* reads pixel_values and no text"),
        ("vit", {"injection": "prefix", "position_offset": 20}, "position_offset must be None"),
        ("vit", {"task_type": "IMAGE_CLS"}, "heads must be given for .*or pass a model of type ...ForImageClassif"),
        ("whisper", {"task_type": "AUDIO_CLS"}, "heads must be given for .*or pass a model of type ...ForAudioClassif"),
        ("clip_text_model", {"task_type": "IMAGE_CLS", "heads": {"label": 2}}, "task_type must be one for texts"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(family, config, message):
    base = tiny_base(family)
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(base, PTuningV2Config(**{"task_type": "FEATURE_EXTRACTION", **config}))
    assert all(parameter.requires_grad for parameter in base.parameters()) or family == "whisper"


def test_a_text_to_start_from_is_refused():
    with pytest.raises(ValueError, match="init_text must be None on ViTModel, which reads pixel_values and no text"):
        config = PTuningV2Config("FEATURE_EXTRACTION")
        get_ptv2_model(tiny_base("vit"), config, tokenizer=lambda *_, **__: {"input_ids": [1]}, init_text="a")


def test_a_head_on_the_last_row_is_refused():
    with pytest.raises(ValueError, match="pooling must be 'first' or 'mean' for IMAGE_CLS; got 'last'"):
        HeadConfig("IMAGE_CLS", 2, pooling="last")


def test_two_towers_are_refused_and_each_alone_is_not():
    config = transformers.CLIPConfig(
        vision_config=tiny_base("clip_vision_model").config.to_dict(),
        text_config=tiny_base("clip_text_model").config.to_dict(),
    )
    whole = transformers.CLIPModel(config)
    with pytest.raises(ValueError, match="one tower: wrap the vision_model or the text_model of CLIPModel"):
        get_ptv2_model(whole, PTuningV2Config("FEATURE_EXTRACTION"))
    inside = get_ptv2_model(whole.vision_model, PTuningV2Config("FEATURE_EXTRACTION"))
    assert inside(**features("clip_vision_model")).last_hidden_state.shape == (3, TOKENS["clip_vision_model"], HIDDEN)


def test_a_dinov2_of_feature_maps_is_refused():
    base = transformers.Dinov2Backbone(tiny_config("dinov2"))
    with pytest.raises(ValueError, match="base must return its last states, .*; got Dinov2Backbone"):
        get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION"))


@pytest.mark.skipif(DINOV2_SERVED, reason="it is served")
@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_a_dinov2_whose_attention_is_handed_nothing_is_refused(family):
    base = transformers.AutoModel.from_config(tiny_config(family))
    with pytest.raises(ValueError, match="DINOv2 does in later versions; got Dinov2.* of transformers"):
        get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION"))


def test_whisper_is_its_encoder_and_drops_no_layers():
    config = tiny_base("whisper").config
    whole = transformers.WhisperForConditionalGeneration(config)
    with pytest.raises(ValueError, match="wrap the encoder of WhisperModel"):
        get_ptv2_model(whole, PTuningV2Config("FEATURE_EXTRACTION"))
    inside = get_ptv2_model(whole.get_encoder(), PTuningV2Config("FEATURE_EXTRACTION"))
    assert inside(**features("whisper")).last_hidden_state.shape == (3, TOKENS["whisper"], HIDDEN)
    with pytest.raises(ValueError, match="base must have encoder_layerdrop 0; got 0.1"):
        get_ptv2_model(tiny_base("whisper", encoder_layerdrop=0.1), PTuningV2Config("FEATURE_EXTRACTION"))
