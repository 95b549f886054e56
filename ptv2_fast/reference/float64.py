"""True float64 for models whose code computes some parts in float32 whatever their dtype."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


def _rotary_tables(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    angles = torch.cat([angles, angles], dim=-1)  # [B, N, head_dim]
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def to_exact_float64(model: nn.Module) -> nn.Module:
    """Convert a model to float64 in place, with RMS norms and rotary tables in float64 too.

    ``model.double()`` alone leaves Llama and Qwen3 accurate to about 1e-7: their RMS norm and their
    rotary tables are cast to float32 and back. Two exact formulas for the same thing (a prompt key
    at position -1, or at P-1 with the text shifted by P) can then be told apart only to that error.
    Meant for tests: the two kinds of modules keep their weights and get another ``forward``.

    Args:
        model: any module; only modules named ``*RMSNorm`` and ``*RotaryEmbedding`` are changed.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a rotary embedding is not of the default kind.
    """
    model.double()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(_rms_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            if getattr(module, "rope_type", None) != "default":
                raise ValueError(
                    f"model must have rotary embeddings of the default kind; {name!r} has "
                    f"{getattr(module, 'rope_type', None)!r}"
                )
            module.forward = types.MethodType(_rotary_tables, module)
    return model
