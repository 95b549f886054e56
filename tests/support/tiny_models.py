"""Tiny random transformers models of every family, and prompts over them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any, TypeVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.reference.float64 import to_exact_float64
from ptv2_fast.reference.literal import literal_deep, literal_prefix, literal_shallow
from ptv2_fast.task_types import TASKS

_Model = TypeVar("_Model", bound=nn.Module)

INJECTIONS = ("deep", "shallow", "prefix")
VOCABULARY, HIDDEN, LABELS, PADDING_ID = 40, 32, 3, 1
# How many tokens a layer with a window sees back, fewer than the tests' texts have.
WINDOW = 4
# Kinds of layers, which a configuration repeats for as many layers as it has.
_IN_TURN = ("sliding_attention", "full_attention")
_FLOAT64_EXPERTS = {"experts_implementation": "eager"}  # the one that takes float64


@dataclass(frozen=True)
class Tiny:
    """What tests must know of a family, by themselves.

    Attributes:
        causal: it is a decoder.
        kin: it is another family to the package: its layers differ, what the package knows of them does not.
        learned: positions are learned, in a decoder; all other decoders rotate.
        from_padding: positions count from padding_idx + 1.
        without_table: it has no table of positions and no position id moves its prompts.
        relative: attention is its own code, with a term for distances in its scores; positions are slots of the batch.
        without_index: layers are shared or do not know which one they are.
        token_types: its embeddings take them.
        eager: transformers' eager attention is the only one that it has, or that knows all it does.
        changes_logits: the logits of its language model are more than a linear map of the last states.
        config: what stands in its configuration beside the sizes: whatever makes it differ from Llama, switched on.
    """

    causal: bool = False
    kin: bool = False
    learned: bool = False
    from_padding: bool = False
    without_table: bool = False
    relative: bool = False
    without_index: bool = False
    token_types: bool = False
    eager: bool = False
    changes_logits: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


_BERT_DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = Tiny(token_types=True, config={**_BERT_DROPOUTS, "type_vocab_size": 2})
_LLAMA = Tiny(causal=True, config={"num_key_value_heads": 2, "head_dim": 8})

# Rotary pairs are neighbours, in the first half of each head.
_GLM = Tiny(
    causal=True,
    config={
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
)
_COHERE = Tiny(causal=True, changes_logits=True, config={"num_key_value_heads": 2, "logit_scale": 0.5})


def _like(tiny: Tiny, config: Mapping[str, Any] | None = None, **changes: Any) -> Tiny:
    """A row like another one, with more in its configuration."""
    return replace(tiny, config={**tiny.config, **(config or {})}, **changes)


TINY = {
    "bert": _BERT,
    "roberta": _like(_BERT, from_padding=True),
    "xlm-roberta": _like(_BERT, from_padding=True, kin=True),
    "electra": _like(_BERT, {"embedding_size": 16, "summary_last_dropout": 0.0}),
    "albert": _like(_BERT, {"embedding_size": 16, "classifier_dropout_prob": 0.0}, without_index=True),
    "distilbert": Tiny(
        without_index=True,
        config={
            "hidden_dim": 48,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
    "modernbert": Tiny(
        config={"local_attention": 2 * WINDOW, "cls_token_id": 2, "sep_token_id": 3, "layer_types": _IN_TURN},
    ),
    "mpnet": Tiny(
        from_padding=True,
        relative=True,
        without_index=True,
        eager=True,
        config=_BERT_DROPOUTS,
    ),
    # As DeBERTa-v3 has it, with so few buckets that the tests' texts reach the logarithmic ones.
    "deberta-v2": Tiny(
        relative=True,
        without_index=True,
        without_table=True,
        eager=True,
        config={
            **_BERT_DROPOUTS,
            "relative_attention": True,
            "position_buckets": 8,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "gpt2": Tiny(
        causal=True,
        learned=True,
        config={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0},
    ),
    "llama": _LLAMA,
    "qwen3": _like(_LLAMA, {"head_dim": 16}),
    "mistral": _like(_LLAMA, {"sliding_window": WINDOW}, kin=True),
    "mixtral": _like(
        _LLAMA,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, **_FLOAT64_EXPERTS},
        kin=True,
    ),
    "qwen2": _like(_LLAMA, kin=True),
    "qwen3_moe": _like(
        _LLAMA,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16, **_FLOAT64_EXPERTS},
        kin=True,
    ),
    "smollm3": _like(_LLAMA, {"no_rope_layer_interval": 2}, kin=True),
    "olmo2": _LLAMA,
    "glm": _like(_GLM, kin=True),
    "glm4": _GLM,
    "cohere": _like(_COHERE, {"use_qk_norm": True}),
    "cohere2": _like(_COHERE, {"sliding_window": WINDOW, "layer_types": _IN_TURN}, kin=True),
    "phi3": _like(_LLAMA, {"sliding_window": WINDOW, "original_max_position_embeddings": 64}),
    "gemma2": _like(
        _LLAMA,
        changes_logits=True,
        config={
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 11,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "head_dim": 16,
            "layer_types": _IN_TURN,
        },
        eager=True,
    ),
    "gemma3_text": _like(
        _LLAMA,
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 11, "head_dim": 16, "layer_types": _IN_TURN},
    ),
    "modernbert-decoder": Tiny(
        causal=True,
        changes_logits=True,
        config={
            "local_attention": 2 * WINDOW,
            "bos_token_id": 2,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "norm_bias": True,
            "layer_types": _IN_TURN,
        },
    ),
    "gpt_neox": Tiny(
        causal=True,
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    # Rotary pairs are neighbours in a part of each head; the model knows its sizes by other names too.
    "gptj": Tiny(causal=True, config={"rotary_dim": 4, "n_inner": 48}),
    "opt": Tiny(causal=True, learned=True, config={"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
}


# Older versions compute GPT-J's attention in the model itself.
NOT_SERVED = () if hasattr(transformers.models.gptj.modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else ("gptj",)


def _names(chosen: Callable[[Tiny], object]) -> tuple[str, ...]:
    return tuple(name for name, tiny in TINY.items() if chosen(tiny) and name not in NOT_SERVED)


FAMILIES = _names(lambda tiny: True)
ENCODERS, DECODERS = _names(lambda tiny: not tiny.causal), _names(lambda tiny: tiny.causal)
KIN, DISTINCT = _names(lambda tiny: tiny.kin), _names(lambda tiny: not tiny.kin)
FROM_PADDING = _names(lambda tiny: tiny.from_padding)
TOKEN_TYPES = _names(lambda tiny: tiny.token_types)
LEARNED = _names(lambda tiny: tiny.learned)
CHANGES_LOGITS = _names(lambda tiny: tiny.changes_logits)
RELATIVE = _names(lambda tiny: tiny.relative)
WITHOUT_TABLE = _names(lambda tiny: tiny.without_table)
WITHOUT_INDEX = _names(lambda tiny: tiny.without_index)
# Some or all of their layers have a window.
WINDOWED = _names(lambda tiny: tiny.config.get("sliding_window") or "local_attention" in tiny.config)
# Two query heads share a key head in these; the heads of 16 do not add up to the hidden size.
GROUPED = _names(lambda tiny: "num_key_value_heads" in tiny.config)
WIDE_HEADS = _names(lambda tiny: tiny.config.get("head_dim") == 16)
MIXTURES = _names(lambda tiny: "experts_implementation" in tiny.config)
# Words are narrower than hidden states, and so are shallow prompts.
NARROW_WORDS = {name: TINY[name].config["embedding_size"] for name in _names(lambda t: "embedding_size" in t.config)}

_AUTO = {name: getattr(transformers, task.auto_class) for name, task in TASKS.items()}


def tiny_config(family: str, **changes) -> transformers.PretrainedConfig:
    """A configuration with 2 layers, 4 heads and no dropout."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": PADDING_ID,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_labels": LABELS,
        "attn_implementation": "sdpa",
    }
    sizes |= {**TINY[family].config, **changes}
    if "layer_types" in TINY[family].config and "layer_types" not in changes:
        sizes["layer_types"] = [_IN_TURN[index % 2] for index in range(sizes["num_hidden_layers"])]
    if TINY[family].eager:
        sizes["attn_implementation"] = "eager"
    return transformers.AutoConfig.for_model(family, **sizes)


