"""Keys of other rotary positions: the same prompt in a frame whose text starts elsewhere."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.families.family import Family


def turned(backbone: PreTrainedModel, family: Family, layer: int, keys: Tensor, by: int) -> Tensor:
    """A layer's keys (Hkv, P, d), as attention reads them, moved `by` rotary positions up; float32.

    k_p -> R(by) k_p, so that q_(n + by) . R(by) k_p = q_n . k_p for every text position n.

    Raises:
        ValueError: the layer's positions are no rotation that could be moved.
    """
    keys = keys.float()
    # The same keys where the family puts the only token of a prompt, -1, and the first of two, -2.
    probe = torch.randn(2, *keys.shape[::2], generator=torch.Generator().manual_seed(0))
    probe = probe.to(backbone.device, backbone.dtype)
    one = family.finish_keys(backbone, layer, probe[:1]).float()
    two = family.finish_keys(backbone, layer, probe)[:1].float()
    if torch.equal(one, two):
        return keys  # this layer knows no positions
    accuracy = 100 * torch.finfo(backbone.dtype).eps
    if not torch.allclose(_rotated(backbone, family, layer, two, 1), one, rtol=accuracy, atol=accuracy):
        raise ValueError(f"layer {layer} of {type(backbone).__name__} must turn its keys by rotary positions")
    by_token = keys.to(backbone.device).transpose(0, 1)
    return _rotated(backbone, family, layer, by_token, by).transpose(0, 1).to(keys.device)


def _rotated(backbone: PreTrainedModel, family: Family, layer: int, keys: Tensor, by: int) -> Tensor:
    """Keys (P, Hkv, d) turned by the angles between positions 0 and `by`."""
    module = backbone.rotary_emb
    kind = (backbone.config.layer_types[layer],) if "layer_type" in inspect.signature(module.forward).parameters else ()
    positions = torch.tensor([[by]], device=backbone.device)
    cos, sin = (part[0, :, None, :] for part in module(keys, positions, *kind))  # (1, 1, rotary size)
    # Some models scale both; the keys have that already.
    size = torch.hypot(cos, sin)
    return family.rotate(keys, cos / size, sin / size)
