"""The registry of model families: everything the rest of the package needs to know about one.

A family is found by the base model's `config.model_type`. Adding one means one file beside this and
one line in `_FAMILIES`; nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ptv2_fast.models import (
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
    rows,
    t5,
    vit,
    whisper,
)
from ptv2_fast.models.dimensions import Dimensions
from ptv2_fast.models.family import Family
from ptv2_fast.models.unlisted import recognise, why_not_tried


def _from_zero(backbone: PreTrainedModel) -> int:
    return 0


_BERT = Family(
    causal=False,
    layers=bert.layers,
    normed=bert.normed,
    projections=bert.projections,
    finished=bert.finished,
    first_position=_from_zero,
    normed_together=bert.as_they_are,
    finished_together=bert.as_they_are,
    shallow_view=bert.shallow_view,
    reads_first=True,
    read_rows=bert.read_rows,
)
_ROBERTA = replace(_BERT, first_position=bert.roberta_first_position)
_DISTILBERT = replace(
    _BERT,
    layers=distilbert.layers,
    projections=distilbert.projections,
    shallow_view=distilbert.shallow_view,
    indexed=distilbert.indexed,
    read_rows=None,
)
_ALBERT = replace(
    _BERT,
    layers=albert.layers,
    projections=albert.projections,
    indexed=albert.indexed,
    refuse=albert.refuse,
    read_rows=None,
)
_MPNET = replace(
    _BERT,
    projections=mpnet.projections,
    first_position=bert.roberta_first_position,
    positioned=mpnet.positioned,
    by_slot=True,
    indexed=mpnet.indexed,
    own_attention=True,
    read_rows=None,
)
_DEBERTA = replace(
    _MPNET,
    projections=deberta.projections,
    first_position=_from_zero,
    table_size=deberta.table_size,
    positioned=deberta.positioned,
    shallow_view=deberta.shallow_view,
    indexed=deberta.indexed,
)
_MODERNBERT = Family(
    causal=False,
    layers=modernbert.layers,
    normed=modernbert.normed,
    projections=modernbert.projections,
    finished=modernbert.finished,
    first_position=_from_zero,
    rotary=True,
    shallow_view=modernbert.shallow_view,
    reads_first=True,
)
_GPT2 = Family(
    causal=True,
    layers=gpt2.layers,
    normed=gpt2.normed,
    projections=gpt2.projections,
    finished=gpt2.finished,
    first_position=_from_zero,
    read_rows=rows.mlp_of_rows,
)
_LLAMA = Family(
    causal=True,
    layers=llama.layers,
    normed=llama.normed,
    projections=llama.projections,
    finished=llama.finished,
    first_position=_from_zero,
    normed_together=llama.normed_together,
    finished_together=llama.finished_together,
    rotary=True,
    read_rows=rows.mlp_of_rows,
)
_PHI3 = replace(_LLAMA, projections=phi3.projections)
_GEMMA3 = replace(_LLAMA, finished=gemma3.finished, finished_together=None, refuse=gemma3.refuse)
_GPT_NEOX = replace(
    _LLAMA, projections=gpt_neox.projections, finished=gpt_neox.finished, finished_together=None
)  # fmt: skip
_OPT = Family(
    causal=True,
    layers=opt.layers,
    normed=opt.normed,
    projections=opt.projections,
    finished=opt.finished,
    first_position=_from_zero,
    refuse=opt.refuse,
)
_VIT = Family(
    causal=False,
    layers=vit.layers,
    normed=vit.normed,
    projections=vit.projections,
    finished=bert.finished,
    first_position=_from_zero,
    shallow_view=vit.shallow_view,
    reads_first=True,
    indexed=vit.indexed,
    read_rows=rows.mlp_of_rows,
    reads="pixel_values",
    feature_tokens=vit.tokens,
)
_CLIP_VISION = replace(
    _VIT,
    layers=clip.layers,
    normed=clip.normed,
    projections=clip.projections,
    shallow_view=clip.shallow_view,
    reads_first=False,
    indexed=clip.indexed,
)
_CLIP_TEXT = Family(
    causal=True,
    layers=clip.layers,
    normed=clip.normed,
    projections=clip.projections,
    finished=bert.finished,
    first_position=_from_zero,
    indexed=clip.indexed_text,
    read_rows=rows.mlp_of_rows,
    pooled=clip.pooled_text,
)
_WHISPER = Family(
    causal=False,
    layers=whisper.layers,
    normed=whisper.normed,
    projections=whisper.projections,
    finished=bert.finished,
    first_position=_from_zero,
    sizes=whisper.sizes,
    shallow_view=whisper.shallow_view,
    indexed=whisper.indexed,
    reads="input_features",
    refuse=whisper.refuse,
)
# Encoders with decoders: `indexed` gives every attention its layer, and their two stacks get their prompts one by one.
_T5 = Family(
    causal=False,
    layers=t5.layers,
    normed=t5.normed,
    projections=t5.projections,
    finished=bert.finished,
    first_position=_from_zero,
    sizes=t5.sizes,
    positioned=t5.positioned,
    by_slot=True,
    shallow_view=t5.shallow_view,
    reads_first=True,
    indexed=t5.indexed,
    refuse=t5.refuse,
)
_BART = Family(
    causal=False,
    layers=bart.layers,
    normed=bert.normed,
    projections=bart.projections,
    finished=bert.finished,
    first_position=_from_zero,
    sizes=bart.sizes,
    by_slot=True,
    reads_first=True,
    indexed=bart.indexed,
    refuse=bart.refuse,
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
    "gemma2": replace(_LLAMA, refuse=gemma3.refuse),
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
        raise ValueError(
            f"base must be an encoder; got {type(backbone).__name__} configured with is_decoder=True"
        )
    if family.refuse is not None:
        family.refuse(backbone)
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
