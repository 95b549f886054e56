"""Tiny random models that read images, sounds, or CLIP's texts, prompts over them, and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.features import literal_deep_features, literal_prefix_features, literal_shallow_features
from tiny_models import INJECTIONS, built_once, tiny_prompts

HIDDEN, LABELS, HEADS = 32, 3, 4
VOCABULARY, PADDING_ID, END_ID = 40, 1, 39


@dataclass(frozen=True)
class Tiny:
    """What tests must know of a family, by themselves.

    Attributes:
        reads: its main input.
        config: its configuration, beside 2 layers of `HEADS` heads and without dropout.
        shape: of a row of its main input: (C, H, W) or (M, F).
        tokens: rows that such an input becomes.
        task: of its own classifier.
        leading: rows in front of an image's patches: its class token, and registers.
        any_size: an image of another size is read without being asked for.
    """

    reads: str
    config: Mapping[str, Any]
    shape: tuple[int, ...] = ()
    tokens: int | None = None
    task: str | None = None
    leading: int = 1
    any_size: bool = False


# Older versions hand a layer nothing but its states.
DINOV2_SERVED = not hasattr(transformers.models.dinov2.modeling_dinov2, "Dinov2SelfAttention")
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_labels": LABELS,
}
_CLIP = {**_SIZES, "projection_dim": 12}
# An image of 2 x 3 patches where its table of positions is one of 2 x 2, since it must be square.
_DINOV2 = {
    **_SIZES, "image_size": 8, "patch_size": 4, "num_channels": 2, "mlp_ratio": 2, "layerscale_value": 0.7,
}  # fmt: skip
TINY = {
    # Images of 2 x 3 and of 2 x 2 patches, and their class tokens.
    "vit": Tiny(
        "pixel_values",
        {
            **_SIZES,
            "image_size": (8, 12),
            "patch_size": 4,
            "num_channels": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        shape=(2, 8, 12),
        tokens=7,
        task="IMAGE_CLS",
    ),
    "dinov2": Tiny("pixel_values", _DINOV2, shape=(2, 8, 12), tokens=7, task="IMAGE_CLS", any_size=True),
    "dinov2_with_registers": Tiny(
        "pixel_values",
        {**_DINOV2, "num_register_tokens": 2, "use_swiglu_ffn": True},
        shape=(2, 8, 12),
        tokens=9,
        task="IMAGE_CLS",
        leading=3,
        any_size=True,
    ),
    "clip_vision_model": Tiny(
        "pixel_values",
        {**_CLIP, "image_size": 8, "patch_size": 4, "num_channels": 2},
        shape=(2, 8, 8),
        tokens=5,
        task="IMAGE_CLS",
    ),
    # A sound of 14 mel frames.
    "whisper": Tiny(
        "input_features",
        {
            "d_model": HIDDEN, "encoder_layers": 2, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
            "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
            "num_mel_bins": 6, "max_source_positions": 7, "classifier_proj_size": 10, "num_labels": LABELS,
            "pad_token_id": PADDING_ID, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2,
        },
        shape=(6, 14),
        tokens=7,
        task="AUDIO_CLS",
    ),
    "clip_text_model": Tiny(
        "input_ids",
        {
            **_CLIP,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "eos_token_id": END_ID,
            "bos_token_id": None,
            "pad_token_id": PADDING_ID,
        },
    ),
}  # fmt: skip
FAMILIES = tuple(TINY)
TEXTS = tuple(name for name, tiny in TINY.items() if tiny.reads == "input_ids")
IMAGES = tuple(name for name, tiny in TINY.items() if tiny.reads == "pixel_values")
SOUNDS = tuple(name for name, tiny in TINY.items() if tiny.reads == "input_features")
FEATURES = (*IMAGES, *SOUNDS)
EVERY = [pytest.param(family, injection, id=f"{family}-{injection}") for family in FEATURES for injection in INJECTIONS]
TOKENS = {name: TINY[name].tokens for name in FEATURES}
MAIN_INPUT = {name: TINY[name].reads for name in FEATURES}
TASK = {name: TINY[name].task for name in FEATURES}


def tiny_config(family: str, **changes) -> transformers.PretrainedConfig:
    """A configuration with 2 layers, 4 heads and no dropout."""
    own = {"attn_implementation": "sdpa", **TINY[family].config, **changes}
    return transformers.AutoConfig.for_model(family, **own)


@built_once
def tiny_base(
    family: str, kind: str = "backbone", *, seed: int = 0, exact: bool = False, **changes
) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; one seed, one set of weights.

    Args:
        kind: "backbone", "classifier" (the family's own), or "projection" (CLIP's WithProjection models).
        exact: float64.
    """
    if "dinov2" in family and not DINOV2_SERVED:
        pytest.skip("this transformers hands DINOv2's attention nothing but states")
    config = tiny_config(family, **changes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = _new_model(family, kind, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0, norms at 1 and attention almost uniform.
            if "layer_weights" not in name:
                parameter += 0.15 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter))
    torch.set_rng_state(state)
    return model.double() if exact else model


