"""Where things are: the backbone in a model, which runs the layers without the task's head, and parts of a module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of

# Models that hold their backbone elsewhere than where their base_model_prefix says.
_ELSEWHERE = {
    "CLIPForImageClassification": "vision_model",
    "CLIPVisionModelWithProjection": "vision_model",
    "CLIPTextModelWithProjection": "text_model",
    "WhisperForAudioClassification": "encoder",
}


def backbone_of(base: PreTrainedModel) -> PreTrainedModel:
    """The backbone of a model, which is the model itself where it has no head."""
    backbone: PreTrainedModel = getattr(base, _attribute(base) or "base_model")
    return backbone


def with_backbone(target: PreTrainedModel, backbone: PreTrainedModel) -> PreTrainedModel:
    """`target` (a model, or a view of one) around another backbone; the backbone itself where target is one."""
    if backbone_of(target) is target:
        return backbone
    return view_of(target, children={backbone_name(target): backbone})


def backbone_name(base: PreTrainedModel) -> str:
    """The attribute under which a model that has a head holds its backbone."""
    return _attribute(base) or base.base_model_prefix


def part_at(module: nn.Module, path: str) -> Any:
    """What is at a path ("encoder.layer.0") in a module.

    Raises:
        AttributeError: the module has no such part.
    """
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name)
    return part


def _attribute(base: PreTrainedModel) -> str | None:
    return _ELSEWHERE.get(type(base).__name__)
