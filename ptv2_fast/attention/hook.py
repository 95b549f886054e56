"""Prompt attention as an attention implementation of transformers, under the name "ptv2_fast".

transformers calls `attention_forward` with queries, keys and values after projection, normalisation
and rotary embedding, and `attention_mask` wherever a model asks for a mask. Nothing in transformers
is patched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.layer import layer_attention
from ptv2_fast.attention.paged import Pages
from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch

IMPLEMENTATION = "ptv2_fast"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    score_bias: Tensor | None = None,
    ptv2_prompts: PromptBatch | None = None,
    ptv2_record: deque[tuple[Tensor, Tensor]] | None = None,
    ptv2_pages: Pages | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve one attention layer of a transformers model, with the prompt that the call carries.

    Args:
        module: the attention module; its `layer_idx` picks the layer's prompt where the call carries several.
        query: (B, H, N, D); key, value: (B, Hkv, M, D).
        attention_mask: what `padding_mask` returned: None, (B, M) bool, or (B, 1, N, M) bool or
            additive.
        position_bias, score_bias: (1 or B, H, N, M), added to the text's scores: a frozen one (T5), and one made
            of queries and keys that needs its gradient (DeBERTa). At most one of them is given.
        ptv2_prompts: the prompts of this forward pass; None runs the layer without any.
        ptv2_record: to which (key, value) of every layer is appended.
        ptv2_pages: where the text's keys are; the batch is rows one behind the other then, and needs no mask.

    Returns:
        (B, N, H, D) and None, since attention weights are never materialised.
    """
    dtype = autocast_dtype(query.device) or query.dtype
    if query.dtype != dtype or key.dtype != dtype or value.dtype != dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if ptv2_record is not None:
        ptv2_record.append((key, value))

    batch = ptv2_prompts or PromptBatch(layers=())
    if ptv2_pages is not None:
        numbers: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "window": sliding_window, "softcap": softcap}
        prompt = _prompt_of(batch, module, key)
        return ptv2_pages.attend(module.layer_idx, query, key, value, prompt, **numbers), None
    if not batch.windowed and attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = None  # virtual tokens have no padding: the mask could only hold a window
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    # Under gradient checkpointing T5 marks the zeros that stand for no bias as trainable; the base is frozen.
    bias = position_bias.detach() if position_bias is not None else score_bias
    bias = None if bias is None else bias.to(dtype)
    key_mask = attention_mask
    if attention_mask is not None and attention_mask.dim() == 4:
        # Such a mask already holds causality, windows and whatever else the model asked for.
        bias = _additive(attention_mask, dtype) if bias is None else bias + _additive(attention_mask, dtype)
        key_mask, causal, sliding_window = None, False, None
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], key.shape[2])

    if batch.cu_seqlens is not None and bias is not None:
        raise ValueError(
            f"a packed batch must need no mask but row boundaries; got {type(module).__name__} with a mask or bias of "
            f"shape {tuple(bias.shape)}"
        )
    window = sliding_window if batch.windowed else None
    if window is not None and not causal:
        # transformers counts as flash attention does, where a window of 1 is the token itself on either side.
        window -= 1
    prompt = _prompt_of(batch, module, key)
    index = batch.index if prompt.keys.dim() == 4 else None
    out = layer_attention(
        query,
        key,
        value,
        prompt,
        batch,
        index=index,
        key_mask=key_mask,
        bias=bias,
        causal=causal,
        scale=scaling,
        dropout_p=dropout,
        window=window,
        softcap=softcap,
    )
    return out, None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Hand the tokenizer's own 2-D mask through, so that no extended mask is built.

    Only where a layer's visibility is more than padding, causality and a sliding window is the 4-D mask built that
    transformers builds for SDPA: custom mask functions, and several queries against a static cache.

    Returns:
        None, (B, M) bool, or (B, 1, N, M) bool.
    """
    # The queries stand at the end of the keys: what "causal" means to prompt_attention.
    at_end = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    # A single query sees every key written so far; in a static cache those are the ones up to its
    # own position.
    single = q_length == 1 and mask_function is causal_mask_function
    # Without a direction it does not matter where the queries stand: a decoder's look at its encoder's states.
    anywhere = mask_function is bidirectional_mask_function
    if use_vmap or not _is_plain(mask_function) or not (at_end or single or anywhere):
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )
    mask = None
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[-1]
        if missing > 0:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
        mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if single and not at_end:
        device = kwargs.get("device") or getattr(q_offset, "device", None)
        written = torch.arange(kv_length, device=device)[None, :] + kv_offset <= q_offset
        mask = written.expand(batch_size, -1) if mask is None else mask & written
    if mask is not None and mask.is_cuda and q_length > 1 and not torch.compiler.is_compiling():
        mask = _even_rows(mask)
    return mask


def _even_rows(mask: Tensor) -> Tensor:
    """A (B, M) mask with rows that begin at multiples of 16.

    Triton compiles a kernel once for strides that are such multiples and once for others: a batch of another M would
    stop a training run for seconds. One copy a forward pass, none where M is a multiple.
    """
    keys = mask.shape[1]
    missing = -keys % 16
    return torch.nn.functional.pad(mask, (0, missing))[:, :keys] if missing else mask


def check_served(inputs: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Refuse what needs the attention weights as a tensor: no backend makes one.

    Args:
        inputs: keyword arguments of a model's forward.
        config: the model's configuration.

    Raises:
        ValueError: output_attentions or head_mask is asked for.
    """
    asked = inputs.get("output_attentions", getattr(config, "output_attentions", False))
    if asked:
        raise ValueError(
            f"output_attentions must be False: attention weights are never materialised with prompts; got {asked!r}. "
            "The bare base returns them (unload, then set_attn_implementation('eager'))"
        )
    if inputs.get("head_mask") is not None:
        raise ValueError("head_mask must be None: attention weights are never materialised, so no head can be masked")


