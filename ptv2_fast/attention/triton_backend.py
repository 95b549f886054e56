"""Prompt attention through the Triton kernels: autograd, and custom ops for torch.compile.

Eager calls launch the kernels from a `torch.autograd.Function`: a custom op's dispatch costs more
host time than the launch itself, and of a kind that was launched before only the launches are made
again (`kernels.repeat`). Under torch.compile the same two host functions stand behind
`ptv2_fast::prompt_attention_forward` and `_backward`, which the compiler sees as opaque ops with
known shapes and a known gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ptv2_fast.kernels.prompt_backward import Gradients

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# From how few queries a row on the keys, not the queries, are what is split among programs. Not
# measured yet.
DECODE_QUERIES = 16

# Positions of the inputs that may need a gradient.
_Q, _K, _V, _PROMPT_K, _PROMPT_V, _PROMPT_BIAS, _BIAS = range(7)
_TRAINED = 7

# What both ops are given: `_GIVEN` tensors that forward and backward name, then `_REST`, of which the first are
# tensors too.
_GIVEN, _TENSORS = 6, 12
_GIVEN_SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, Tensor? prompt_bias"
_REST_SCHEMA = (
    "Tensor? bias, Tensor? key_mask, Tensor? cu_seqlens, Tensor? prompt_index, Tensor? prompt_lens, Tensor? seed, "
    "SymInt? max_seqlen, bool causal, SymInt? window, float? softcap, float scale, float dropout_p"
)
# The names of the rest, which are those of the kernels' keyword arguments.
_REST = tuple(argument.split()[1] for argument in _REST_SCHEMA.split(", "))


def unavailable_reason(device: torch.device | str) -> str | None:
    """Why Triton cannot serve tensors on `device`, or None where it can."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    device = torch.device(device)
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"there are no Triton kernels for device type {device.type!r}"
    if os.environ.get("TRITON_INTERPRET") == "1" and _interpreted():
        return None
    return "the tensors are on the CPU, where Triton only runs interpreted (start Python with TRITON_INTERPRET=1)"


def check_available(device: torch.device | str) -> None:
    """Raise RuntimeError, naming the argument and the way out, where Triton cannot serve tensors on `device`."""
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(f"backend='triton' cannot serve this call: {reason}; backend='torch' runs anywhere")


def _interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: its own functions are compiled for ever otherwise."""
    import triton
    import triton.language as tl

    return not isinstance(tl.cdiv, triton.JITFunction)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    prompt_index: Tensor | None,
    prompt_lens: Tensor | None,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Serve the contract of `ptv2_fast.attention.prompt_attention`, its arguments checked and the prompt a bank.

    The sizes, dtypes and strides accepted are those of
    `ptv2_fast.kernels.prompt_forward.prompt_attention_forward`.
    """
    seed = None
    if dropout_p > 0.0:
        # One draw from the device's generator a call: torch.manual_seed and CUDA-graph replay
        # govern it.
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    tensors = (q, k, v, prompt_k, prompt_v, prompt_bias, bias, key_mask, cu_seqlens, prompt_index, prompt_lens, seed)
    numbers = (max_seqlen, causal, window, softcap, float(scale), float(dropout_p))
    if torch.compiler.is_compiling():
        output, lse = forward_op(*tensors, *numbers)
    else:
        output, lse = _PromptAttention.apply(*tensors, *numbers)
    return (output, lse) if return_lse else output


def by_decode(q: Tensor, cu_seqlens: Tensor | None, dropout_p: float) -> bool:
    """Whether the kernel for few queries serves the forward pass."""
    return cu_seqlens is None and dropout_p == 0.0 and q.shape[2] <= DECODE_QUERIES


def launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(o, lse) of the op's arguments."""
    attended, _ = _repeated()
    made: tuple[Tensor, Tensor] = attended(arguments[_TENSORS:], *arguments[:_TENSORS])
    return made


@functools.cache
def _repeated() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of (numbers, *tensors) whose launches are repeated; made where Triton serves."""
    from ptv2_fast.kernels.repeat import Repeated

    return Repeated(_attended), Repeated(_differentiated)


def _attended(
    numbers: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_bias: Tensor | None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor]:
    arguments = dict(zip(_REST, (*rest, *numbers), strict=True))
    # Both functions give the same (o, lse), so what needs a gradient may take the short road as well.
    if by_decode(q, arguments["cu_seqlens"], arguments["dropout_p"]):
        from ptv2_fast.kernels.prompt_decode import prompt_attention_decode as attend
    else:
        from ptv2_fast.kernels.prompt_forward import prompt_attention_forward as attend
    return attend(q, k, v, prompt_k, prompt_v, prompt_bias=prompt_bias, **arguments)


def launch_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the trained inputs.

    Args:
        arguments: those of the backward op: tensors, which gradients are asked for, other tensors and the numbers.
    """
    _, differentiated = _repeated()
    given, needs, rest = arguments[: _GIVEN + 2], arguments[_GIVEN + 2], arguments[_GIVEN + 3 :]
    others = _TENSORS - _GIVEN
    made: tuple[Tensor | None, ...] = differentiated((tuple(needs), rest[others:]), grad_output, *given, *rest[:others])
    return made


