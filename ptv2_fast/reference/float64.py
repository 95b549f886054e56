"""True float64 for models whose code computes some parts in float32 whatever their dtype."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


def _centred_rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Gemma's: weights are differences from 1."""
    mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
    return (1.0 + self.weight) * hidden_states * torch.rsqrt(mean_square + self.eps)


def _rotary_tables(
    self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    angles = position_ids[..., None].to(x.dtype) * getattr(self, f"{prefix}inv_freq").to(x.dtype)
    angles = torch.cat([angles, angles], dim=-1)  # [B, N, rotary size]
    scaling = getattr(self, f"{prefix}attention_scaling")
    return angles.cos() * scaling, angles.sin() * scaling


def _router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture's choice of experts: logits, weights of the chosen, and which they are."""
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights, chosen


def _modernbert_attention(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    projected = self.Wqkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # [B, N, 3, H, d]
    query, key, value = (part.transpose(1, 2) for part in projected.unbind(dim=-3))
    cos, sin = (table[:, None] for table in position_embeddings)
    query, key = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key))
    output, weights = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.head_dim**-0.5,
        sliding_window=self.sliding_window,
        **kwargs,
    )
    return self.out_drop(self.Wo(output.flatten(2))), weights


def to_exact_float64(model: nn.Module) -> nn.Module:
    """Convert a model to float64 in place, with RMS norms, rotary tables and routers in float64 too.

    ``model.double()`` alone leaves Llama and Qwen3 accurate to about 1e-7: their RMS norm and their
    rotary tables are cast to float32 and back. Two exact formulas for the same thing (a prompt key
    at position -1, or at P-1 with the text shifted by P) can then be told apart only to that error.
    Meant for tests: the modules concerned keep their weights and get another ``forward``.

    Args:
        model: any module; only modules named ``*RMSNorm``, ``*T5LayerNorm``, ``*RotaryEmbedding`` and
            ``*TopKRouter``, and ModernBERT's attention, are changed.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a rotary embedding is not of the default kind.
    """
    model.double()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind.endswith("T5LayerNorm"):
            exact = _rms_norm if hasattr(module, "variance_epsilon") else _centred_rms_norm
            module.forward = types.MethodType(exact, module)
        elif kind.endswith("RotaryEmbedding"):
            rope_type = getattr(module, "rope_type", None)
            if any(one != "default" for one in (rope_type.values() if isinstance(rope_type, dict) else [rope_type])):
                raise ValueError(f"model must have rotary embeddings of the default kind; {name!r} has {rope_type!r}")
            module.forward = types.MethodType(_rotary_tables, module)
        elif kind.endswith("TopKRouter"):
            module.forward = types.MethodType(_router, module)
        elif kind == "ModernBertAttention":
            module.forward = types.MethodType(_modernbert_attention, module)
    return model
