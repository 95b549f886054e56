"""Tiny random transformers models of every family, and prompts over them."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.float64 import to_exact_float64
from ptv2_fast.reference.literal import literal_deep, literal_prefix, literal_shallow

ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "qwen3")
FAMILIES = (*ENCODERS, *DECODERS)
INJECTIONS = ("deep", "shallow", "prefix")
VOCABULARY, HIDDEN, LABELS, PADDING_ID = 40, 32, 3, 1

_CONFIGS = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
}
_AUTO = {
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


def tiny_config(family: str, **changes) -> transformers.PretrainedConfig:
    """A configuration with 2 layers, 4 heads and no dropout."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PADDING_ID,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_labels": LABELS,
        "attn_implementation": "sdpa",
    }
    if family in ENCODERS:
        sizes |= {
            "intermediate_size": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "type_vocab_size": 2,
        }
    elif family == "gpt2":
        names = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout")
        sizes |= dict.fromkeys(names, 0.0)
    else:
        # Two query heads share a key head; Qwen3's 4 heads of 16 do not add up to the hidden size.
        head_dim = 16 if family == "qwen3" else 8
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": head_dim}
    return _CONFIGS[family](**(sizes | changes))


def tiny_base(
    family: str, task: str = "FEATURE_EXTRACTION", *, seed: int = 0, exact: bool = False, **changes
) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; one seed, one set of weights. `exact` makes it true float64."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    if task == "QUESTION_ANS":
        changes = {"num_labels": 2, **changes}
    model = _AUTO[task].from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts biases at 0, norms at 1 and attention almost uniform.
            parameter += 0.15 * torch.randn_like(parameter)
    torch.set_rng_state(state)
    return to_exact_float64(model) if exact else model


def tiny_model(
    family: str,
    injection: str = "deep",
    task: str = "FEATURE_EXTRACTION",
    *,
    length: int = 5,
    seed: int = 0,
    exact: bool = False,
    base_changes: dict | None = None,
    **config,
) -> PTuningV2Model:
    """A wrapped tiny model in eval mode, with prompts large enough to matter."""
    base = tiny_base(family, task, seed=seed, exact=exact, **(base_changes or {}))
    model = get_ptv2_model(base, tiny_prompts(injection, task, length=length, **config)).eval()
    if exact:
        model.adapters.double()
    return model


def tiny_prompts(injection: str, task: str = "FEATURE_EXTRACTION", *, length: int = 5, **config):
    """A configuration whose prompts start large enough to change outputs visibly."""
    return PTuningV2Config(task, num_virtual_tokens=length, injection=injection, **{"init_std": 0.8, **config})


def literal_states(
    model: PTuningV2Model,
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    adapter: str = "default",
    **inputs,
) -> Tensor:
    """What the literal form of an adapter gives on a bare copy of the backbone, (B, N, D)."""
    encoder = model.adapters[adapter].encoder
    config = model.adapters[adapter].config
    prompts = encoder()
    if config.injection == "shallow":
        return literal_shallow(backbone, prompts, input_ids, attention_mask, **inputs)
    inputs |= {"layers": encoder.layers, "prompt_bias": encoder.gate}
    if config.injection == "deep":
        return literal_deep(backbone, prompts, input_ids, attention_mask, **inputs)
    offset = config.position_offset or 0
    keys, values = prompts.unbind(1)
    return literal_prefix(backbone, keys, values, input_ids, attention_mask, position_offset=offset, **inputs)