def wide_window(family: str) -> dict[str, int]:
    """Changes to a family's configuration that put every token of a test's text into every window."""
    if family not in WINDOWED:
        return {}
    return {"local_attention": 128} if "local_attention" in TINY[family].config else {"sliding_window": 64}


@functools.cache
def has_head(family: str, task: str) -> bool:
    """Whether transformers has a model of the family for the task."""
    return type(tiny_config(family)) in _AUTO[task]._model_mapping


def _bound(function: FunctionType, owner: object) -> MethodType:
    return MethodType(function, owner)


class _Structure(pickle.Pickler):
    """Writes a model without its tensors, and without functions that may be found nowhere; it collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.kept: dict[int, Tensor | FunctionType] = {}

    def persistent_id(self, one: object) -> int | None:
        if not isinstance(one, (Tensor, FunctionType)):
            return None
        self.kept[id(one)] = one
        return id(one)

    def reducer_override(self, one: object) -> Any:
        return (_bound, (one.__func__, one.__self__)) if isinstance(one, MethodType) else NotImplemented


class _Copy(pickle.Unpickler):
    """Reads a model, with a copy of each tensor."""

    def __init__(self, structure: bytes, kept: Mapping[int, Tensor | FunctionType]) -> None:
        super().__init__(io.BytesIO(structure))
        self._kept, self._copies = kept, {}

    def persistent_load(self, key: int) -> Tensor | FunctionType:
        if key not in self._copies:
            self._copies[key] = copy.deepcopy(self._kept[key])
        return self._copies[key]


def built_once(build: Callable[..., _Model]) -> Callable[..., _Model]:
    """Builds the model of the same arguments once and gives each caller a copy, a fifth of what deepcopy takes."""
    built: dict[str, tuple[bytes, Mapping[int, Tensor | FunctionType]]] = {}

    @functools.wraps(build)
    def copied(*arguments, **changes):
        key = repr((arguments, sorted(changes.items())))
        if key not in built:
            structure = _Structure(file := io.BytesIO())
            structure.dump(build(*arguments, **changes))
            built[key] = file.getvalue(), structure.kept
        return _Copy(*built[key]).load()

    return copied


@built_once
def tiny_base(
    family: str, task: str = "FEATURE_EXTRACTION", *, seed: int = 0, exact: bool = False, **changes
) -> transformers.PreTrainedModel:
    """A tiny model in eval mode; one seed, one set of weights. `exact` makes it true float64."""
    if family in NOT_SERVED:
        pytest.skip(f"transformers {transformers.__version__} computes attention in {family} itself")
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


def literal_logits(base: transformers.PreTrainedModel, states: Tensor) -> Tensor:
    """What a causal language model says (..., vocabulary) for the last states (..., D) of its backbone."""
    if base.config.model_type == "modernbert-decoder":
        states = base.lm_head(states)
    logits = base.get_output_embeddings()(states) * getattr(base.config, "logit_scale", 1.0)
    cap = getattr(base.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


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
