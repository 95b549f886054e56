"""Cross-entropy of a linear head, computed in chunks so that the full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL

# Rows of logits alive at once: 1024 x a vocabulary of 150,000 in float32 are 0.6 GB.
CHUNK_ROWS = 1024


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum over rows of -log softmax(hidden weight^T + bias)[label].

    d hidden = (softmax - onehot) weight is computed beside the loss, chunk by chunk, and kept; so are the gradients of
    weight and bias where they train. Softmax and sums are in float32.

    Args:
        hidden: (R, D).
        weight: (V, D) and bias: (V,) or None, of hidden's dtype.
        labels: (R,) int64 in [0, V), or -100 for a row that counts nothing; such rows cost as much as others and are
            better left out.
        chunk_rows: rows of logits computed at once.

    Returns:
        A float32 scalar, 0 where R is 0.

    Source: the fused linear cross-entropy of Liger-Kernel (Hsu et al., 2024), for rows gathered beforehand.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).float()  # (r, V)
            counts = labels[rows, None] != IGNORED_LABEL
            target = labels[rows, None].clamp(min=0)
            lse = logits.logsumexp(-1, keepdim=True)
            loss += ((lse - logits.gather(-1, target)) * counts).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # softmax - onehot, in the logits' own memory
            grad_logits = logits.sub_(lse).exp_()
            grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits *= counts
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += (grad_logits.T @ hidden[rows]).float()
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    # torch types what its decorators give otherwise than its own base class.
    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = tuple(
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return (*grads, None, None)
