"""The registry of model families: everything the rest of the package needs to know about one.

A family is found by the base model's `config.model_type`. Adding one means one file beside this and
one line in `_FAMILIES`; nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ptv2_fast.backbone import tokens
from ptv2_fast.families import (
    albert,
    bart,
    bert,
    clip,
    deberta,
    distilbert,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    modernbert,
    mpnet,
    opt,
    phi3,
    t5,
    vit,
    whisper,
)
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.family import Family
from ptv2_fast.families.recognise import recognise, why_not_tried


def _from_zero(backbone: PreTrainedModel) -> int:
    return 0


_BERT = Family(
    causal=False,
    layers=bert.layers,
    attention_input=bert.attention_input,
    projections=bert.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    attention_inputs=bert.as_they_are,
    finish_all_keys=bert.as_they_are,
    shallow_view=bert.shallow_view,
    reads_first=True,
    last_layer_tokens=bert.last_layer_tokens,
)
_ROBERTA = replace(_BERT, first_position=bert.roberta_first_position)
_DISTILBERT = replace(
    _BERT,
    layers=distilbert.layers,
    projections=distilbert.projections,
    shallow_view=distilbert.shallow_view,
    with_layer_index=distilbert.with_layer_index,
    last_layer_tokens=None,
)
_ALBERT = replace(
    _BERT,
    layers=albert.layers,
    projections=albert.projections,
    with_layer_index=albert.with_layer_index,
    check=albert.check,
    last_layer_tokens=None,
)
_MPNET = replace(
    _BERT,
    projections=mpnet.projections,
    first_position=bert.roberta_first_position,
    far_keys_and_bias=mpnet.far_keys_and_bias,
    absolute_positions=True,
    with_layer_index=mpnet.with_layer_index,
    own_attention=True,
    last_layer_tokens=None,
)
_DEBERTA = replace(
    _MPNET,
    projections=deberta.projections,
    first_position=_from_zero,
    num_positions=deberta.num_positions,
    far_keys_and_bias=deberta.far_keys_and_bias,
    shallow_view=deberta.shallow_view,
    with_layer_index=deberta.with_layer_index,
)
_MODERNBERT = Family(
    causal=False,
    layers=modernbert.layers,
    attention_input=modernbert.attention_input,
    projections=modernbert.projections,
    finish_keys=modernbert.finish_keys,
    first_position=_from_zero,
    rotary=True,
    shallow_view=modernbert.shallow_view,
    reads_first=True,
)
_GPT2 = Family(
    causal=True,
    layers=gpt2.layers,
    attention_input=gpt2.attention_input,
    projections=gpt2.projections,
    finish_keys=gpt2.finish_keys,
    first_position=_from_zero,
    last_layer_tokens=tokens.mlp_of_tokens,
)
_LLAMA = Family(
    causal=True,
    layers=llama.layers,
    attention_input=llama.attention_input,
    projections=llama.projections,
    finish_keys=llama.finish_keys,
    first_position=_from_zero,
    attention_inputs=llama.attention_inputs,
    finish_all_keys=llama.finish_all_keys,
    rotary=True,
    last_layer_tokens=tokens.mlp_of_tokens,
)
_PHI3 = replace(_LLAMA, projections=phi3.projections)
_GEMMA3 = replace(_LLAMA, finish_keys=gemma3.finish_keys, finish_all_keys=None, check=gemma3.check)
_GPT_NEOX = replace(
    _LLAMA, projections=gpt_neox.projections, finish_keys=gpt_neox.finish_keys, finish_all_keys=None
)  # fmt: skip
_OPT = Family(
    causal=True,
    layers=opt.layers,
    attention_input=opt.attention_input,
    projections=opt.projections,
    finish_keys=opt.finish_keys,
    first_position=_from_zero,
    check=opt.check,
)
_VIT = Family(
    causal=False,
    layers=vit.layers,
    attention_input=vit.attention_input,
    projections=vit.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    shallow_view=vit.shallow_view,
    reads_first=True,
    with_layer_index=vit.with_layer_index,
    last_layer_tokens=tokens.mlp_of_tokens,
    reads="pixel_values",
    feature_tokens=vit.tokens,
)
_CLIP_VISION = replace(
    _VIT,
    layers=clip.layers,
    attention_input=clip.attention_input,
    projections=clip.projections,
    shallow_view=clip.shallow_view,
    reads_first=False,
    with_layer_index=clip.with_layer_index,
)
_CLIP_TEXT = Family(
    causal=True,
    layers=clip.layers,
    attention_input=clip.attention_input,
    projections=clip.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    with_layer_index=clip.indexed_text,
    last_layer_tokens=tokens.mlp_of_tokens,
    with_own_pooler=clip.pooled_text,
)
_WHISPER = Family(
    causal=False,
    layers=whisper.layers,
    attention_input=whisper.attention_input,
    projections=whisper.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    sizes=whisper.sizes,
    shallow_view=whisper.shallow_view,
    with_layer_index=whisper.with_layer_index,
    reads="input_features",
    check=whisper.check,
)
# Encoders with decoders: `with_layer_index` gives every attention its layer, and their two stacks get their prompts one by one.
_T5 = Family(
    causal=False,
    layers=t5.layers,
    attention_input=t5.attention_input,
    projections=t5.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    sizes=t5.sizes,
    far_keys_and_bias=t5.far_keys_and_bias,
    absolute_positions=True,
    shallow_view=t5.shallow_view,
    reads_first=True,
    with_layer_index=t5.with_layer_index,
    check=t5.check,
)
_BART = Family(
    causal=False,
    layers=bart.layers,
    attention_input=bert.attention_input,
    projections=bart.projections,
    finish_keys=bert.finish_keys,
    first_position=_from_zero,
    sizes=bart.sizes,
    absolute_positions=True,
    reads_first=True,
    with_layer_index=bart.with_layer_index,
    check=bart.check,
)

_FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": _BERT,
    "albert": _ALBERT,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _PHI3,
    "gemma2": replace(_LLAMA, check=gemma3.check),
    "gemma3_text": _GEMMA3,
    "vit": _VIT,
    "clip_vision_model": _CLIP_VISION,
    "clip_text_model": _CLIP_TEXT,
    "whisper": _WHISPER,
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
}


def family_of(backbone: PreTrainedModel) -> Family:
    """The family of a backbone: by its `config.model_type`, or the listed one that it behaves like.

    Raises:
        ValueError: its model type is not listed and it behaves like none that is, or its family refuses it; the message
            lists the known ones.
    """
    model_type: Any = getattr(backbone.config, "model_type", None)
    if model_type == "clip":
        whole = type(backbone).__name__
        raise ValueError(f"base must be one tower: wrap the vision_model or the text_model of {whole}")
    family = _FAMILIES.get(model_type) or recognise(backbone, _FAMILIES)
    if family is None:
        untried = why_not_tried(backbone)
        tried = f"; it was not tried: {untried}" if untried else ", or make its keys and values as one of them does"
        raise ValueError(
            f"base must be of a supported family ({', '.join(sorted(_FAMILIES))}){tried}; got "
            f"{type(backbone).__name__} with model_type {model_type!r}"
        )
    if not family.causal and _decodes_alone(backbone):
        raise ValueError(f"base must be an encoder; got {type(backbone).__name__} configured with is_decoder=True")
    if family.check is not None:
        family.check(backbone)
    return family


def _decodes_alone(backbone: PreTrainedModel) -> bool:
    """Whether a stack by itself is configured as a decoder; one beside a decoder is an encoder whatever its
    configuration says, and so is one whose own configuration says so (T5's)."""
    if hasattr(backbone, "decoder"):
        return False
    own = getattr(getattr(backbone, "encoder", backbone), "config", backbone.config)
    return bool(getattr(own, "is_decoder", False))


def sizes_of(backbone: PreTrainedModel) -> Dimensions:
    """The sizes of a backbone, as its family reads them."""
    return family_of(backbone).sizes(backbone)


def is_listed(backbone: PreTrainedModel) -> bool:
    """Whether the family is known by name, and with it what its task heads do."""
    return getattr(backbone.config, "model_type", None) in _FAMILIES


def families() -> dict[str, Family]:
    """Every family by its model type, sorted."""
    return dict(sorted(_FAMILIES.items()))


def supported_families() -> tuple[str, ...]:
    """The model types that have a family, sorted."""
    return tuple(sorted(_FAMILIES))
