"""What `prompt_attention` refuses, and the words it refuses with."""

from __future__ import annotations

import torch
from torch import Tensor

from ptv2_fast.choices import BACKENDS as BACKENDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def check_arguments(
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
    scale: float | None,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Raise ValueError where the arguments of `prompt_attention` disagree; see there for the contract."""
    _check_text(q, k, v, packed=cu_seqlens is not None)
    _check_prompt(q, k, prompt_k, prompt_v)
    _check_rows(q, prompt_k, cu_seqlens, max_seqlen, prompt_index, prompt_lens)
    _check_additions(q, k, prompt_k, key_mask, cu_seqlens, prompt_bias, bias)
    if scale is not None and not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive or None; got {scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None; got {window}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive or None; got {softcap}")


def _check_text(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    rank, form = (3, "(T, H, D) with cu_seqlens") if packed else (4, "(B, H, N, D) without cu_seqlens")
    if q.dim() != rank:
        raise ValueError(f"q must be {form}; got {_shape(q)}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64; got {q.dtype}")
    if k.dim() != rank:
        raise ValueError(f"k must have {rank} dimensions like q; got {_shape(k)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {_shape(k)}; got {_shape(v)}")
    same = (0, -1)  # batch (packed: tokens) and head size
    if any(q.shape[i] != k.shape[i] for i in same):
        raise ValueError(f"k must agree with q {_shape(q)} in dimensions 0 and -1; got {_shape(k)}")
    heads, kv_heads = q.shape[-2 if packed else 1], k.shape[-2 if packed else 1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k must have a number of heads that divides q's {heads}; got {kv_heads}")
    _check_like("k", k, q)
    _check_like("v", v, q)


def _check_prompt(q: Tensor, k: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    kv_heads = k.shape[1]
    expected = f"({kv_heads}, P, {q.shape[-1]}) or (R, {kv_heads}, P, {q.shape[-1]})"
    fits = prompt_k.dim() in (3, 4) and prompt_k.shape[-3] == kv_heads
    if not fits or prompt_k.shape[-1] != q.shape[-1]:
        raise ValueError(f"prompt_k must be {expected}; got {_shape(prompt_k)}")
    if prompt_v.shape != prompt_k.shape:
        raise ValueError(f"prompt_v must have the shape of prompt_k, {_shape(prompt_k)}; got {_shape(prompt_v)}")
    _check_like("prompt_k", prompt_k, q)
    _check_like("prompt_v", prompt_v, q)


def _check_rows(
    q: Tensor,
    prompt_k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    prompt_index: Tensor | None,
    prompt_lens: Tensor | None,
) -> None:
    """Row boundaries, and which prompt each row uses."""
    rows = q.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be int32 of shape (S + 1,); got {cu_seqlens.dtype} {_shape(cu_seqlens)}")
        _check_device("cu_seqlens", cu_seqlens, q)
        rows = cu_seqlens.numel() - 1
        if readable(cu_seqlens):
            steps = cu_seqlens.diff()
            if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != q.shape[0] or bool((steps < 0).any()):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the number of tokens, {q.shape[0]}; got {cu_seqlens.tolist()}"
                )
            longest = int(steps.max()) if rows else 0
            if max_seqlen is not None and max_seqlen < longest:
                raise ValueError(f"max_seqlen must be at least the longest row's {longest}; got {max_seqlen}")
    bank = prompt_k.dim() == 4
    if bank != (prompt_index is not None):
        raise ValueError(
            "prompt_index must be given exactly when prompt_k is a bank (R, Hkv, P, D); got "
            f"prompt_k {_shape(prompt_k)} and prompt_index "
            f"{'None' if prompt_index is None else _shape(prompt_index)}"
        )
    entries = prompt_k.shape[0] if bank else 1
    if prompt_index is not None:
        _check_integers("prompt_index", prompt_index, (rows,), q)
        _check_range("prompt_index", prompt_index, 0, entries - 1)
    if prompt_lens is not None:
        _check_integers("prompt_lens", prompt_lens, (entries,), q)
        _check_range("prompt_lens", prompt_lens, 0, prompt_k.shape[-2])


def _check_additions(
    q: Tensor,
    k: Tensor,
    prompt_k: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
) -> None:
    """The mask and the two biases."""
    if key_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("key_mask must be None with cu_seqlens: a packed batch has no padding")
        expected = (k.shape[0], k.shape[2])
        if key_mask.shape != expected or key_mask.dtype not in (torch.bool, *_INTEGERS):
            raise ValueError(
                f"key_mask must be bool or integer of shape {expected}; got {key_mask.dtype} {_shape(key_mask)}"
            )
        _check_device("key_mask", key_mask, q)
    if prompt_bias is not None:
        heads = q.shape[1]
        expected = (*prompt_k.shape[:-3], heads, prompt_k.shape[-2])
        if prompt_bias.shape != expected or not prompt_bias.is_floating_point():
            raise ValueError(
                f"prompt_bias must be floating point of shape {expected}; got {prompt_bias.dtype} {_shape(prompt_bias)}"
            )
        _check_device("prompt_bias", prompt_bias, q)
    if bias is not None:
        if cu_seqlens is not None:
            raise ValueError("bias must be None with cu_seqlens")
        batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        fits = (
            bias.dim() == 4
            and bias.shape[0] in (1, batch)
            and bias.shape[1] in (1, heads)
            and bias.shape[2:] == (queries, keys)
        )
        if not fits or not bias.is_floating_point():
            raise ValueError(
                f"bias must be floating point of shape (1 or {batch}, 1 or {heads}, {queries}, {keys}); "
                f"got {bias.dtype} {_shape(bias)}"
            )
        _check_device("bias", bias, q)


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} must have q's dtype, {q.dtype}; got {tensor.dtype}")
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}; got {tensor.device}")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be integers of shape {shape}; got {tensor.dtype} {_shape(tensor)}")
    _check_device(name, tensor, q)


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if not readable(tensor) or tensor.numel() == 0:
        return
    values = tensor.long()  # PyTorch compares few unsigned integers
    if int(values.min()) < low or int(values.max()) > high:
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {tensor.tolist()}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: not on a device (a sync), not while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
