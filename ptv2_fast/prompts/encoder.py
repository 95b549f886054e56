"""The trained prompts of one adapter: deep, shallow or prefix, with or without an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_fast.config import PTuningV2Config

# A gate's first value: e^-10 of the attention mass, so that the prompt starts as a no-op yet still
# gets gradients.
GATE_START = -10.0


class PromptEncoder(nn.Module):
    """Trained parameters that stand for P virtual tokens.

    forward() gives, for the prompted layers in order (`layers`, L' of them):
        deep     (L', P, D)          the hidden states that each layer's keys and values are projected from
        shallow  (P, E)              the embeddings that evolve through the stack
        prefix   (L', 2, Hkv, P, d)  the keys and values themselves
    With `reparameterization` the prompts are an MLP's output over P trained embeddings: run once on
    P rows.

    Source: P-Tuning v2 (Liu et al., 2022), section 3.2 (deep prompts, reparameterization).
    """

    def __init__(
        self,
        config: PTuningV2Config,
        layers: tuple[int, ...],
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        std: float,
        embedding_size: int | None = None,
    ):
        """Create and initialise the parameters ("normal"; `ptv2_fast.prompts.text_init` overwrites
        them).

        Args:
            config: the adapter's configuration.
            layers: the prompted layers, sorted.
            hidden_size: D; num_heads: H; num_kv_heads: Hkv; head_dim: d.
            std: standard deviation of the initial values.
            embedding_size: E; None where it is D.
        """
        super().__init__()
        length = config.num_virtual_tokens
        self.layers = layers
        self.dropout = config.prompt_dropout
        self.shape = {
            "deep": (len(layers), length, hidden_size),
            "shallow": (length, embedding_size or hidden_size),
            "prefix": (len(layers), 2, num_kv_heads, length, head_dim),
        }[config.injection]
        self.injection = config.injection
        if config.reparameterization is None:
            self.prompts = nn.Parameter(torch.randn(self.shape) * std)
            self.mlp = None
        else:
            width = self._width()
            self.embeddings = nn.Parameter(torch.randn(length, hidden_size) * std)
            self.mlp = nn.Sequential(
                nn.Linear(hidden_size, config.reparameterization),
                nn.Tanh(),
                nn.Linear(config.reparameterization, width),
            )
        gated = config.prompt_init == "gated"
        self.gate = nn.Parameter(torch.full((len(layers), num_heads, length), GATE_START)) if gated else None

    def forward(self) -> Tensor:
        """The prompts, in the shape that the class describes; dropout while training."""
        prompts = self.prompts if self.mlp is None else self._from_mlp(self.mlp(self.embeddings))
        return F.dropout(prompts, self.dropout, self.training) if self.dropout else prompts

    def _width(self) -> int:
        """How many values one virtual token has."""
        return torch.Size(self.shape).numel() // self.shape[-2]

    def _from_mlp(self, flat: Tensor) -> Tensor:
        """(P, width) -> the injection's shape: a token's values are ordered by layer, key before value, head."""
        length = flat.shape[0]
        if self.injection == "prefix":
            layers, _, heads, _, head_dim = self.shape
            return flat.view(length, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
        return flat.view(length, self.shape[0], self.shape[2]).transpose(0, 1)
