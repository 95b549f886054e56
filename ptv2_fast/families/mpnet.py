"""MPNet: BERT's shape with an attention of its own, to whose scores a learned bias for the distance is added."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.own_attention import AttentionCall, attended, heads, with_attention
from ptv2_fast.backbone.view import view_of
from ptv2_fast.families.roberta import Roberta

# transformers' encoder counts in these, whatever number of buckets the configuration gives the table.
_BUCKETS, _MAX_DISTANCE = 32, 128
# The bucket of every token that stands far in front of a query.
_FARTHEST = _BUCKETS // 2 - 1


class Mpnet(Roberta):
    absolute_positions = True
    relative_positions = True
    own_attention = True
    skips_unread_tokens = False
    layer_index = "layer_idx"
    attention_path = "attention.attn"
    key_path, value_path = "k", "v"

    def far_keys_and_bias(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (H, P, d) as they are, and (H, P): the bias of the farthest bucket, which all layers share."""
        far = backbone.encoder.relative_attention_bias.weight[_FARTHEST]
        return keys, far[:, None].expand(-1, keys.shape[1])

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone whose attention knows its layer and runs through the hook, with the call's prompts."""

        def run(
            original: Any,
            *args: Any,
            attention_mask: Tensor | None = None,
            ptv2_prompts: PromptBatch | None = None,
            ptv2_record: deque[tuple[Tensor, Tensor]] | None = None,
            **kwargs: Any,
        ) -> Any:
            model = original.__self__
            call = AttentionCall(attention_mask, ptv2_prompts, ptv2_record)

            def encode(
                original: Callable[..., Any], states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
            ) -> Any:
                return original(states, attention_mask=call, **kwargs)

            def compute_position_bias(states: Tensor) -> Any:
                return position_bias(model.encoder.relative_attention_bias.weight, states.shape[1])

            # The model returns a 4-D mask as it is, where it would build one of (B, 1, N, N); nobody reads this one.
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = attention_mask[:, None, None, :]
            own = {"compute_position_bias": compute_position_bias}
            encoder = view_of(model.encoder, attributes=own, forward=encode)
            return view_of(model, children={"encoder": encoder}).forward(*args, attention_mask=attention_mask, **kwargs)

        return view_of(with_attention(backbone, self.attention_paths(backbone), _attend), forward=run)


def position_bias(table: Tensor, tokens: int) -> Tensor:
    """(1, H, N, N) the bias of every query and key of N tokens, from the table (buckets, H)."""
    distance = torch.arange(1 - tokens, tokens, device=table.device)  # key - query
    by_distance = table[buckets(distance)].t().contiguous()  # (H, 2N - 1)
    slots = torch.arange(tokens, device=table.device)
    return by_distance[:, slots[None, :] - slots[:, None] + tokens - 1][None]


def buckets(distance: Tensor) -> Tensor:
    """The bucket of distances key - query: exact when short, by their logarithm when long, apart for either side."""
    side = _BUCKETS // 2
    exact = side // 2
    length = distance.abs()
    # The same operations in float32 as transformers takes: a rounding apart is a bucket apart.
    share = torch.log(length.clamp(min=exact).float() / exact) / math.log(_MAX_DISTANCE / exact)
    far = (exact + (share * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(length < exact, length, far) + (distance > 0) * side


def _attend(
    original: Any,
    states: Tensor,
    call: AttentionCall,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Any:
    module = original.__self__
    size = module.attention_head_size
    query, key, value = (heads(project(states), size) for project in (module.q, module.k, module.v))
    return (module.o(attended(module, call, query, key, value, position_bias, size**-0.5)),)