def _differentiated(
    asked_for: tuple[tuple[bool, ...], tuple[Any, ...]],
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *rest: Tensor | None,
) -> Gradients:
    from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward

    needs, numbers = asked_for

    asked = Needs(
        query=needs[_Q],
        text=needs[_K] or needs[_V],
        prompt=needs[_PROMPT_K] or needs[_PROMPT_V],
        prompt_bias=needs[_PROMPT_BIAS],
        bias=needs[_BIAS],
    )
    arguments = dict(zip(_REST, (*rest, *numbers), strict=True))
    return prompt_attention_backward(
        grad_output, q, k, v, prompt_k, prompt_v, output, lse, needs=asked, prompt_bias=prompt_bias, **arguments
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the tensors, o and lse among them, in the order in which `_backward` takes them."""
    ctx.save_for_backward(*inputs[:_GIVEN], *output, *inputs[_GIVEN:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[1])


class _PromptAttention(torch.autograd.Function):
    """The eager path: saves the inputs, o and lse, and launches only the passes that are asked for."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = launch_forward(*arguments)
        _save_for_backward(ctx, arguments, output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * (len(ctx.needs_input_grad) - _TRAINED)
        if grad_output is None:
            return (None,) * _TRAINED + none
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_TRAINED]
        grads = launch_backward(grad_output, *saved[: _GIVEN + 2], needs, *saved[_GIVEN + 2 :], *ctx.numbers)
        asked = (grad if need else None for grad, need in zip(grads, needs, strict=False))
        return (*asked, *none)


@torch.library.custom_op(
    "ptv2_fast::prompt_attention_forward",
    mutates_args=(),
    schema=f"({_GIVEN_SCHEMA}, {_REST_SCHEMA}) -> (Tensor, Tensor)",
)
def forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`prompt_attention_forward` for the compiler: (o, lse)."""
    return launch_forward(*arguments)


@forward_op.register_fake
def _forward_shapes(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rest = dict(zip(_REST, others[_GIVEN - 1 :], strict=True))
    packed = rest["cu_seqlens"] is not None
    *rows, tokens = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    # The forward kernel's rows of lse begin at multiples of 16 (`launch.allocate_statistics`).
    width = tokens if by_decode(q, rest["cu_seqlens"], rest["dropout_p"]) else (tokens + 15) // 16 * 16
    return _empty_like_heads(q, packed), q.new_empty((*rows, width), dtype=torch.float32)[..., :tokens]


@torch.library.custom_op(
    "ptv2_fast::prompt_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_GIVEN_SCHEMA}, Tensor output, Tensor lse, bool[] needs, {_REST_SCHEMA})"
    " -> Tensor[]",
)
def backward_op(grad_output: Tensor, q: Tensor, *others: Any) -> list[Tensor]:
    """`prompt_attention_backward` for the compiler: seven gradients, empty (size 0) where nobody asked."""
    needs = others[_GIVEN + 1]
    grads = launch_backward(grad_output, q, *others)
    return [q.new_empty(0) if grad is None or not need else grad for grad, need in zip(grads, needs, strict=False)]


@backward_op.register_fake
def _backward_shapes(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_bias: Any,
    output: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *rest: Any,
) -> list[Tensor]:
    arguments = dict(zip(_REST, rest, strict=True))
    packed, bias = arguments["cu_seqlens"] is not None, arguments["bias"]
    fresh = (
        lambda: _empty_like_heads(q, packed),
        lambda: _empty_like_heads(k, packed),
        lambda: _empty_like_heads(v, packed),
        lambda: _empty_like_prompts(prompt_k),
        # Both are laid out as the keys are.
        lambda: _empty_like_prompts(prompt_k),
        lambda: prompt_bias.new_empty(prompt_bias.shape),
        lambda: bias.new_empty(bias.shape),
    )
    return [make() if need else q.new_empty(0) for make, need in zip(fresh, needs, strict=False)]


def _empty_like_heads(tensor: Tensor, packed: bool) -> Tensor:
    """What the kernels allocate: (B, H, N, d) laid out as (B, N, H, d), or (T, H, d) contiguous."""
    if packed:
        return tensor.new_empty(tensor.shape)
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _empty_like_prompts(prompt_k: Tensor) -> Tensor:
    """What the kernels allocate for gradients of prompts, `launch.prompt_strides`."""
    if prompt_k.transpose(1, 2).is_contiguous():
        entries, heads, length, head_dim = prompt_k.shape
        return prompt_k.new_empty(entries, length, heads, head_dim).transpose(1, 2)
    return prompt_k.new_empty(prompt_k.shape)


def _compiled_backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TRAINED])
    grads = backward_op(grad_output, *saved[: _GIVEN + 2], needs, *saved[_GIVEN + 2 :], *ctx.numbers)
    return (
        *(grad if need else None for grad, need in zip(grads, needs, strict=False)),
        *((None,) * (len(ctx.needs_input_grad) - _TRAINED)),
    )


forward_op.register_autograd(_compiled_backward, setup_context=_save_for_backward)
