"""What the literal forms must know about a Hugging Face backbone, and their own plain attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptv2_fast.reference import own_attention
from ptv2_fast.reference.masks import additive_mask
from ptv2_fast.reference.prefix import PrefixByCall

_FULL, _SLIDING = "full_attention", "sliding_attention"

# The name under which the attention below is known to transformers while a literal form runs.
_ATTENTION_NAME = "ptv2_fast_literal"


@dataclass(frozen=True)
class Form:
    """What the literal forms must know of a family.

    Attributes:
        embed: (backbone, ids (B, N), positions (B, N), token types (B, N) or None) -> what enters the first layer
            (B, N, D), as the backbone's own forward makes it.
        layers: (backbone) -> its layers in the order in which they run; a shared one as often as it runs.
        final_norm: (backbone, hidden) -> what stands between the last layer and the heads.
        causal: a token is kept from seeing the tokens behind it.
        token_types: its embeddings take them.
        from_padding: positions count from padding_idx + 1.
        relative: attention is its own code (`own_attention`), and positions are slots of the batch: rows run without
            padding.
        tables_by_kind: layers with and without a window have rotary tables of their own.
        one_window: every layer has the window that the configuration names; elsewhere it lists kinds of layers.
    """

    embed: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    layers: Callable[[nn.Module], Sequence[nn.Module]]
    final_norm: Callable[[nn.Module, Tensor], Tensor] = lambda backbone, hidden: hidden
    causal: bool = False
    token_types: bool = False
    from_padding: bool = False
    relative: bool = False
    tables_by_kind: bool = False
    one_window: bool = False


def _embed_bert(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    hidden = backbone.embeddings(input_ids=ids, position_ids=positions, token_type_ids=types)
    return backbone.embeddings_project(hidden) if hasattr(backbone, "embeddings_project") else hidden


def _embed_albert(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return backbone.encoder.embedding_hidden_mapping_in(_embed_bert(backbone, ids, positions, types))


def _embed_opt(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    words = backbone.decoder.embed_tokens(ids)
    words = words if backbone.decoder.project_in is None else backbone.decoder.project_in(words)
    return words + backbone.decoder.embed_positions(None, position_ids=positions)


def _repetitions(backbone: nn.Module) -> Sequence[nn.Module]:
    """ALBERT's groups, as often as they run."""
    groups, config = backbone.encoder.albert_layer_groups, backbone.config
    share = config.num_hidden_layers / config.num_hidden_groups
    return [groups[int(index / share)] for index in range(config.num_hidden_layers)]


def _norm_opt(backbone: nn.Module, hidden: Tensor) -> Tensor:
    for step in (backbone.decoder.final_layer_norm, backbone.decoder.project_out):
        hidden = hidden if step is None else step(hidden)
    return hidden


_BERT = Form(_embed_bert, lambda backbone: backbone.encoder.layer, token_types=True)
# Layers are called and named as in Llama; what differs inside a layer is the layer's own business.
_LLAMA = Form(
    lambda backbone, ids, *_: backbone.embed_tokens(ids),
    lambda backbone: backbone.layers,
    lambda backbone, hidden: backbone.norm(hidden),
    causal=True,
)

