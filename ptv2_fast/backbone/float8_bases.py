"""Linear maps whose weights are float8 already: what of torchao's and transformers' can be computed in which way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ptv2_fast.backbone.float8_linear import FLOAT8, Float8Rows, float8_linear


def kept_float8(linear: nn.Module) -> Float8Rows | None:
    """The weight of a linear map as torchao keeps it, without a copy; None where it is no such weight.

    Also None where its scales are neither one a row nor one for all: a product cannot take them out of its sums.
    """
    weight: Any = linear._parameters.get("weight")
    if not _is_torchao(weight) or weight.qdata.dtype is not FLOAT8 or weight.qdata.dim() != 2:
        return None
    values, scales = weight.qdata, weight.scale
    if tuple(scales.shape) not in ((values.shape[0], 1), (1, 1)) or not values.is_contiguous():
        return None
    return Float8Rows(values, scales.float())


def lacks_backward(linear: nn.Module) -> bool:
    """Whether a linear map computes with float8 inputs by a product that torch cannot differentiate: torchao's, where
    activations are quantized as they come."""
    weight: Any = linear._parameters.get("weight")
    return _is_torchao(weight) and weight.act_quant_kwargs is not None


def differentiable(module: nn.Module, states: Tensor) -> Tensor:
    """What a module makes of states (..., D), by a product with a backward where its own has none."""
    plain = type(module) is nn.Linear and "forward" not in module.__dict__
    if plain and not (module._forward_hooks or module._forward_pre_hooks) and lacks_backward(module):
        kept = kept_float8(module)
        if kept is not None:
            return float8_linear(states, kept, module.bias)
    made: Tensor = module(states)
    return made


def has_float8_blocks(linear: nn.Module) -> bool:
    """Whether a linear map is transformers' FP8Linear, with a scale for each block of its weight."""
    return type(linear).__name__ == "FP8Linear" and type(linear).__module__.startswith("transformers.")


def _is_torchao(weight: Tensor | None) -> bool:
    return type(weight).__name__ == "Float8Tensor" and type(weight).__module__.startswith("torchao.")