def _new_model(family: str, kind: str, config):
    if kind == "projection":
        tower = {"clip_vision_model": "CLIPVisionModelWithProjection", "clip_text_model": "CLIPTextModelWithProjection"}
        return getattr(transformers, tower[family])(config)
    if family == "clip_vision_model" and kind == "classifier":
        whole = transformers.CLIPConfig(vision_config=config.to_dict(), num_labels=LABELS)
        whole._attn_implementation = config._attn_implementation
        return transformers.CLIPForImageClassification(whole)
    if family == "whisper":
        if kind == "classifier":
            return transformers.WhisperForAudioClassification(config)
        return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    auto = transformers.AutoModelForImageClassification if kind == "classifier" else transformers.AutoModel
    return auto.from_config(config)


def tiny_model(
    family: str,
    injection: str = "deep",
    task: str = "FEATURE_EXTRACTION",
    kind: str | None = None,
    *,
    length: int = 5,
    exact: bool = False,
    base_changes: dict | None = None,
    **config,
) -> PTuningV2Model:
    """A wrapped tiny model in eval mode, with prompts large enough to matter.

    Args:
        kind: of `tiny_base`; None is the classifier for a classification task without heads of its own.
    """
    if kind is None:
        kind = "classifier" if task == TASK.get(family) and "heads" not in config else "backbone"
    base = tiny_base(family, kind, exact=exact, **(base_changes or {}))
    model = get_ptv2_model(base, tiny_prompts(injection, task, length=length, **config)).eval()
    if exact:
        model.adapters.double()
    return model


def features(family: str, rows: int = 3, *, seed: int = 5, dtype=torch.float32) -> dict[str, Tensor]:
    """The main input of a family: images (B, 2, H, W) or spectrograms (B, 6, 14)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        MAIN_INPUT[family]: torch.randn(rows, *TINY[family].shape, generator=generator, dtype=torch.float64).to(dtype)
    }


def clip_rows(*lengths: int, seed: int = 3) -> list[Tensor]:
    """Rows of random word ids with the end of text behind them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, END_ID, (n,), generator=generator) for n in lengths or (5, 2, 7)]
    return [torch.cat([row[:-1], torch.tensor([END_ID])]) for row in rows]


def literal_states(model: PTuningV2Model, backbone, inputs: Tensor, attention_mask: Tensor | None = None, **options):
    """What the literal form of the default adapter gives on a bare copy of the backbone: last and all states."""
    adapter = model.adapters["default"]
    prompts = adapter.encoder()
    if adapter.config.injection == "shallow":
        return literal_shallow_features(backbone, prompts, inputs, attention_mask, **options)
    options |= {"layers": adapter.encoder.layers, "prompt_bias": adapter.encoder.gate}
    if adapter.config.injection == "deep":
        return literal_deep_features(backbone, prompts, inputs, attention_mask, **options)
    keys, values = prompts.unbind(1)
    return literal_prefix_features(backbone, keys, values, inputs, attention_mask, **options)


def gradients(loss: Tensor, model: PTuningV2Model) -> dict[str, Tensor]:
    """The gradient of a loss at everything that a model trains, by name."""
    parameters = dict(model.adapters.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
