"""The tutorial "P-Tuning v2", whose prompts evolve with the text through all layers: its two classes.

The tutorial joins prompts and text, asks nn.MultiheadAttention for weights that nobody reads, and computes logits of
the prompts that it slices off. Here prompts are written once in front of the text, attention is
`ptv2_fast.attention.prompt_attention`, and behind the last layer's attention there are the text's rows alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_fast.attention import prompt_attention
from ptv2_fast.tutorials.sizes import check_sizes


class SimpleTransformerLayer(nn.Module):
    """One post-norm layer.

        x = norm1(x + dropout(attention(x)))
        x = norm2(x + dropout(ffn(x)))

    Attributes:
        attention: the nn.MultiheadAttention that holds the parameters; its forward is not called. Its dropout, of
            attention weights after their softmax, is as there.
        ffn: linear, ReLU, linear.
        backend: which backend of `prompt_attention` runs.

    Args:
        d_model: D.
        num_heads: H, a divisor of D.
        d_ff: width of the inner linear layer.
        dropout: of attention weights and of both branches.

    Raises:
        ValueError: a size is not a positive integer, or H does not divide D.

    Example:
        ```python
        import torch

        from ptv2_fast.tutorials import SimpleTransformerLayer

        layer = SimpleTransformerLayer(d_model=32, num_heads=2, d_ff=64)
        assert layer(torch.randn(2, 12, 32)).shape == (2, 12, 32)
        ```
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float = 0.1) -> None:
        super().__init__()
        check_sizes(d_model=d_model, num_heads=num_heads, d_ff=d_ff)
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads; got {d_model} and {num_heads}")
        self.attention = nn.MultiheadAttention(d_model, num_heads, dropout=dropout, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.backend = "auto"

    def forward(self, x: Tensor, mask: Tensor | None = None, *, first_row: int = 0) -> Tensor:
        """Run the layer.

        Args:
            x: (B, M, D).
            mask: (M, M) or (B * H, M, M), as nn.MultiheadAttention's attn_mask: True where a row must not look, or
                floating point and added to the scores. A row that sees nothing gets zeros from attention, not NaN.
            first_row: the rows from here on are computed; all rows are looked at.

        Returns:
            (B, M - first_row, D).
        """
        attended = self.attention.out_proj(self._attend(x, mask, first_row))
        x = self.norm1(x[:, first_row:] + self.dropout(attended))
        return self.norm2(x + self.dropout(self.ffn(x)))

    def _attend(self, x: Tensor, mask: Tensor | None, first_row: int) -> Tensor:
        """(B, M - first_row, D): all heads side by side. Queries, keys and values are one product's output."""
        own = self.attention
        heads = F.linear(x, own.in_proj_weight, own.in_proj_bias).unflatten(-1, (3, own.num_heads, own.head_dim))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, M, d)
        nothing = keys.new_empty(own.num_heads, 0, own.head_dim)
        out = prompt_attention(
            queries[:, :, first_row:],
            keys,
            values,
            nothing,
            nothing,
            bias=None if mask is None else _as_bias(mask, own.num_heads, queries.dtype)[:, :, first_row:],
            dropout_p=own.dropout if own.training else 0.0,
            backend=self.backend,
        )
        assert isinstance(out, Tensor), "no log-sum-exp is asked for"
        return out.transpose(1, 2).flatten(2)


class PTuningV2Model(nn.Module):
    """A small transformer with P trained virtual tokens in front of its text; no positions, no mask.

        h[0] = [prompt_embeddings ; word_embeddings(input_ids)]
        h[i + 1] = layers[i](h[i])                                  on all P + N rows
        logits = output_layer(h[L][P:])

    As in the tutorial everything trains until somebody freezes it, and a seed gives the tutorial's own parameters.

    Args:
        vocab_size: V.
        d_model: D.
        num_layers: L.
        num_heads: H, a divisor of D.
        d_ff: width inside each layer.
        prefix_len: P.

    Raises:
        ValueError: a size is not a positive integer, or H does not divide D.

    Example:
        ```python
        import torch

        from ptv2_fast.tutorials import PTuningV2Model

        model = PTuningV2Model(vocab_size=100, d_model=32, num_layers=2, num_heads=2, d_ff=64, prefix_len=5)
        assert model(torch.tensor([[5, 6, 7]])).shape == (1, 3, 100)
        ```
    """

    def __init__(
        self, vocab_size: int, d_model: int, num_layers: int, num_heads: int, d_ff: int, prefix_len: int
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, prefix_len=prefix_len)
        self.prefix_len = prefix_len
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(SimpleTransformerLayer(d_model, num_heads, d_ff) for _ in range(num_layers))
        self.output_layer = nn.Linear(d_model, vocab_size)
        self.prompt_embeddings = nn.Parameter(torch.randn(prefix_len, d_model))

    def forward(self, input_ids: Tensor) -> Tensor:
        """The text's logits, (B, N, V), of input_ids (B, N).

        Raises:
            ValueError: `input_ids` has another shape.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, N); got {tuple(input_ids.shape)}")
        # The words of any id leave room for the prompts.
        rows = self.word_embeddings(F.pad(input_ids, (self.prefix_len, 0)))  # (B, P + N, D)
        rows[:, : self.prefix_len] = self.prompt_embeddings
        for layer in self.layers[:-1]:
            rows = layer(rows)
        return self.output_layer(self.layers[-1](rows, first_row=self.prefix_len))


def _as_bias(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """An attn_mask of nn.MultiheadAttention as `prompt_attention` takes it: (1 or B, 1 or H, M, M), added to scores."""
    if mask.dim() not in (2, 3):
        raise ValueError(f"mask must be (M, M) or (B * H, M, M); got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, num_heads))
