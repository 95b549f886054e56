"""Attention of one layer of a model: `prompt_attention` in the layout of layers, checked once a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention.api import backend_for, prompt_attention
from ptv2_fast.attention.checks import check_arguments
from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch


def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: LayerPrompt,
    batch: PromptBatch,
    *,
    index: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(B, N, H, D): what `prompt_attention` gives, whose other arguments these are.

    Args:
        q, k, v: (B, H, N, D) and (B, Hkv, M, D) of one dtype, also where the batch is packed.
        prompt: of this layer, in that dtype.
        batch: of this forward pass; its layers are alike, and what was found right once is not looked at again.
        index: the bank entry of each row, where the prompt is a bank.

    Raises:
        ValueError, RuntimeError: as `prompt_attention`.
    """
    packed = batch.cu_seqlens is not None
    numbers: dict[str, Any] = {
        "causal": causal, "scale": scale, "dropout_p": dropout_p, "window": window, "softcap": softcap,
    }  # fmt: skip
    tensors: dict[str, Any] = {
        # A packed batch has no padding.
        "key_mask": None if packed else key_mask,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "prompt_index": index,
        "prompt_lens": prompt.lens,
    }
    traced = torch.compiler.is_compiling()
    if not traced and backend_for(batch.backend, q) == "triton" and q.numel() and k.numel() and prompt.keys.numel():
        _check_once(q, k, v, prompt, batch, bias, tensors, numbers)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        given = (q, k, v, prompt.keys, prompt.values, prompt.bias, bias)
        return _by_triton()(*given, {**tensors, **numbers, "scale": scale})
    if packed:
        rows, tokens = q.shape[0], q.shape[2]
        q, k, v = _packed(q), _packed(k), _packed(v)
    out: Any = prompt_attention(
        q,
        k,
        v,
        prompt.keys,
        prompt.values,
        prompt_bias=prompt.bias,
        bias=bias,
        backend=batch.backend,
        **tensors,
        **numbers,
    )
    return out.unflatten(0, (rows, tokens)) if packed else out.transpose(1, 2)


def _packed(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(0, 1)


def _check_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: LayerPrompt,
    batch: PromptBatch,
    bias: Tensor | None,
    tensors: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    """Check the arguments, unless an earlier layer of this forward pass had the like."""
    kept = None if batch.asked is None else batch.asked.checked
    shapes = (
        q.shape, k.shape, v.shape, prompt.keys.shape, prompt.values.shape, q.device, k.device, v.device,
        prompt.keys.device, prompt.values.device, q.dtype, *numbers.values(),
    )  # fmt: skip
    # What the layers have in common is the same object; that it is kept keeps its identity its own.
    shared = (*tensors.values(), bias if bias is None else (bias.shape, bias.dtype, bias.device), prompt.bias is None)
    key = (shapes, *map(id, tensors.values()), shared[-2:])
    if kept is not None and key in kept and prompt.bias is None:
        return
    if batch.cu_seqlens is not None:
        q, k, v = _packed(q), _packed(k), _packed(v)
    others = {name: value for name, value in {**tensors, **numbers}.items() if name != "causal"}
    check_arguments(q, k, v, prompt.keys, prompt.values, prompt_bias=prompt.bias, bias=bias, **others)
    if kept is not None:
        kept[key] = shared


@functools.cache
def _by_triton() -> Callable[..., Tensor]:
    """Imported when it is first needed."""
    from ptv2_fast.attention.triton_layers import layer_attention as by_triton

    return by_triton
