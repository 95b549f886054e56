"""The tutorial "P-Tuning v2" with prompts that evolve from the input through all layers: its two classes, literally.

A small transformer in plain torch, with trained prompts concatenated once in front.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimpleTransformerLayer(nn.Module):
    """One post-norm layer: x = norm1(x + dropout(attention(x))), then x = norm2(x + dropout(ffn(x)))."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, num_heads, dropout=dropout, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the layer on (B, M, D); ``mask`` is nn.MultiheadAttention's ``attn_mask``."""
        attended, _ = self.attention(x, x, x, attn_mask=mask)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.ffn(x)))


class PTuningV2Model(nn.Module):
    """A language model with P trained rows in front of its text.

    h[0] = [prompt_embeddings ; word_embeddings(input_ids)], h[i + 1] = layer[i](h[i]) on all P+N rows,
    logits = output_layer(h[L])[P:].

    Prompts and text see each other in every layer, so the prompts' rows are different for every text from the first
    layer on. There are no positions and no mask.

    Args:
        vocab_size: number of words.
        d_model, num_layers, num_heads, d_ff: sizes of the transformer.
        prefix_len: P, the trained rows.
    """

    def __init__(
        self, vocab_size: int, d_model: int, num_layers: int, num_heads: int, d_ff: int, prefix_len: int
    ) -> None:
        super().__init__()
        self.prefix_len = prefix_len
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList([SimpleTransformerLayer(d_model, num_heads, d_ff) for _ in range(num_layers)])
        self.output_layer = nn.Linear(d_model, vocab_size)
        self.prompt_embeddings = nn.Parameter(torch.randn(prefix_len, d_model))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the text alone: (B, N) int64 -> (B, N, vocab_size)."""
        prompts = self.prompt_embeddings.unsqueeze(0).expand(input_ids.shape[0], -1, -1)
        x = torch.cat([prompts, self.word_embeddings(input_ids)], dim=1)  # [B, P+N, D]
        for layer in self.layers:
            x = layer(x)
        return self.output_layer(x)[:, self.prefix_len :, :]
