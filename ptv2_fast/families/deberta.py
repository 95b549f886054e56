"""DeBERTa-v2 and v3: scores of query and key, of query and distance (c2p), and of distance and key (p2c).

score[i, j] = s * (q_i k_j + q_i K[r(i - j)] + k_j Q[r(i - j)]), s = 1 / sqrt(d * (1 + c2p + p2c)), where K and Q are
the projected embeddings of distances and r gives a distance its row among them.

Source: DeBERTa (He et al., 2021), section 3.1.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.own_attention import AttentionCall, attended, heads, with_attention
from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import behind_prompts, of_the_text, visible_prompts
from ptv2_fast.families.bert import Bert


@dataclass(frozen=True)
class Distances:
    """Where the embeddings of the distances between N tokens stand; the same for every layer.

    Attributes:
        first, end: the embeddings that are needed are rows first..end - 1.
        rows: (N, N) int64: which of them query i and key j have.
    """

    first: int
    end: int
    rows: Tensor


class Deberta(Bert):
    absolute_positions = True
    relative_positions = True
    own_attention = True
    skips_unread_tokens = False
    layer_index = "layer_idx"
    key_path, value_path = "key_proj", "value_proj"

    def num_positions(self, backbone: PreTrainedModel) -> int | None:
        """How many learned positions there are; none where only distances count."""
        return backbone.config.max_position_embeddings if backbone.embeddings.position_biased_input else None

    def far_keys_and_bias(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys k + K[far] (H, P, d) and s * k Q[far] (H, P): as every query sees tokens far in front of it."""
        encoder = backbone.encoder
        module = encoder.layer[layer].attention.self
        if not module.relative_attention:
            return keys, None
        far = 2 * module.pos_ebd_size - 1
        embedding = module.pos_dropout(_embeddings(encoder, far, far + 1))
        position_keys, position_queries = _projected(module, embedding)
        bias = None if position_queries is None else (keys * (_scale(module) * position_queries)).sum(-1)
        return keys if position_keys is None else keys + position_keys, bias

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone whose attention knows its layer and runs through the hook, with the call's prompts."""

        def run(
            original: Any,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            ptv2_prompts: PromptBatch | None = None,
            ptv2_record: deque[tuple[Tensor, Tensor]] | None = None,
            **kwargs: Any,
        ) -> Any:
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must have shape (B, N), which is all that DeBERTa's embeddings take; "
                    f"got {tuple(attention_mask.shape)}"
                )
            model = original.__self__
            call = AttentionCall(attention_mask, ptv2_prompts, ptv2_record)
            if attention_mask is None:
                # Without a mask the model looks for padding, which waits for the device.
                attention_mask = _ones(input_ids if input_ids is not None else kwargs["inputs_embeds"])
            handed: dict[str, Callable[..., Any]] = {"get_attention_mask": lambda mask: call}
            if model.encoder.relative_attention:
                # A shallow prompt's rows are among those of the mask.
                apart = distances(model.encoder, attention_mask.shape[1], attention_mask.device)
                embeddings = _embeddings(model.encoder, apart.first, apart.end)
                handed |= {"get_rel_pos": lambda *_: apart.rows, "get_rel_embedding": lambda: embeddings}
            inner = view_of(model, children={"encoder": view_of(model.encoder, attributes=handed)})
            # Some of the model's parts take no booleans.
            return inner.forward(input_ids, attention_mask=attention_mask.long(), **kwargs)

        return view_of(with_attention(backbone, self.attention_paths(backbone), _attend), forward=run)

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the backbone in which virtual tokens evolve in front of every row's text."""

        length = prompts.shape[0]

        def run(
            original: Callable[..., Any],
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if attention_mask is None:
                attention_mask = _ones(input_ids if input_ids is not None else kwargs["inputs_embeds"])
            mask = visible_prompts(attention_mask, length)
            return of_the_text(original(input_ids, attention_mask=mask, **kwargs), length)

        children = {"embeddings": behind_prompts(backbone.embeddings, prompts)}
        return view_of(view_of(backbone, children=children), forward=run)


def distances(encoder: nn.Module, tokens: int, device: torch.device) -> Distances:
    """The distances of N tokens among the embeddings of an encoder with relative attention."""
    bucketed = encoder.position_buckets > 0
    span = encoder.position_buckets if bucketed else encoder.max_relative_positions
    by_distance = torch.arange(1 - tokens, tokens, device=device)  # query - key
    # So far every distance has an embedding of its own.
    exact = span // 2 if bucketed else span - 1
    first, end = 0, 2 * span
    if tokens - 1 <= exact:
        first, end = span - tokens + 1, span + tokens
    elif bucketed:
        by_distance = buckets(by_distance, span, encoder.max_relative_positions)
    by_distance = (by_distance + span).clamp(0, 2 * span - 1) - first
    slots = torch.arange(tokens, device=device)
    return Distances(first, end, by_distance[slots[:, None] - slots[None, :] + tokens - 1])


def buckets(distance: Tensor, count: int, max_position: int) -> Tensor:
    """Distances as they are up to count / 2, and by their logarithm from there on; int64."""
    middle = count // 2
    # The same operations in float32 as transformers takes: a rounding apart is a bucket apart.
    length = distance.abs().clamp(min=middle)
    share = torch.log(length / middle) / _log((max_position - 1) / middle)
    far = (torch.ceil(share * (middle - 1)) + middle).long() * distance.sign()
    return torch.where(distance.abs() <= middle, distance, far)


def _embeddings(encoder: nn.Module, first: int, end: int) -> Tensor:
    """(end - first, D) embeddings of distances as layers take them."""
    embeddings = encoder.rel_embeddings.weight[first:end]
    return encoder.LayerNorm(embeddings) if "layer_norm" in encoder.norm_rel_ebd else embeddings


@torch.compiler.assume_constant_result
def _log(number: float) -> float:
    """The logarithm as float32 has it."""
    return _logs(number)


@functools.cache
def _logs(number: float) -> float:
    return float(torch.log(torch.tensor(number)))


def _attend(
    original: Any,
    states: Tensor,
    call: AttentionCall,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    module = original.__self__
    size = module.attention_head_size
    # In the order of the step's fused projections.
    value, key = (heads(project(states), size) for project in (module.value_proj, module.key_proj))
    query = heads(module.query_proj(states if query_states is None else query_states), size)
    bias = None
    if relative_pos is not None:
        bias = _position_scores(module, query, key, module.pos_dropout(rel_embeddings), relative_pos)
    return attended(module, call, query, key, value, bias, _scale(module)), None


def _position_scores(module: nn.Module, query: Tensor, key: Tensor, embeddings: Tensor, rows: Tensor) -> Tensor | None:
    """(B, H, N, N) both terms of position, scaled; None where the layer has neither.

    Args:
        query, key: (B, H, N, d).
        embeddings: (R, D) of distances.
        rows: (N, N) which of them query i and key j have.
    """
    position_keys, position_queries = _projected(module, embeddings)
    shape = (*query.shape[:2], *rows.shape)
    scores = None
    if position_keys is not None:
        by_row = query @ (_scale(module) * position_keys).transpose(-1, -2)  # (B, H, N, R)
        scores = by_row.gather(-1, rows.expand(shape))
    if position_queries is not None:
        by_row = key @ (_scale(module) * position_queries).transpose(-1, -2)
        of_key = by_row.gather(-1, rows.t().expand(shape)).transpose(-1, -2)
        scores = of_key if scores is None else scores + of_key
    return scores


def _projected(module: nn.Module, embeddings: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings (R, D) of distances as keys and as queries, (H, R, d) each; None where the layer has no such term."""
    parts = []
    for term, shared, own in (("c2p", "key_proj", "pos_key_proj"), ("p2c", "query_proj", "pos_query_proj")):
        project: Any = getattr(module, shared if module.share_att_key else own, None)
        has_term = term in module.pos_att_type
        parts.append(heads(project(embeddings), module.attention_head_size) if has_term else None)
    return parts[0], parts[1]


def _scale(module: nn.Module) -> float:
    terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    return (module.attention_head_size * terms) ** -0.5


def _ones(text: Tensor) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
