"""Tiny random transformers models of every family, and prompts over them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.float64 import to_exact_float64
from ptv2_fast.reference.literal import literal_deep, literal_prefix, literal_shallow
from ptv2_fast.task_types import TASKS

_Model = TypeVar("_Model", bound=nn.Module)

ENCODERS = (
    "bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert", "modernbert", "mpnet", "deberta-v2",
)  # fmt: skip
DECODERS = (
    "gpt2", "llama", "qwen3", "mistral", "mixtral", "qwen2", "qwen3_moe", "smollm3", "phi3", "gemma2", "gemma3_text",
    "gpt_neox", "opt",
)  # fmt: skip
FAMILIES = (*ENCODERS, *DECODERS)
INJECTIONS = ("deep", "shallow", "prefix")
VOCABULARY, HIDDEN, LABELS, PADDING_ID = 40, 32, 3, 1

# Families that are one another to the package: their layers differ, what the package knows of them does not.
KIN = ("xlm-roberta", "mistral", "mixtral", "qwen2", "qwen3_moe", "smollm3")
DISTINCT = tuple(family for family in FAMILIES if family not in KIN)
# Encoders whose positions count from padding_idx + 1.
FROM_PADDING = ("roberta", "xlm-roberta", "mpnet")
TOKEN_TYPES = ("bert", "roberta", "xlm-roberta", "electra", "albert")
# Decoders whose positions are learned; all others rotate.
LEARNED = ("gpt2", "opt")
# Attention is their own code, with a term for distances in its scores; their positions are slots of the batch.
RELATIVE = ("mpnet", "deberta-v2")
# Encoders that have no table of positions and whose prompts no position id moves.
WITHOUT_TABLE = ("deberta-v2",)
# Two query heads share a key head in these; the heads of 16 do not add up to the hidden size.
GROUPED = ("llama", "qwen3", "mistral", "mixtral", "qwen2", "qwen3_moe", "smollm3", "phi3", "gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen3_moe")
WIDE_HEADS = ("qwen3", "qwen3_moe", "gemma2", "gemma3_text")
# Some or all of their layers see this many tokens back, fewer than the tests' texts have.
WINDOWED, WINDOW = ("mistral", "phi3", "gemma2", "gemma3_text", "modernbert"), 4
# Some families' layers are shared or do not know which one they are.
WITHOUT_INDEX = ("albert", "distilbert", *RELATIVE)
# Words are narrower than hidden states, and so are shallow prompts.
NARROW_WORDS = {"electra": 16, "albert": 16}
# What stands in a family's configuration beside the sizes: whatever makes it differ from Llama, switched on.
_SPECIAL = {
    "electra": {"embedding_size": 16, "summary_last_dropout": 0.0},
    "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "distilbert": {
        "hidden_dim": 48,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "qa_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "modernbert": {"local_attention": 2 * WINDOW, "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    # As DeBERTa-v3 has it, with so few buckets that the tests' texts reach the logarithmic ones.
    "deberta-v2": {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "relative_attention": True,
        "position_buckets": 8,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 11},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
}
_AUTO = {name: getattr(transformers, task.auto_class) for name, task in TASKS.items()}


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
    if family in TOKEN_TYPES:
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
        sizes |= {"intermediate_size": 48}
    if family in GROUPED:
        sizes |= {"num_key_value_heads": 2, "head_dim": 16 if family in WIDE_HEADS else 8}
    if family in MIXTURES:
        sizes |= {"experts_implementation": "eager"}  # the one that takes float64
    sizes |= _SPECIAL.get(family, {}) | changes
    if family in ("gemma2", "gemma3_text", "modernbert"):
        kinds = ("sliding_attention", "full_attention")
        sizes |= {"layer_types": [kinds[i % 2] for i in range(sizes["num_hidden_layers"])]}
    if family == "gemma2" or family in RELATIVE:
        sizes["attn_implementation"] = "eager"  # they have no other, or none that knows Gemma's softcap
    return transformers.AutoConfig.for_model(family, **sizes)


def wide_window(family: str) -> dict[str, int]:
    """Changes to a family's configuration that put every token of a test's text into every window."""
    if family not in WINDOWED:
        return {}
    return {"local_attention": 128} if family == "modernbert" else {"sliding_window": 64}


@functools.cache
def has_head(family: str, task: str) -> bool:
    """Whether transformers has a model of the family for the task."""
    return type(tiny_config(family)) in _AUTO[task]._model_mapping


def built_once(build: Callable[..., _Model]) -> Callable[..., _Model]:
    """Builds the model of the same arguments once and gives each caller a copy, which costs half of that."""
    built: dict[str, _Model] = {}

    @functools.wraps(build)
    def copied(*arguments, **changes):
        key = repr((arguments, sorted(changes.items())))
        if key not in built:
            built[key] = build(*arguments, **changes)
        return copy.deepcopy(built[key])

    return copied


@built_once
def tiny_base(
    family: str, task: str = "FEATURE_EXTRACTION", *, seed: int = 0, exact: bool = False, **changes
) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; one seed, one set of weights. `exact` makes it true float64."""
    if not has_head(family, task):
        pytest.skip(f"transformers has no {task} model of {family}")
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
