"""Tiny random backbones of the five families, and small padded batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

from ptv2_fast.reference.float64 import to_exact_float64

VOCABULARY = 40
PADDING_ID = 1
LENGTHS = (5, 2, 7)


def _config(family: str, **changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "pad_token_id": PADDING_ID,
        "attn_implementation": "sdpa",
    }
    if family in ("llama", "qwen3"):
        # 4 heads of 16 do not add up to the hidden size; two query heads share a key head.
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
    elif family != "gpt2":
        sizes |= {"intermediate_size": 48}
    configs = {
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "gpt2": GPT2Config,
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
    }
    return configs[family](**(sizes | changes))


_MODELS = {
    "bert": BertModel,
    "roberta": RobertaModel,
    "gpt2": GPT2Model,
    "llama": LlamaModel,
    "qwen3": Qwen3Model,
}


@pytest.fixture
def make_backbone():
    """make_backbone(family, seed=0, exact=True, **config): a frozen tiny model in eval mode."""

    def make(family: str, *, seed: int = 0, exact: bool = True, **changes):
        torch.manual_seed(seed)
        model = _MODELS[family](_config(family, **changes)).eval().requires_grad_(False)
        for parameter in model.parameters():
            # transformers starts biases at 0, norms at 1 and attention almost uniform.
            parameter.data += 0.15 * torch.randn_like(parameter)
        return to_exact_float64(model) if exact else model

    return make


@dataclass(frozen=True)
class Batch:
    """One batch with its padding on a chosen side, and where its rows' own tokens stand."""

    input_ids: Tensor
    attention_mask: Tensor

    def real(self, output: Tensor, row: int) -> Tensor:
        return output[row][self.attention_mask[row].bool()]


@pytest.fixture
def rows() -> list[Tensor]:
    """Rows of 5, 2 and 7 word ids, none of them the padding id."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


@pytest.fixture
def pad():
    """pad(rows, side): the batch of the rows padded to 9 tokens; side is left, right or holes."""

    def make(rows: list[Tensor], side: str, width: int = 9) -> Batch:
        input_ids = torch.full((len(rows), width), PADDING_ID)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        generator = torch.Generator().manual_seed(11)
        for index, row in enumerate(rows):
            if side == "holes":
                where = torch.randperm(width, generator=generator)[: len(row)].sort().values
            else:
                first = width - len(row) if side == "left" else 0
                where = torch.arange(first, first + len(row))
            input_ids[index, where] = row
            attention_mask[index, where] = 1
        return Batch(input_ids, attention_mask)

    return make
