"""Tiny random encoder-decoders, prompts over them, and the literal form of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from batches import Batch, padded, text_rows
from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.encoder_decoder import literal_encoder_decoder
from ptv2_fast.reference.float64 import to_exact_float64
from tiny_models import HIDDEN, LABELS, PADDING_ID, VOCABULARY, built_once, tiny_prompts

STACKS = ("encoder", "decoder", "cross")
# Layers of either stack; transformers' caches have as many layers as the encoder, so the decoder has fewer.
ENCODER, DECODER = 3, 2
LAYERS = ENCODER + 2 * DECODER
START = 2
# Older versions compute T5's attention in the model itself.
T5_SERVED = hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS")


@dataclass(frozen=True)
class Tiny:
    """What tests must know of a kind of base.

    Attributes:
        model_type: of its configuration.
        config: its configuration beside the vocabulary, without dropout.
        noise: how much is added to its weights, so that attention is not almost uniform and biases not 0.
    """

    model_type: str
    config: Mapping[str, Any]
    noise: float


# d_kv * heads is not d_model.
_T5 = {
    "d_kv": 6, "d_ff": 48, "num_heads": 4, "num_layers": ENCODER, "num_decoder_layers": DECODER, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
    "encoder_layers": ENCODER, "decoder_layers": DECODER, "max_position_embeddings": 64, "dropout": 0.0,
    "forced_eos_token_id": None,
}  # fmt: skip
# T5 does not scale its scores: less noise is as much.
TINY = {
    "t5": Tiny("t5", {**_T5, "feed_forward_proj": "relu", "tie_word_embeddings": True}, noise=0.1),
    "t5-gated": Tiny("t5", _GATED, noise=0.1),
    "mt5": Tiny("mt5", _GATED, noise=0.1),
    "bart": Tiny("bart", {**_BART, "scale_embedding": False}, noise=0.25),
    "bart-scaled": Tiny("bart", {**_BART, "scale_embedding": True}, noise=0.25),
    "mbart": Tiny("mbart", {**_BART, "scale_embedding": True}, noise=0.25),
}
KINDS = tuple(TINY)
_AUTO = {
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "ENCODER": transformers.AutoModelForTextEncoding,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}


def tiny_config(kind: str, **changes) -> transformers.PretrainedConfig:
    """A configuration without dropout."""
    common = {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "pad_token_id": PADDING_ID, "bos_token_id": None,
        "eos_token_id": None, "decoder_start_token_id": START, "num_labels": LABELS, "attn_implementation": "sdpa",
    }  # fmt: skip
    return transformers.AutoConfig.for_model(TINY[kind].model_type, **{**common, **TINY[kind].config, **changes})


@built_once
def tiny_base(kind: str, task: str = "SEQ_2_SEQ_LM", *, exact: bool = False, **changes) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; the same weights every time. `exact` makes it true float64."""
    if TINY[kind].model_type in ("t5", "mt5") and not T5_SERVED:
        pytest.skip("this transformers' T5 has an attention of its own")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = _AUTO[task].from_config(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += TINY[kind].noise * torch.randn_like(parameter)
        for name, table in model.named_parameters():
            if "relative_attention_bias" in name:
                table.mul_(3.0)
            elif name.endswith("Attention.o.weight"):
                table.mul_(6.0)  # words would outweigh what is attended to
    torch.set_rng_state(state)
    return to_exact_float64(model) if exact else model


def tiny_model(
    kind: str,
    injection: str = "deep",
    task: str = "SEQ_2_SEQ_LM",
    *,
    exact: bool = False,
    base_changes: dict | None = None,
    **config,
) -> PTuningV2Model:
    """A wrapped tiny model in eval mode, with prompts large enough to matter."""
    base = tiny_base(kind, task, exact=exact, **(base_changes or {}))
    task = "FEATURE_EXTRACTION" if task == "ENCODER" and "heads" not in config else task
    torch.manual_seed(1)
    model = get_ptv2_model(base, tiny_prompts(injection, config.pop("task_type", task), **config)).eval()
    if exact:
        model.adapters.double()
    return model


@dataclass(frozen=True)
class Pair:
    """A batch of texts and of targets, each padded somewhere."""

    source: Batch
    target: Batch

    @property
    def inputs(self) -> dict[str, Tensor]:
        names = {"decoder_input_ids": self.target.input_ids, "decoder_attention_mask": self.target.attention_mask}
        return {**self.source.inputs, **names}

    @property
    def labels(self) -> Tensor:
        return self.target.input_ids.masked_fill(self.target.attention_mask == 0, -100)


def rows() -> list[tuple[Tensor, Tensor]]:
    """Three rows of a text and a target."""
    return list(zip(text_rows(5, 2, 7), text_rows(4, 6, 3, seed=5), strict=True))


def pair(side: str = "left", target_side: str = "right") -> Pair:
    """The same rows, padded."""
    return Pair(padded([a for a, _ in rows()], side), padded([b for _, b in rows()], target_side, width=8))


def literal(model: PTuningV2Model, backbone: nn.Module, *inputs, adapter: str = "default"):
    """The decoder's and the encoder's states in the literal form of an adapter, on a bare copy of the backbone."""
    encoder, config = model.adapters[adapter].encoder, model.adapters[adapter].config
    prompts = encoder()
    if config.injection == "shallow":
        return literal_encoder_decoder(backbone, *inputs, virtual=prompts)
    options = {
        "prompt_bias": dict(zip(encoder.layers, encoder.gate, strict=True)) if encoder.gate is not None else None
    }
    if config.injection == "deep":
        return literal_encoder_decoder(
            backbone, *inputs, states=dict(zip(encoder.layers, prompts, strict=True)), **options
        )
    stacks = config.stacks or ("encoder", "decoder")
    options["position_offset"] = {stack: config.position_offset or 0 for stack in stacks}
    pairs = {layer: tuple(one.unbind(0)) for layer, one in zip(encoder.layers, prompts, strict=True)}
    return literal_encoder_decoder(backbone, *inputs, keys_values=pairs, **options)


def literal_logits(base: transformers.PreTrainedModel, states: Tensor) -> Tensor:
    """What a base's language head says of decoder states."""
    if base.config.model_type in ("bart", "mbart"):
        return base.lm_head(states) + base.final_logits_bias
    return base.lm_head(states * (HIDDEN**-0.5 if getattr(base.config, "scale_decoder_outputs", False) else 1.0))
