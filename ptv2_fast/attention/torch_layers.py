"""One layer's attention through SDPA, in the layout in which models have it: eager calls alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptv2_fast.attention.prompt_batch import Checked, LayerPrompt
from ptv2_fast.attention.torch_backend import PackedVisible, attend, attend_packed
from ptv2_fast.attention.visible import Visible, visible


def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: LayerPrompt,
    bias: Tensor | None,
    shared: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    checked: Checked,
) -> Tensor:
    """(B, N, H, D), nothing checked, and no gradient for what is empty.

    Args:
        q, k, v: (B, H, N, D) and (B, Hkv, M, D), also where `cu_seqlens` says that the flattened tokens are packed.
        shared, numbers: key_mask, cu_seqlens, prompt_index and prompt_lens; max_seqlen, causal, window, softcap, scale
            and dropout_p.
        checked: of all layers of this forward pass that have the like.
    """
    mask = shared[0]
    # A mask that was written to in between is another one.
    version = None if mask is None or mask.is_inference() else mask._version
    # A bias is a layer's own, and may train.
    found = checked.seen if bias is None and prompt.bias is None else None
    if found is None or found[1] != version:
        found = _seen(q, k, prompt, bias, shared, numbers), version
        if bias is None:
            checked.seen = found
    seen: Visible | PackedVisible = found[0]
    _, _, _, softcap, scale, dropout_p = numbers
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(seen, Visible):
        return attend(q, k, v, prompt.keys, prompt.values, seen, scale, dropout_p, softcap, False)[0].transpose(1, 2)
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    keys, values = prompt.keys, prompt.values
    out = attend_packed(flat_q, flat_k, flat_v, keys, values, seen, scale, dropout_p, softcap, False)[0]
    return out.unflatten(0, (q.shape[0], q.shape[2]))


def _seen(
    q: Tensor,
    k: Tensor,
    prompt: LayerPrompt,
    bias: Tensor | None,
    shared: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
) -> Visible | PackedVisible:
    """What the layer's queries see."""
    key_mask, rows, index, lens = shared
    bank_bias = prompt.bias[None] if prompt.bias is not None and prompt.keys.dim() == 3 else prompt.bias
    sight: dict[str, Any] = {"prompt_lens": lens, "prompt_bias": bank_bias, "causal": numbers[1], "window": numbers[2]}
    length = prompt.keys.shape[-2]
    if rows is not None:
        return PackedVisible.of(q[0].transpose(0, 1), length, index, rows, **sight)
    return visible(q, q.shape[2], k.shape[2], length, index, key_mask, bias, **sight)
