"""One layer's attention through the Triton kernels, in the layout in which models have it: eager calls alone.

What turns that layout into the kernels' is done where autograd does not look, and undone for the gradients: a model has
many layers, and each operation that autograd notes costs the host more than one that it does not. From layer to layer
only addresses change, so what a layer does is repeated. Imported only where Triton serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention.triton_backend import by_decode
from ptv2_fast.kernels import prompt_backward, prompt_decode, prompt_forward
from ptv2_fast.kernels.gradient_layout import Order, column_order
from ptv2_fast.kernels.repeat import Repeated

# What comes after queries, keys, values and the prompt's keys and values, by the names that the kernels have for it.
_ADDED = ("prompt_bias", "bias")
_SHARED = ("key_mask", "cu_seqlens", "prompt_index", "prompt_lens")
_NUMBERS = ("max_seqlen", "causal", "window", "softcap", "scale", "dropout_p")
_TENSORS = (*_ADDED, *_SHARED, "seed")

_Optional = Tensor | None


def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
    shared: tuple[_Optional, _Optional, _Optional, _Optional],
    numbers: tuple[int | None, bool, int | None, float | None, float, float],
) -> Tensor:
    """(B, N, H, D), nothing checked and nothing empty.

    Args:
        q, k, v: (B, H, N, D) and (B, Hkv, M, D), also where `cu_seqlens` says that the flattened tokens are packed.
        prompt_k, prompt_v, prompt_bias: with or without a bank's first axis.
        shared: key_mask, cu_seqlens, prompt_index and prompt_lens of `kernels.prompt_forward.prompt_attention_forward`.
        numbers: its max_seqlen, causal, window, softcap, scale and dropout_p.
    """
    seed = None
    if numbers[-1] > 0.0:
        # One draw from the device's generator a call: torch.manual_seed and CUDA-graph replay govern it.
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    given = (q, k, v, prompt_k, prompt_v, prompt_bias, bias)
    if torch.is_grad_enabled():
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                out: Tensor = _LayerAttention.apply(numbers, (*shared, seed), *given)
                return out
    made: Any = _attended(numbers, *given, *shared, seed)[0]
    return made


class _LayerAttention(torch.autograd.Function):
    """Saves the kernels' inputs, o and lse; backward launches only the passes that are asked for."""

    @staticmethod
    def forward(ctx: Any, numbers: tuple[Any, ...], rest: tuple[_Optional, ...], *given: Any) -> Tensor:
        output: Any
        output, lse = _attended(numbers, *given, *rest)
        ctx.save_for_backward(*given, *rest, output, lse)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of gradients is asked for, and refused where it is used
            twice: tuple[Tensor | None, ...] = _refused_twice(ctx, grad)
            return twice
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
    of_q, of_k, of_v, *_, of_bias = needs
    # A bias that trains is made of queries and keys: their gradients are sums, which lie elsewhere.
    order = column_order(*saved[:3]) if of_q and of_k and of_v and not of_bias else None
    return None, None, *_differentiated((ctx.numbers, needs, order), grad, *saved)


_refused_twice: Callable[..., Any] = torch.autograd.function.once_differentiable(_gradients)


@Repeated
def _attended(
    numbers: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, *rest: _Optional
) -> tuple[Tensor, Tensor]:
    """o (B, N, H, D) and what the kernels give as lse.

    Args:
        numbers, rest: by the names `_NUMBERS` and `_TENSORS`.
    """
    arguments = _arguments(numbers, rest, prompt_k)
    inputs = _entering(q, k, v, prompt_k, prompt_v, arguments["cu_seqlens"])
    few = by_decode(inputs[0], arguments["cu_seqlens"], arguments["dropout_p"])
    attend = prompt_decode.prompt_attention_decode if few else prompt_forward.prompt_attention_forward
    output, lse = attend(*inputs, **arguments)
    packed = arguments["cu_seqlens"] is not None
    output = output.view(*q.shape[::2], *output.shape[1:]) if packed else output.transpose(1, 2)
    # To autograd this is no view of what was made here.
    return output.detach(), lse


@Repeated
def _differentiated(
    given: tuple[tuple[Any, ...], tuple[bool, ...], Order | None],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *others: _Optional,
) -> tuple[_Optional, ...]:
    """The gradients of q, k, v, prompt_k, prompt_v, prompt_bias and bias; None where nobody asks.

    Args:
        given: numbers as above, of which of them a gradient is asked for, and, if that includes q, k and v, in which
            order theirs are the columns of one buffer, or None.
        grad: of o, (B, N, H, D).
        others: rest as above, then o and lse.
    """
    numbers, (of_q, of_k, of_v, of_prompt_k, of_prompt_v, of_prompt_bias, of_bias), order = given
    *rest, output, lse = others
    assert output is not None and lse is not None
    arguments = _arguments(numbers, rest, prompt_k)
    cu_seqlens = arguments["cu_seqlens"]
    packed = cu_seqlens is not None
    dq, dk, dv, *dprompt, dbias = prompt_backward.prompt_attention_backward(
        grad.flatten(0, 1) if packed else grad.transpose(1, 2),
        *_entering(q, k, v, prompt_k, prompt_v, cu_seqlens),
        output.flatten(0, 1) if packed else output.transpose(1, 2),
        lse,
        needs=prompt_backward.Needs(of_q, of_k or of_v, of_prompt_k or of_prompt_v, of_prompt_bias, of_bias),
        order=order,
        **arguments,
    )
    if packed:
        rows, tokens = q.shape[0], q.shape[2]
        dq, dk, dv = _in_rows(dq, rows, tokens), _in_rows(dk, rows, tokens), _in_rows(dv, rows, tokens)
    if prompt_k.dim() == 3:
        dprompt = [None if x is None else x[0] for x in dprompt]
    dprompt_k, dprompt_v, dprompt_bias = dprompt
    return (
        dq,
        dk if of_k else None,
        dv if of_v else None,
        dprompt_k if of_prompt_k else None,
        dprompt_v if of_prompt_v else None,
        dprompt_bias,
        dbias,
    )


def _arguments(numbers: tuple[Any, ...], rest: Any, prompt_k: Tensor) -> dict[str, Any]:
    """The keyword arguments of the kernels' host functions."""
    arguments = {**dict(zip(_TENSORS, rest, strict=True)), **dict(zip(_NUMBERS, numbers, strict=True))}
    if prompt_k.dim() == 3 and arguments["prompt_bias"] is not None:
        arguments["prompt_bias"] = arguments["prompt_bias"][None]
    return arguments


def _entering(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the kernels take."""
    if cu_seqlens is not None:
        q, k, v = q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    if prompt_k.dim() == 3:
        prompt_k, prompt_v = prompt_k[None], prompt_v[None]
    return q, k, v, prompt_k, prompt_v


def _in_rows(gradient: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """(B, H, N, D) of (T, H, D)."""
    return None if gradient is None else gradient.view(rows, tokens, *gradient.shape[1:]).transpose(1, 2)
