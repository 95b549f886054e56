"""GPT-J: pre-norm decoder, attention beside the MLP, neighbours as rotary pairs, their angles in a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.view import view_of
from ptv2_fast.families.family import Family


class GptJ(Family):
    causal = True
    rotary = True
    skips_unread_tokens = True
    layers_path = "h"
    norm_path = "ln_1"
    attention_path = "attn"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse an attention that is code of GPT-J's own.

        Raises:
            ValueError: transformers is older than 5.24.
        """
        if not hasattr(sys.modules[type(backbone).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(
                "base must use transformers' attention interface, which GPT-J uses from 5.24 on: its attention is code "
                f"of its own, with a cache; got {type(backbone).__name__} of transformers {transformers.__version__}"
            )

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, H, d) as attention reads them: the first channels of each head rotated."""
        positions = torch.arange(-keys.shape[0], 0, device=keys.device)[None]
        sin, cos = _tables(backbone.rotary_emb, keys, positions)
        return self.rotate(keys, sin[0, :, None, :], cos[0, :, None, :])

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (..., P, H, d) turned; the model gives the sines first, which are here called `cos`."""
        return rotary.rotate_neighbours(keys, cos=sin, sin=cos)

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone whose table of angles has those of positions in front of the text."""
        return view_of(backbone, children={"rotary_emb": view_of(backbone.rotary_emb, forward=_tables)})


def _tables(original: Callable[..., Any], states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines (B, N, pairs) of any positions: a table cannot be asked for negative ones."""
    sin, cos = original(states, position_ids=position_ids.abs())
    return sin * position_ids.sign()[..., None].to(sin.dtype), cos
