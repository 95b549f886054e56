"""The tutorial "P-Tuning v2" with prompts that evolve from the input through all layers, literally.

A small transformer in plain torch, with trained prefix embeddings concatenated once in front.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask

# As in BERT and GPT-2.
_INIT_STD = 0.02
# The label that torch's cross-entropy and Hugging Face's models leave out of the loss.
IGNORED_LABEL = -100


class TransformerLayer(nn.Module):
    """One post-norm layer: x = norm(x + attention(x)), then x = norm(x + ffn(x)).

    Raises:
        ValueError: ``d_model`` is not a multiple of ``num_heads``.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads; got {d_model}, {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))
        self.attention_norm = nn.LayerNorm(d_model)
        self.ffn_norm = nn.LayerNorm(d_model)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Run the layer on (B, M, D) with a (B, 1, M, M) mask that is added to the scores."""
        hidden = self.attention_norm(hidden + self.attention(hidden, mask))
        return self.ffn_norm(hidden + self.ffn(hidden))

    def attention(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d) + mask) v for each head, then the output projection."""
        batch, num_rows, d_model = hidden.shape
        heads = self.qkv(hidden).view(batch, num_rows, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, M, d]
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
        mixed = scores.softmax(dim=-1) @ value
        return self.output(mixed.transpose(1, 2).reshape(batch, num_rows, d_model))


class PTuningV2Model(nn.Module):
    """A masked language model whose only trained part may be a prefix in front of its input.

    h[0] = norm([prefix ; word_embeddings] + positions), h[i + 1] = layer[i](h[i]) on all P+N rows,
    logits = lm_head(h[L][P:]).

    The prefix stands at positions 0..P-1 and the text at P..P+N-1. Prefix and text see each other
    in every layer, so the prefix rows are different for every text from the first layer on.

    Args:
        vocab_size: number of words.
        d_model, num_layers, num_heads, d_ff: sizes of the transformer.
        prefix_len: P, the trained rows.
        max_length: the longest text.
        causal: keep a row from seeing the rows behind it. Labels stay aligned with the positions
            that predict them: shifting them is the caller's.
        freeze: freeze everything but the prefix.

    Raises:
        ValueError: a size is not a positive integer, or the heads do not divide ``d_model``.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        prefix_len: int,
        *,
        max_length: int = 512,
        causal: bool = False,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ff": d_ff,
            "prefix_len": prefix_len,
            "max_length": max_length,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        self.prefix_len = prefix_len
        self.max_length = max_length
        self.causal = causal
        self.prefix = nn.Parameter(torch.empty(prefix_len, d_model))
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.position_embeddings = nn.Embedding(prefix_len + max_length, d_model)
        self.embedding_norm = nn.LayerNorm(d_model)
        self.layers = nn.ModuleList(
            TransformerLayer(d_model, num_heads, d_ff) for _ in range(num_layers)
        )
        self.lm_head = nn.Linear(d_model, vocab_size)
        for weight in (self.prefix, self.word_embeddings.weight, self.position_embeddings.weight):
            nn.init.normal_(weight, std=_INIT_STD)
        if freeze:
            self.freeze_base()

    def freeze_base(self) -> None:
        """Stop training everything but the prefix."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name == "prefix")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of the text, and with labels the loss in front of them.

        Args:
            input_ids: (B, N) int64, N at most ``max_length``.
            attention_mask: (B, N), nonzero at real tokens; None means no padding.
            labels: (B, N) int64, the word wanted at each position, or -100 for none. Prefix rows
                have no labels. The loss is the mean over the labelled rows; 0 where there are none.

        Returns:
            logits (B, N, vocab_size), or (loss, logits).

        Raises:
            ValueError: the text is too long, or a shape disagrees.
        """
        key_mask = as_key_mask(attention_mask, input_ids)
        batch, num_tokens = input_ids.shape
        if num_tokens > self.max_length:
            raise ValueError(
                f"input_ids must have at most {self.max_length} tokens; got {num_tokens}"
            )
        words = self.word_embeddings(input_ids)
        rows = torch.cat([self.prefix.expand(batch, -1, -1), words], dim=1)  # [B, P+N, D]
        prefix_positions = torch.arange(self.prefix_len, device=input_ids.device)
        text_positions = self.prefix_len + positions_from_mask(key_mask)
        positions = torch.cat([prefix_positions.expand(batch, -1), text_positions], dim=1)
        hidden = self.embedding_norm(rows + self.position_embeddings(positions))
        mask = additive_mask(key_mask, self.prefix_len, causal=self.causal, dtype=hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits = self.lm_head(hidden[:, self.prefix_len :])
        return logits if labels is None else (self.loss(logits, labels), logits)

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of (B, N, vocab_size) logits over the labelled rows of (B, N).

        Raises:
            ValueError: ``labels`` has another shape than the text.
        """
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"labels must be {tuple(logits.shape[:2])}; got {tuple(labels.shape)}")
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)
