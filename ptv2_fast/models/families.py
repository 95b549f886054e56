"""The registry of model families: everything the rest of the package needs to know about one.

A family is found by the base model's `config.model_type`. Adding one means one file beside this and
one line in `_FAMILIES`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.models import (
    albert,
    bart,
    bert,
    distilbert,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    modernbert,
    opt,
    phi3,
    rows,
    t5,
)
from ptv2_fast.models.dimensions import Dimensions
from ptv2_fast.models.projection import Projection


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
        causal: text cannot see what stands after it; a shallow prompt then runs through the stack
            on its own.
        layers: the backbone's transformer layers in order.
        normed: (backbone, layer index, states (P, D)) -> what the layer's projections read, (P, D).
        projections: (backbone, layer index) -> the projections that make its keys and its values.
        finished: (backbone, layer index, keys (P, Hkv, d)) -> the keys as attention reads them, for tokens that stand
            right before the text.
        first_position: (backbone) -> the position id of a row's first token.
        rotary: positions are rotary: only differences count, there is no table of them, and a
            prompt stands at -P..-1 before a text at 0.. whatever its injection.
        sizes: (backbone) -> its sizes, one layer for every attention that may have a prompt.
        positioned: (backbone, layer index, keys (Hkv, P, d)) -> the keys, and what is added to their scores (H, P), of
            tokens that stand so far in front of the text that no distance between them counts; for families that add a
            term for the distance of two tokens to their score. None elsewhere.
        by_slot: positions are slots of the batch, whatever ids a call gives: rows run with their tokens first.
        shallow_view: (backbone, prompts (P, D)) -> the backbone with virtual tokens evolving in
            front of the text; for bidirectional families only.
        reads_first: the family's own sequence classifier reads slot 0 of each row.
        indexed: (backbone, or a view of it) -> a view whose attention modules have a `layer_idx`, and run through the
            hook; for families whose own do not.
        own_attention: attention does not run through transformers' attention interface; the indexed view's does run
            through the hook.
        read_rows: (layer, index (R,)) -> a view of the layer that works on the tokens `index` of the flattened (B, N)
            from its attention on, and leaves the others undefined; None where nobody wrote one.
        refuse: raises ValueError for a backbone of the family whose configuration nobody made right; None where there
            is none.
    """

    causal: bool
    layers: Callable[[PreTrainedModel], nn.ModuleList]
    normed: Callable[[PreTrainedModel, int, Tensor], Tensor]
    projections: Callable[[PreTrainedModel, int], tuple[Projection, Projection]]
    finished: Callable[[PreTrainedModel, int, Tensor], Tensor]
    first_position: Callable[[PreTrainedModel], int]
    rotary: bool = False
    sizes: Callable[[PreTrainedModel], Dimensions] = Dimensions.of
    positioned: Callable[[PreTrainedModel, int, Tensor], tuple[Tensor, Tensor]] | None = None
    by_slot: bool = False
    shallow_view: Callable[[PreTrainedModel, Tensor], nn.Module] | None = None
    reads_first: bool = False
    indexed: Callable[[nn.Module], nn.Module] | None = None
    own_attention: bool = False
    read_rows: Callable[[nn.Module, Tensor], nn.Module] | None = None
    refuse: Callable[[PreTrainedModel], None] | None = None


def _from_zero(backbone: PreTrainedModel) -> int:
    return 0


_BERT = Family(
    causal=False,
    layers=bert.layers,
    normed=bert.normed,
    projections=bert.projections,
    finished=bert.finished,
    first_position=_from_zero,
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
    rotary=True,
    read_rows=rows.mlp_of_rows,
)
_PHI3 = replace(_LLAMA, projections=phi3.projections)
_GEMMA3 = replace(_LLAMA, finished=gemma3.finished, refuse=gemma3.refuse)
_GPT_NEOX = replace(_LLAMA, projections=gpt_neox.projections, finished=gpt_neox.finished)
_OPT = Family(
    causal=True,
    layers=opt.layers,
    normed=opt.normed,
    projections=opt.projections,
    finished=opt.finished,
    first_position=_from_zero,
    refuse=opt.refuse,
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
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
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
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
}


def family_of(backbone: PreTrainedModel) -> Family:
    """The family of a backbone.

    Raises:
        ValueError: no family is known for its `config.model_type`; the message lists the known
            ones.
    """
    model_type = getattr(backbone.config, "model_type", None)
    if model_type not in _FAMILIES:
        raise ValueError(
            f"base must be of a supported family ({', '.join(sorted(_FAMILIES))}); "
            f"got {type(backbone).__name__} with model_type {model_type!r}"
        )
    if getattr(backbone.config, "is_decoder", False) and not _FAMILIES[model_type].causal:
        raise ValueError(
            f"base must be an encoder; got {type(backbone).__name__} configured with is_decoder=True"
        )
    refuse = _FAMILIES[model_type].refuse
    if refuse is not None:
        refuse(backbone)
    return _FAMILIES[model_type]


def sizes_of(backbone: PreTrainedModel) -> Dimensions:
    """The sizes of a backbone, as its family reads them."""
    return family_of(backbone).sizes(backbone)


def families() -> dict[str, Family]:
    """Every family by its model type, sorted."""
    return dict(sorted(_FAMILIES.items()))


def supported_families() -> tuple[str, ...]:
    """The model types that have a family, sorted."""
    return tuple(sorted(_FAMILIES))
