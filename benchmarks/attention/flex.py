"""FlexAttention as a peer: keys concatenated, or two calls merged by their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs
from benchmarks.attention.provider import Call, Provider, join_prompt

_SHAPES = 64
_NAMES = ("q", "k", "v", "prompt_k", "prompt_v")


def flex_providers() -> list[Provider]:
    """Both forms; each shape compiles once, so they run in the cells marked for them only."""
    return [
        Provider(
            "flex_concat",
            "torch.compile(flex_attention, dynamic=False)(q, cat([prompt, k]), cat([prompt, v]),"
            " block_mask=prebuilt, enable_gqa=); concatenation inside the timing",
            _refuses,
            _build_concat,
            peers=("flex",),
        ),
        Provider(
            "flex_split",
            "one compiled function: flex_attention over the prompt and over the text, each with"
            " return_aux=AuxRequest(lse=True), merged by log-sum-exp",
            lambda case, device: _refuses(case, device) or (None if case.P else "there is no prompt"),
            _build_split,
            peers=("flex",),
        ),
    ]


def _refuses(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "its CPU form has no backward pass: needs a CUDA device"


def text_mask(case: Case, inputs: Inputs, prompt_length: int):
    """The block mask of `prompt_length` prompt keys and the text's, or None where all is visible."""
    if not case.causal and inputs.key_mask is None:
        return None
    lengths = inputs.real.sum(1)

    def visible(row, head, query, slot):
        key = slot - prompt_length
        seen = key < lengths[row]
        if case.causal:
            seen = seen & (key <= query)
        return seen | (slot < prompt_length)

    batch = case.B if inputs.key_mask is not None else None
    keys = prompt_length + case.N
    return create_block_mask(visible, batch, None, case.N, keys, device=inputs.q.device)


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """The softmax over both key sets from the two softmaxes: weights exp(lse_i - lse) on outputs.

    Args:
        first, second: (B, H, N, d).
        first_lse, second_lse: (B, H, N), natural logarithm.
    """
    lse = torch.logaddexp(first_lse, second_lse)
    weights = ((one - lse).exp()[..., None] for one in (first_lse, second_lse))
    total = sum(weight * out.float() for weight, out in zip(weights, (first, second), strict=False))
    return total.to(first.dtype)


def compile_shape(function):
    """One compilation for each shape: more of them than Dynamo allows by default."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    return torch.compile(function, dynamic=False, fullgraph=True)


def _build_concat(case: Case, inputs: Inputs, compile=compile_shape) -> Call:
    block_mask = text_mask(case, inputs, case.P)
    leaves = _leaves(case, inputs)
    gqa = case.group > 1

    def attend(q, k, v, prompt_k, prompt_v):
        keys, values = join_prompt(prompt_k, k, 1), join_prompt(prompt_v, v, 1)
        return flex_attention(q, keys, values, block_mask=block_mask, enable_gqa=gqa)

    return _call(compile(attend), leaves, inputs)


def _build_split(case: Case, inputs: Inputs, compile=compile_shape) -> Call:
    block_mask = text_mask(case, inputs, 0)
    leaves = _leaves(case, inputs)
    gqa = case.group > 1
    wants = AuxRequest(lse=True)

    def attend(q, k, v, prompt_k, prompt_v):
        shared = (x.expand(q.shape[0], -1, -1, -1) for x in (prompt_k, prompt_v))
        first, one = flex_attention(q, *shared, enable_gqa=gqa, return_aux=wants)
        second, two = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, return_aux=wants)
        return merge(first, one.lse, second, two.lse)

    return _call(compile(attend), leaves, inputs)


def _leaves(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    parts = (inputs.q, inputs.k, inputs.v, inputs.prompt_k, inputs.prompt_v)
    return tuple(x.detach().requires_grad_(case.gradients) for x in parts)


def _call(attend, leaves: tuple[Tensor, ...], inputs: Inputs) -> Call:
    return Call(
        forward=lambda: attend(*leaves),
        leaves=leaves,
        grad_out=inputs.grad_out,
        common=lambda out, grads: {"out": out, **dict(zip(_NAMES, grads, strict=False))},
    )
