"""Inputs that are no text: images and sounds, which have neither padding nor positions of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.families.family import Family
from ptv2_fast.inputs.text import text_size

TEXT = "input_ids"
_SHAPES = {"pixel_values": ("(B, C, H, W)", 4), "input_features": ("(B, M, F)", 3)}
_OF_TEXT = (
    "input_ids", "inputs_embeds", "token_type_ids", "position_ids", "cu_seq_lens_q", "past_key_values", "cache",
)  # fmt: skip


def reads_text(family: Family) -> bool:
    """Whether a family's forward takes token ids."""
    return family.reads == TEXT


def input_size(family: Family, inputs: Mapping[str, Any]) -> tuple[int, int | None]:
    """Rows B of a forward's main input, and its tokens N where it is a text.

    Raises:
        ValueError: it is missing, or no tensor of the family's shape.
    """
    if reads_text(family):
        return text_size(inputs)
    return _features(family, inputs).shape[0], None


def check_features(family: Family, inputs: Mapping[str, Any], base: PreTrainedModel) -> dict[str, Any]:
    """The inputs of a forward whose main one is an image or a sound, as the base takes them.

    Raises:
        ValueError: that input is missing, empty, no floating-point tensor of its shape, or on another device than the
            base; or one is given that only a text has. The message names the input.
    """
    given = [name for name in _OF_TEXT if inputs.get(name) is not None]
    if given:
        raise ValueError(f"{given[0]} must be None: {type(base).__name__} reads {family.reads}, not text")
    features = _features(family, inputs)
    if not features.is_floating_point():
        raise ValueError(f"{family.reads} must be floating-point numbers; got {features.dtype}")
    if features.numel() == 0:
        raise ValueError(f"{family.reads} must hold at least one row and no empty axis; got {tuple(features.shape)}")
    # accelerate moves the inputs of a base that it has spread over several devices.
    if not getattr(base, "hf_device_map", None) and features.device != device_of(base):
        raise ValueError(f"{family.reads} must be on the model's device {device_of(base)}; got {features.device}")
    if family.reads == "pixel_values" and inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask must be None: every patch of an image is read")
    # Whisper's feature extractor returns a mask that its encoder ignores: silence is part of the sound.
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def features_read(family: Family, inputs: Mapping[str, Any], backbone: PreTrainedModel, pooling: str) -> Tensor | None:
    """(B,) the flattened (B, N) slots that a head reads which pools this way; None where it reads them all."""
    if pooling != "first":
        return None
    features = _features(family, inputs)
    tokens = family.feature_tokens(backbone, features)
    return None if tokens is None else torch.arange(features.shape[0], device=features.device) * tokens


def _features(family: Family, inputs: Mapping[str, Any]) -> Tensor:
    shape, axes = _SHAPES[family.reads]
    features = inputs.get(family.reads)
    if not isinstance(features, Tensor) or features.dim() != axes:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{family.reads} must be a tensor of shape {shape}; got {found}")
    return features
