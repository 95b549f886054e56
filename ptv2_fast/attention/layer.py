"""Attention of one layer of a model: `prompt_attention` in the layout of layers, checked once a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention import torch_layers
from ptv2_fast.attention.api import backend_for, prompt_attention
from ptv2_fast.attention.checks import check_arguments
from ptv2_fast.attention.prompt_batch import Checked, LayerPrompt, PromptBatch

# The arguments of `prompt_attention` that all layers of a pass share, and its numbers.
_SHARED = ("key_mask", "cu_seqlens", "prompt_index", "prompt_lens")
_NUMBERS = ("max_seqlen", "causal", "window", "softcap", "scale", "dropout_p")


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
    # A packed batch has no padding.
    shared = (None if packed else key_mask, batch.cu_seqlens, index, prompt.lens)
    numbers = (batch.max_seqlen, causal, window, softcap, scale, dropout_p)
    checked = None if torch.compiler.is_compiling() else _checked(q, k, v, prompt, batch, bias, shared, numbers)
    if checked is not None and checked.backend == "torch":
        return torch_layers.layer_attention(q, k, v, prompt, bias, shared, numbers, checked)
    if checked is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        numbers = (batch.max_seqlen, causal, window, softcap, scale, dropout_p)
        return _by_triton()(q, k, v, prompt.keys, prompt.values, prompt.bias, bias, shared, numbers)
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
        **_named(shared, numbers),
    )
    return out.unflatten(0, (rows, tokens)) if packed else out.transpose(1, 2)


def _named(shared: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((*_SHARED, *_NUMBERS), (*shared, *numbers), strict=True))


def _packed(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(0, 1)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: LayerPrompt,
    batch: PromptBatch,
    bias: Tensor | None,
    shared: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
) -> Checked | None:
    """What is known of arguments that are right, where a backend has a way of its own for layers; None where none has.

    An earlier layer of this forward pass that had the like answers for it.
    """
    kept = None if batch.asked is None or prompt.bias is not None else batch.asked.checked
    keys, values = prompt.keys, prompt.values
    empty = not keys.numel()
    if empty and any(x is not None and x.requires_grad for x in (keys, values, prompt.bias)):
        return None  # its gradient of zeros is made elsewhere
    # What the layers have in common is the same object; that it is kept keeps its identity its own.
    key = (
        q.shape, k.shape, v.shape, keys.shape, values.shape, q.device, k.device, v.device, keys.device, values.device,
        q.dtype, numbers, *map(id, shared), None if bias is None else (bias.shape, bias.dtype, bias.device),
    )  # fmt: skip
    known = None if kept is None else kept.get(key)
    if known is not None:
        return known
    backend = backend_for(batch.backend, q)
    if backend == "reference" or (backend == "triton" and empty) or not (q.numel() and k.numel()):
        return None
    if batch.cu_seqlens is not None:
        q, k, v = _packed(q), _packed(k), _packed(v)
    others = _named(shared, numbers)
    del others["causal"]
    check_arguments(q, k, v, keys, values, prompt_bias=prompt.bias, bias=bias, **others)
    checked = Checked(backend, shared)
    return checked if kept is None else kept.setdefault(key, checked)


@functools.cache
def _by_triton() -> Callable[..., Tensor]:
    """Imported when it is first needed."""
    from ptv2_fast.attention.triton_layers import layer_attention as by_triton

    return by_triton
