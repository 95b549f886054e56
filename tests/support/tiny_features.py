"""Tiny random models that read images, sounds, or CLIP's texts, prompts over them, and inputs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.features import literal_deep_features, literal_prefix_features, literal_shallow_features
from tiny_models import INJECTIONS, built_once, tiny_prompts

IMAGES, SOUNDS = ("vit", "clip_vision_model"), ("whisper",)
FEATURES = (*IMAGES, *SOUNDS)
EVERY = [pytest.param(family, injection, id=f"{family}-{injection}") for family in FEATURES for injection in INJECTIONS]
TEXTS = ("clip_text_model",)
FAMILIES = (*FEATURES, *TEXTS)
HIDDEN, LABELS, HEADS = 32, 3, 4
# Rows that an image of 2 x 3 patches and its class token, or a sound of 14 mel frames, becomes.
TOKENS = {"vit": 7, "clip_vision_model": 5, "whisper": 7}
VOCABULARY, PADDING_ID, END_ID = 40, 1, 39
MAIN_INPUT = {"vit": "pixel_values", "clip_vision_model": "pixel_values", "whisper": "input_features"}
TASK = {"vit": "IMAGE_CLS", "clip_vision_model": "IMAGE_CLS", "whisper": "AUDIO_CLS"}


def tiny_config(family: str, **changes) -> transformers.PretrainedConfig:
    """A configuration with 2 layers, 4 heads and no dropout."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_labels": LABELS,
        "projection_dim": 12,
    }
    if family == "vit":
        sizes |= {"image_size": (8, 12), "patch_size": 4, "num_channels": 2}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes.pop("projection_dim")
    elif family == "clip_vision_model":
        sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 2}
    elif family == "clip_text_model":
        sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": END_ID}
        sizes |= {"bos_token_id": None, "pad_token_id": PADDING_ID}
    else:
        sizes = {
            "d_model": HIDDEN, "encoder_layers": 2, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
            "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
            "num_mel_bins": 6, "max_source_positions": 7, "classifier_proj_size": 10, "num_labels": LABELS,
            "pad_token_id": PADDING_ID, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2,
        }  # fmt: skip
    return transformers.AutoConfig.for_model(family, **{**sizes, "attn_implementation": "sdpa", **changes})


@built_once
def tiny_base(
    family: str, kind: str = "backbone", *, seed: int = 0, exact: bool = False, **changes
) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; one seed, one set of weights.

    Args:
        kind: "backbone", "classifier" (the family's own), or "projection" (CLIP's WithProjection models).
        exact: float64.
    """
    config = tiny_config(family, **changes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = _new_adapter(family, kind, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0, norms at 1 and attention almost uniform.
            if "layer_weights" not in name:
                parameter += 0.15 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter))
    torch.set_rng_state(state)
    return model.double() if exact else model


def _new_adapter(family: str, kind: str, config):
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
    shape = {"vit": (2, 8, 12), "clip_vision_model": (2, 8, 8), "whisper": (6, 14)}[family]
    generator = torch.Generator().manual_seed(seed)
    return {MAIN_INPUT[family]: torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)}


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