def register() -> None:
    """Make "ptv2_fast" an attention implementation of transformers, once or many times.

    Both halves are needed: with the attention function alone transformers would silently drop the
    padding mask.
    """
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


def _is_plain(mask_function: Callable[..., Any]) -> bool:
    """Whether visibility is causal or bidirectional, with or without the layer's own sliding window."""
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return True
    if torch.compiler.is_compiling():
        return False  # the compiler cannot look into a closure
    # A window arrives as a closure over (window overlay, base function). What cannot be recognised
    # is not plain: it takes the way of the 4-D mask, which is always right.
    cells = getattr(mask_function, "__closure__", None) or ()
    parts = next((c.cell_contents for c in cells if isinstance(c.cell_contents, tuple)), ())
    if len(parts) != 2 or not mask_function.__qualname__.startswith("and_masks."):
        return False
    overlay, base = parts
    window = overlay.__qualname__.split(".")[0]
    return (window, base) in (
        ("sliding_window_overlay", causal_mask_function),
        ("sliding_window_bidirectional_overlay", bidirectional_mask_function),
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4-D mask as numbers to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _prompt_of(batch: PromptBatch, module: nn.Module, key: Tensor) -> LayerPrompt:
    """The prompt of an attention module in the dtype of its keys; an empty one where it has none."""
    prompt, dtype = batch.of(module), key.dtype
    if prompt is None:
        return _empty_prompt(key)
    if prompt.keys.dtype == dtype and prompt.values.dtype == dtype:
        return prompt
    return LayerPrompt(prompt.keys.to(dtype), prompt.values.to(dtype), prompt.bias, prompt.lens)


def _empty_prompt(key: Tensor) -> LayerPrompt:
    nothing = key.new_empty(key.shape[1], 0, key.shape[3])
    return LayerPrompt(nothing, nothing)
