"""Weights that are there only while their layer runs: sharded over processes, or offloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:
    FSDPModule = DTensor = ()  # type: ignore[misc, assignment]


def weights_owner(above: Sequence[nn.Module], layers: nn.ModuleList) -> str | None:
    """Who brings the weights of a model while its modules run, and takes them away again; None where they stay.

    The one place that decides this. FSDP2 swaps a module's class and parameters, DeepSpeed's ZeRO-3 marks its
    parameters by `ds_id`, and offloaded ones wait on the device "meta". Each treats all parameters of a module alike,
    so the first one says it; sharding is of all layers and offloading begins at the last, so two layers say it for all.

    Args:
        above: the backbone, and what stands around it.
        layers: the backbone's.
    """
    own = tuple(layers._modules.values())
    for module in (*above, own[0], own[-1]):
        first = _first_parameter(module)
        if isinstance(module, FSDPModule) or isinstance(first, DTensor):
            return "FSDP2"
        if hasattr(first, "ds_id"):
            return "DeepSpeed ZeRO-3"
        if first is not None and first.is_meta:
            return "offloading"
    return None


def _first_parameter(module: nn.Module, *, floating: bool = False) -> nn.Parameter | None:
    """The first of `module.parameters()`, whose walk costs every step several times as much.

    Args:
        floating: it has to be a floating-point one.
    """
    for parameter in module._parameters.values():
        if parameter is not None and (not floating or parameter.is_floating_point()):
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child, floating=floating)
        if found is not None:
            return found
    return None


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter; transformers' `dtype`, whose walk costs several times it.

    Raises:
        ValueError: there is none.
    """
    found = _first_parameter(model, floating=True)
    if found is None:
        raise ValueError(f"model must have floating-point parameters; got {type(model).__name__} without any")
    return found.dtype


def device_of(model: nn.Module) -> torch.device:
    """The device that a model computes on; that of its weights, unless they are offloaded."""
    first = _first_parameter(model)
    if first is None:
        raise ValueError(f"model must have parameters: they say where it computes; got {type(model).__name__}")
    if not first.is_meta:
        return first.device
    for module in model.modules():
        # accelerate's hooks; a sequence of them stands under `hooks`.
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first.device


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor."""
    return isinstance(tensor, DTensor)


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, each of which has to ask; one that is no `DTensor` is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_runs_alone(backbone: nn.Module) -> None:
    """Refuse a backbone that only runs as a part of something else, which brings the weights outside its layers.

    Raises:
        ValueError: FSDP2 has sharded them, and neither the backbone itself is wrapped nor has what is wrapped begun to
            run.
    """
    if isinstance(next(backbone.parameters()), DTensor) and not isinstance(backbone, FSDPModule):
        raise ValueError(
            "fully_shard must be given the whole PTuningV2Model, or the backbone, beside the layers: a shallow prompt "
            f"runs the backbone by itself; got {type(backbone).__name__} sharded by a module in between"
        )


def check_gathered(prompts: Tensor) -> None:
    """Refuse prompts of which this process holds a part: what FSDP2 has wrapped does not run.

    Raises:
        ValueError: see above; it names the way to run another method than forward.
    """
    if isinstance(prompts, DTensor):
        raise ValueError(
            "prompts must be whole; got a part of them, since fully_shard brings them for forward alone: "
            "torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate') does for generate too"
        )


def kept_together(pairs: list[tuple[Tensor, Tensor]], states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that layers made on their way to `states` (1, P, D), tied to it for backward.

    Whoever brings weights for a layer's backward does so when the gradient of the layer's output arrives. The keys and
    values of the last layer are used while its output is not: a gradient of zero gives the sign.
    """
    return [(_Tied.apply(keys, states), _Tied.apply(values, states)) for keys, values in pairs]


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, states: Tensor) -> Tensor:
        ctx.save_for_backward(states.new_zeros(()).expand_as(states))
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.saved_tensors[0]
