"""The public function: its contract, and the choice of the backend that serves it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptv2_fast.attention.checks import BACKENDS, check_arguments


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    prompt_index: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    prompt_bias: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a prompt shared by the batch, followed by each row's own keys.

        out = softmax(scale * q [prompt_k ; k]^T) [prompt_v ; v]

    It is one softmax. Masks, causality and windows apply to the text's keys only: every query sees the whole prompt.

    What is hidden reaches nothing, be it NaN or infinite: neither a result nor a gradient depends on text keys and
    values where `key_mask` is zero, on prompt keys and values past `prompt_lens`, on the biases of both, or on another
    row of the batch. Their gradients are zero; only a prompt's, a sum over rows, needs every row of it finite. What
    causality, a window or a bias of -inf hides from some queries alone must be finite.

    Args:
        q: queries, (B, H, N, D), any strides; or packed (T, H, D) with `cu_seqlens`.
        k: the text's keys, (B, Hkv, M, D) with Hkv dividing H; packed (T, Hkv, D). All five have one dtype and device.
        v: the text's values, as k.
        prompt_k: the prompt's keys, (Hkv, P, D), P >= 0; or a bank (R, Hkv, P, D) with `prompt_index`.
        prompt_v: the prompt's values, as prompt_k.
        key_mask: (B, M) bool or integers of any kind, nonzero where a text key may be attended to.
        cu_seqlens: (S + 1,) int32, row boundaries of the packed form; excludes `key_mask` and
            `bias`.
        max_seqlen: the longest packed row, or more, where the caller knows it; saves empty work.
        prompt_index: (B,) or (S,) integers of any kind: row b uses the bank entry `prompt_index[b]`.
        prompt_lens: (R,) integers of any kind: entry r has only its first `prompt_lens[r]` tokens; the rest is
            padding.
        prompt_bias: (H, P), or (R, H, P) with a bank: trainable, added to the prompt's scores.
        bias: (1 or B, 1 or H, N, M), added to the text's scores; may hold -inf, and may ask for its gradient (one that
            is made of queries or keys does).
        causal: query i stands at position i + M - N and sees text keys up to that position.
        scale: factor on the scores, positive; `D ** -0.5` when None.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        window: with `causal`, text keys with `position - key < window`; otherwise `|position - key| <= window`.
        softcap: scores become `softcap * tanh(scores / softcap)`, before the biases.
        backend: "auto" (triton for CUDA tensors of a head size and dtype that it has, else torch), "triton",
            "torch" or "reference". A backend named here serves the call or raises; it is never replaced by another.
        return_lse: also return the natural log-sum-exp of each query's scores, without gradient.

    Returns:
        (B, H, N, D), or (T, H, D) packed; with `return_lse` also float32 (B, H, N) or (H, T), any strides (the
        reference, and torch in float64, keep their own dtype). A query that sees no key gives zeros and -inf, never
        NaN. Every tensor that asks for its gradient gets one, of zeros where it is empty or nothing depends on it.

    Raises:
        ValueError: a shape, dtype, device or value disagrees; the message names the argument, what
            was expected and what came.
        RuntimeError: the backend named cannot serve these tensors.

    Source: P-Tuning v2 (Liu et al., 2022), section 3; one softmax over two key ranges as in Prefix-Tuning (Li and
    Liang, 2021).

    Example:
        ```python
        import torch

        from ptv2_fast import prompt_attention

        q = torch.randn(2, 4, 7, 16)  # (B, H, N, D)
        k, v = torch.randn(2, 2, 2, 7, 16)  # (B, Hkv, M, D) each
        prompt_k, prompt_v = torch.randn(2, 2, 5, 16)  # (Hkv, P, D) each, for both rows
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])  # the second row has four tokens
        out = prompt_attention(q, k, v, prompt_k, prompt_v, key_mask=mask, causal=True)
        assert out.shape == q.shape
        ```
    """
    check_arguments(
        q,
        k,
        v,
        prompt_k,
        prompt_v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        prompt_index=prompt_index,
        prompt_lens=prompt_lens,
        prompt_bias=prompt_bias,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
        window=window,
        softcap=softcap,
    )
    trained = (q, k, v, prompt_k, prompt_v, prompt_bias, bias)
    if prompt_k.dim() == 3:
        prompt_k, prompt_v = prompt_k[None], prompt_v[None]
        prompt_bias = prompt_bias[None] if prompt_bias is not None else None
    run = _backend(backend, q)
    result = run(
        q,
        k,
        v,
        prompt_k,
        prompt_v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        prompt_index=prompt_index,
        prompt_lens=prompt_lens,
        prompt_bias=prompt_bias,
        bias=bias,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        window=window,
        softcap=softcap,
        return_lse=return_lse,
    )
    if q.numel() and k.numel() and prompt_k.numel():
        return result
    # Nothing is computed from an empty tensor, and nothing at all where there is no query or no key.
    constant = q.numel() == 0 or k.numel() == prompt_k.numel() == 0
    unused = [x for x in trained if x is not None and x.requires_grad and (constant or x.numel() == 0)]
    if isinstance(result, tuple):
        return _in_graph(result[0], unused), result[1]
    return _in_graph(result, unused)


def _in_graph(out: Tensor, tensors: list[Tensor]) -> Tensor:
    """`out` as it is, with a gradient of zeros for `tensors`."""
    if not tensors:
        return out
    nothing = [tensor.reshape(-1)[:0].to(out.dtype) for tensor in tensors]
    return torch.cat([out.reshape(-1), *nothing]).view(out.shape)


def backend_for(name: str, q: Tensor) -> str:
    """The backend that serves tensors like q where `name` is asked for.

    Raises:
        ValueError: there is none of that name.
        RuntimeError: it cannot serve these tensors.
    """
    if name == "auto":
        return "triton" if _triton_serves(q) else "torch"
    if name == "triton":
        from ptv2_fast.attention import triton_backend

        triton_backend.check_available(q.device)
    elif name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _backend(name: str, q: Tensor) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The function that serves backend `name` for tensors like q; imported only when chosen."""
    match backend_for(name, q):
        case "torch":
            from ptv2_fast.attention.torch_backend import prompt_attention as run
        case "reference":
            from ptv2_fast.reference.attention import prompt_attention as run
        case _:
            from ptv2_fast.attention.triton_backend import prompt_attention as run
    return run


def _triton_serves(q: Tensor) -> bool:
    """Whether the kernels are the choice for tensors like q where nobody named a backend."""
    if not q.is_cuda or q.dtype.itemsize > 4:
        return False
    from ptv2_fast.attention.triton_backend import unavailable_reason

    if unavailable_reason(q.device) is not None:
        return False
    from ptv2_fast.kernels.launch import HEAD_DIMS

    return q.shape[-1] in HEAD_DIMS
