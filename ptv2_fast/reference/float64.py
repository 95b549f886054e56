"""True float64 for models whose code computes some parts in float32 whatever their dtype."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
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


def _layer_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return self.weight * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary_tables(
    self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    angles = position_ids[..., None].to(x.dtype) * getattr(self, f"{prefix}inv_freq").to(x.dtype)
    # [B, N, rotary size]: Cohere's pairs are neighbours, elsewhere the first half's channels go with the second half's.
    neighbours = type(self).__name__.startswith("Cohere")
    angles = angles.repeat_interleave(2, dim=-1) if neighbours else torch.cat([angles, angles], dim=-1)
    scaling = getattr(self, f"{prefix}attention_scaling")
    return angles.cos() * scaling, angles.sin() * scaling


def _rotary_table_of_gptj(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, self.pos_embd_dim, 2, dtype=x.dtype, device=x.device) / self.pos_embd_dim
    angles = position_ids[..., None].to(x.dtype) / 10000**exponents  # [B, N, pairs]
    return angles.sin(), angles.cos()


def _turn_halves(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    query, key = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key))
    return query, key


def _turn_neighbours(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    query, key = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (query, key))
    return query, key


# Attention whose code turns queries and keys in float32, and how it turns them.
_ROTATIONS = {
    "ModernBertAttention": _turn_halves,
    "ModernBertDecoderAttention": _turn_halves,
    "CohereAttention": _turn_neighbours,
    "Cohere2Attention": _turn_neighbours,
}


def _with_rotation(module: nn.Module, rotation: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """A module's own forward, by another rotation than that of its file."""
    written: Any = inspect.unwrap(type(module).forward)
    known = {**written.__globals__, "apply_rotary_pos_emb": rotation}
    forward = types.FunctionType(written.__code__, known, written.__name__, written.__defaults__, written.__closure__)
    forward.__kwdefaults__ = written.__kwdefaults__
    return types.MethodType(forward, module)


def _router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture's choice of experts: logits, weights of the chosen, and which they are."""
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights, chosen


def to_exact_float64(model: nn.Module) -> nn.Module:
    """Convert a model to float64 in place, with RMS norms, rotary tables and routers in float64 too.

    ``model.double()`` alone leaves Llama and Qwen3 accurate to about 1e-7: their RMS norm and their
    rotary tables are cast to float32 and back. Two exact formulas for the same thing (a prompt key
    at position -1, or at P-1 with the text shifted by P) can then be told apart only to that error.
    Meant for tests: the modules concerned keep their weights and get another ``forward``.

    Args:
        model: any module; only modules named ``*RMSNorm``, ``*T5LayerNorm``, ``Cohere*LayerNorm``, ``*RotaryEmbedding``
            and ``*TopKRouter``, and the attention of ModernBERT, its decoder and Cohere, are changed.

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
        elif kind in ("CohereLayerNorm", "Cohere2LayerNorm"):
            module.forward = types.MethodType(_layer_norm, module)
        elif kind == "GPTJRotaryEmbedding":
            module.forward = types.MethodType(_rotary_table_of_gptj, module)
        elif kind.endswith("RotaryEmbedding"):
            rope_type = getattr(module, "rope_type", None)
            if any(one != "default" for one in (rope_type.values() if isinstance(rope_type, dict) else [rope_type])):
                raise ValueError(f"model must have rotary embeddings of the default kind; {name!r} has {rope_type!r}")
            module.forward = types.MethodType(_rotary_tables, module)
        elif kind.endswith("TopKRouter"):
            module.forward = types.MethodType(_router, module)
        elif kind in _ROTATIONS:
            module.forward = _with_rotation(module, _ROTATIONS[kind])
    return model
