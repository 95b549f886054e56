"""One layer's attention through the Triton kernels, in the layout in which models have it: eager calls alone.

What turns that layout into the kernels' is done where autograd does not look, and undone for the gradients: a model has
many layers, and each operation that autograd notes costs the host more than one that it does not. Imported only where
Triton serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention.triton_backend import by_decode
from ptv2_fast.kernels import prompt_backward, prompt_decode, prompt_forward

_Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
_REST = ("key_mask", "cu_seqlens", "prompt_index", "prompt_lens", "seed")


def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
    arguments: dict[str, Any],
) -> Tensor:
    """(B, N, H, D), nothing checked and nothing empty.

    Args:
        q, k, v: (B, H, N, D) and (B, Hkv, M, D), also where `cu_seqlens` says that the flattened tokens are packed.
        prompt_k, prompt_v, prompt_bias: with or without a bank's first axis.
        arguments: the others of `kernels.prompt_forward.prompt_attention_forward`, without the seed.
    """
    if arguments["dropout_p"] > 0.0:
        # One draw from the device's generator a call: torch.manual_seed and CUDA-graph replay govern it.
        arguments["seed"] = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    given = (q, k, v, prompt_k, prompt_v, prompt_bias, bias)
    if torch.is_grad_enabled():
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                out: Tensor = _LayerAttention.apply(arguments, *given)
                return out
    return _leaving(_attend(_entering(given, arguments), arguments)[0], q, arguments)


class _LayerAttention(torch.autograd.Function):
    """Saves the kernels' inputs, o and lse; backward launches only the passes that are asked for."""

    @staticmethod
    def forward(ctx: Any, arguments: dict[str, Any], *given: Any) -> Tensor:
        inputs = _entering(given, arguments)
        output, lse = _attend(inputs, arguments)
        ctx.save_for_backward(*inputs, output, lse, *[arguments.get(name) for name in _REST])
        ctx.arguments = arguments
        # (B, N), and whether the prompt has got an axis.
        ctx.form = given[0].shape[0], given[0].shape[2], given[3].dim() == 3
        ctx.set_materialize_grads(False)
        # To autograd this is no view of what was made here.
        return _leaving(output, given[0], arguments).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of gradients is asked for, and refused where it is used
            twice: tuple[Tensor | None, ...] = _refused_twice(ctx, grad)
            return twice
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    q, k, v, prompt_k, prompt_v, prompt_bias, bias, output, lse, *rest = ctx.saved_tensors
    _, of_q, of_k, of_v, of_prompt_k, of_prompt_v, of_prompt_bias, of_bias = ctx.needs_input_grad
    packed = ctx.arguments["cu_seqlens"] is not None
    needs = prompt_backward.Needs(of_q, of_k or of_v, of_prompt_k or of_prompt_v, of_prompt_bias, of_bias)
    dq, dk, dv, *dprompt, dbias = prompt_backward.prompt_attention_backward(
        grad.flatten(0, 1) if packed else grad.transpose(1, 2),
        q,
        k,
        v,
        prompt_k,
        prompt_v,
        output,
        lse,
        needs=needs,
        prompt_bias=prompt_bias,
        bias=bias,
        **{**ctx.arguments, **dict(zip(_REST, rest, strict=True))},
    )
    rows, tokens, unbanked = ctx.form
    if packed:
        dq, dk, dv = _in_rows(dq, rows, tokens), _in_rows(dk, rows, tokens), _in_rows(dv, rows, tokens)
    if unbanked:
        dprompt = [None if x is None else x[0] for x in dprompt]
    dprompt_k, dprompt_v, dprompt_bias = dprompt
    return (
        None,
        dq,
        dk if of_k else None,
        dv if of_v else None,
        dprompt_k if of_prompt_k else None,
        dprompt_v if of_prompt_v else None,
        dprompt_bias,
        dbias,
    )


_refused_twice: Callable[..., Any] = torch.autograd.function.once_differentiable(_gradients)


def _in_rows(gradient: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """(B, H, N, D) of (T, H, D)."""
    return None if gradient is None else gradient.view(rows, tokens, *gradient.shape[1:]).transpose(1, 2)


def _entering(given: Any, arguments: dict[str, Any]) -> _Given:
    """What the kernels take."""
    q, k, v, prompt_k, prompt_v, prompt_bias, bias = given
    if arguments["cu_seqlens"] is not None:
        q, k, v = q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    if prompt_k.dim() == 3:
        prompt_k, prompt_v = prompt_k[None], prompt_v[None]
        prompt_bias = None if prompt_bias is None else prompt_bias[None]
    return q, k, v, prompt_k, prompt_v, prompt_bias, bias


def _attend(inputs: _Given, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v, prompt_k, prompt_v, prompt_bias, bias = inputs
    few = by_decode(q, arguments["cu_seqlens"], arguments["dropout_p"])
    attend = prompt_decode.prompt_attention_decode if few else prompt_forward.prompt_attention_forward
    return attend(q, k, v, prompt_k, prompt_v, prompt_bias=prompt_bias, bias=bias, **arguments)


def _leaving(output: Tensor, q: Tensor, arguments: dict[str, Any]) -> Tensor:
    """(B, N, H, D) of the kernels' (B, H, N, D) or (T, H, D)."""
    if arguments["cu_seqlens"] is None:
        return output.transpose(1, 2)
    return output.view(q.shape[0], q.shape[2], *output.shape[1:])