# `config.model_type` -> what the literal forms know of it.
FORMS = {
    "bert": _BERT,
    "roberta": replace(_BERT, from_padding=True),
    "xlm-roberta": replace(_BERT, from_padding=True),
    "electra": _BERT,
    "albert": replace(_BERT, embed=_embed_albert, layers=_repetitions),
    "distilbert": Form(
        lambda backbone, ids, positions, _: backbone.embeddings(ids, position_ids=positions),
        lambda backbone: backbone.transformer.layer,
    ),
    "modernbert": Form(
        lambda backbone, ids, *_: backbone.embeddings(ids),
        lambda backbone: backbone.layers,
        lambda backbone, hidden: backbone.final_norm(hidden),
        tables_by_kind=True,
    ),
    "modernbert-decoder": Form(
        lambda backbone, ids, *_: backbone.embeddings(ids),
        lambda backbone: backbone.layers,
        lambda backbone, hidden: backbone.final_norm(hidden),
        causal=True,
        tables_by_kind=True,
    ),
    "mpnet": Form(
        lambda backbone, ids, positions, _: backbone.embeddings(input_ids=ids, position_ids=positions),
        lambda backbone: backbone.encoder.layer,
        relative=True,
        from_padding=True,
    ),
    "deberta-v2": replace(_BERT, relative=True),
    "gpt2": Form(
        lambda backbone, ids, positions, _: backbone.drop(backbone.wte(ids) + backbone.wpe(positions)),
        lambda backbone: backbone.h,
        lambda backbone, hidden: backbone.ln_f(hidden),
        causal=True,
    ),
    "opt": Form(_embed_opt, lambda backbone: backbone.decoder.layers, _norm_opt, causal=True),
    "gpt_neox": Form(
        lambda backbone, ids, *_: backbone.emb_dropout(backbone.embed_in(ids)),
        lambda backbone: backbone.layers,
        lambda backbone, hidden: backbone.final_layer_norm(hidden),
        causal=True,
    ),
    "gptj": Form(
        lambda backbone, ids, *_: backbone.drop(backbone.wte(ids)),
        lambda backbone: backbone.h,
        lambda backbone, hidden: backbone.ln_f(hidden),
        causal=True,
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, one_window=True),
    "mixtral": replace(_LLAMA, one_window=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": replace(_LLAMA, one_window=True),
    "phi3": replace(_LLAMA, one_window=True),
    "smollm3": _LLAMA,
    "olmo2": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": replace(_LLAMA, tables_by_kind=True),
}


def form_of(backbone: nn.Module) -> Form:
    """What the literal forms know of a backbone's family."""
    return FORMS[backbone.config.model_type]


def check_backbone(backbone: nn.Module) -> None:
    """Refuse what the literal forms do not cover.

    Raises:
        ValueError: another family, a model with a head on top, an encoder set up as a decoder, or
            gradient checkpointing in training mode.
    """
    config = getattr(backbone, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FORMS:
        raise ValueError(f"backbone must be one of {', '.join(FORMS)}; got {family!r}")
    inside = ("encoder", "decoder", "transformer", "h", "layers")
    if getattr(backbone, "base_model", backbone) is not backbone or not any(hasattr(backbone, n) for n in inside):
        raise ValueError(f"backbone must be the model without a head (model.base_model); got {type(backbone).__name__}")
    if getattr(config, "is_decoder", False) and not FORMS[family].causal:
        raise ValueError(f"backbone must be an encoder; got a {family} with is_decoder=True")
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
    if backbone.training and checkpointed:
        # The recomputation would run after the attention implementation has been put back.
        raise ValueError("backbone must not use gradient checkpointing in the literal form")


def is_causal(backbone: nn.Module) -> bool:
    """Say whether a token is kept from seeing the tokens behind it."""
    return form_of(backbone).causal


def uses_rotary(backbone: nn.Module) -> bool:
    """Say whether positions enter through rotated queries and keys, not through a table."""
    return hasattr(backbone, "rotary_emb")


def first_position(backbone: nn.Module) -> int:
    """Return the position id of a row's first token: RoBERTa and MPNet count from their padding_idx + 1."""
    return backbone.embeddings.padding_idx + 1 if form_of(backbone).from_padding else 0


def layers_of(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the transformer layers, in the order in which they run; a shared one as often as it runs."""
    return form_of(backbone).layers(backbone)


def embed(backbone: nn.Module, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Run what stands before the first layer as the backbone's own forward does it: (B, N) ids -> (B, N, D)."""
    return form_of(backbone).embed(backbone, input_ids, position_ids, token_type_ids)


def layer_kind(backbone: nn.Module, index: int) -> str:
    """Return "sliding_attention" where layer ``index`` has a window, else "full_attention"."""
    config = backbone.config
    if form_of(backbone).one_window:
        return _FULL if config.sliding_window is None else _SLIDING
    kinds = getattr(config, "layer_types", None)
    return _FULL if kinds is None or getattr(config, "sliding_window", None) is None else kinds[index]


def masks_by_kind(backbone: nn.Module, key_mask: Tensor, prompt_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the additive mask over [prompts ; text] of every kind of layer that the backbone has."""
    kinds = {layer_kind(backbone, index) for index in range(len(layers_of(backbone)))}
    windows = {_FULL: None, _SLIDING: getattr(backbone.config, "sliding_window", None)}
    return {
        kind: additive_mask(key_mask, prompt_length, causal=is_causal(backbone), dtype=dtype, window=windows[kind])
        for kind in kinds
    }


def mask_argument(backbone: nn.Module, masks: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """Return the masks as the backbone's own forward takes them."""
    form = form_of(backbone)
    if form.relative:
        return (masks[_FULL][:, 0, 0] == 0).long()
    if set(masks) == {_FULL} or form.one_window:
        return next(iter(masks.values()))
    return {_FULL: next(iter(masks.values())), **masks}


def run_layer(
    backbone: nn.Module, index: int, hidden: Tensor, mask: Tensor, positions: Tensor, prompt_length: int
) -> Tensor:
    """Run layer ``index`` on (B, M, D) hidden states with a (B, 1 or H, M, M) additive mask.

    ``positions`` (B, M) is what rotary layers turn queries and keys by, and the first ``prompt_length`` rows are what
    layers that count distances take for prompts; the others do not read them.
    """
    form = form_of(backbone)
    if form.relative:
        return own_attention.run_layer(backbone, index, hidden, mask, prompt_length)
    layer = layers_of(backbone)[index]
    if uses_rotary(backbone):
        kind = (backbone.config.layer_types[index],) if form.tables_by_kind else ()
        tables = backbone.rotary_emb(hidden, positions, *kind)
        output = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=tables)
    else:
        output = layer(hidden, attention_mask=mask)
    return output[0] if isinstance(output, tuple) else output


def after_layer(backbone: nn.Module, index: int, embedded: Tensor, hidden: Tensor) -> Tensor:
    """Apply what stands between layer ``index`` and the next one: hidden (B, N, D), embedded (B, N, D) the first's."""
    if form_of(backbone).relative:
        return own_attention.after_layer(backbone, index, embedded, hidden)
    return hidden


def final_norm(backbone: nn.Module, hidden: Tensor) -> Tensor:
    """Apply what stands between the last layer and the heads; nothing on post-norm encoders."""
    return form_of(backbone).final_norm(backbone, hidden)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    literal_prefix: PrefixByCall | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Text-book attention in the dtype of its input, in transformers' attention interface.

    out = dropout(softmax(cap(scaling * q k^T) + mask)) v, cap(s) = softcap * tanh(s / softcap) or s.
    transformers' own eager attention takes Llama's and Qwen3's softmax in float32, so it cannot
    judge in float64. Windows are the mask's business.

    Args:
        query: (B, H, N, d).
        key, value: (B, Hkv, N, d); each key head serves H / Hkv query heads.
        attention_mask: (B, 1 or H, N, N), added to the scores.
        literal_prefix: keys and values (Hkv, P, d) that stand in front of the layer's own in every
            row of the batch, and a bias (H, P) on their scores or None.

    Returns:
        out (B, N, H, d) and the probabilities (B, H, N, P+N).
    """
    prefix = None if literal_prefix is None else literal_prefix.next()
    if prefix is not None:
        prefix_key, prefix_value, bias = prefix
        batch, num_heads, num_queries = query.shape[:3]
        key = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
        prefix_length = prefix_key.shape[1]
        if bias is None:
            bias = query.new_zeros(num_heads, prefix_length)
        prefix_mask = bias[None, :, None, :].expand(batch, -1, num_queries, -1)
        if attention_mask is None:
            attention_mask = query.new_zeros(batch, 1, num_queries, key.shape[2] - prefix_length)
        text_mask = attention_mask.expand(-1, num_heads, -1, -1)
        attention_mask = torch.cat([prefix_mask, text_mask], dim=3)

    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


@contextmanager
def plain_attention_in(backbone: nn.Module, prefix: PrefixByCall | None = None) -> Iterator[None]:
    """Let the backbone run :func:`plain_attention`, and put its own implementation back after.

    Backbones whose attention is their own code get the prefix here, the others with their call.
    """
    form = FORMS.get(backbone.config.model_type)
    if form is not None and form.relative:
        with own_attention.plain_attention_in(backbone, prefix):
            yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, plain_attention)
    config = backbone.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
