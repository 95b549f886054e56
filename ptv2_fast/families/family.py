"""What the rest of the package needs to know about a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection
from ptv2_fast.families.dimensions import Dimensions


def _stated_size(backbone: PreTrainedModel) -> int | None:
    return getattr(backbone.config, "max_position_embeddings", None)


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
        causal: text cannot see what stands after it; a shallow prompt then runs through the stack
            on its own.
        layers: the backbone's transformer layers in order.
        attention_input: (backbone, layer index, states (P, D)) -> what the layer's projections read, (P, D).
        projections: (backbone, layer index) -> the projections that make its keys and its values.
        finish_keys: (backbone, layer index, keys (P, Hkv, d)) -> the keys as attention reads them, for tokens that stand
            right before the text.
        attention_inputs, finish_all_keys: (backbone, layer indices, (L, P, D) or (L, P, Hkv, d)) -> what `attention_input` and
            `finish_keys` give for each of these layers, by operations on all of them; None, or gives None, where they must
            be asked one by one.
        first_position: (backbone) -> the position id of a row's first token.
        num_positions: (backbone) -> how many positions its table of learned ones has; None where it has no table.
        rotary: positions are rotary: only differences count, there is no table of them, and a
            prompt stands at -P..-1 before a text at 0.. whatever its injection.
        sizes: (backbone) -> its sizes, one layer for every attention that may have a prompt.
        far_keys_and_bias: (backbone, layer index, keys (Hkv, P, d)) -> the keys, and what is added to their scores (H, P) or
            None, of tokens that stand so far in front of the text that no distance between them counts
            (`own_attention` says more); for families that add a term for the distance of two tokens to their score.
            None elsewhere.
        absolute_positions: positions are slots of the batch, whatever ids a call gives: rows run with their tokens first.
        shallow_view: (backbone, prompts (P, D)) -> the backbone with virtual tokens evolving in
            front of the text; for bidirectional families only.
        reads_first: the family's own sequence classifier reads slot 0 of each row.
        with_layer_index: (backbone, or a view of it) -> a view whose attention modules have a `layer_idx`, and run through the
            hook; for families whose own do not.
        own_attention: attention does not run through transformers' attention interface; the indexed view's does run
            through the hook.
        last_layer_tokens: (layer, index (R,)) -> a view of the layer that works on the tokens `index` of the flattened (B, N)
            from its attention on, and leaves the others undefined; None where nobody wrote one.
        reads: the main input of its forward: "input_ids", a text; or "pixel_values" or "input_features", which have no
            padding and no positions that a call could give.
        feature_tokens: (backbone, main input) -> how many rows N it becomes, the first of which pools the others; for
            families that read no text. None where no row does.
        with_own_pooler: a view of a backbone, called with the rows as the caller gave them, whose pooler reads each row's own
            token; for families whose own pooler may read another's, or padding.
        check: raises ValueError for a backbone of the family whose configuration nobody made right; None where there
            is none.
    """

    causal: bool
    layers: Callable[[PreTrainedModel], nn.ModuleList]
    attention_input: Callable[[PreTrainedModel, int, Tensor], Tensor]
    projections: Callable[[PreTrainedModel, int], tuple[Projection, Projection]]
    finish_keys: Callable[[PreTrainedModel, int, Tensor], Tensor]
    first_position: Callable[[PreTrainedModel], int]
    attention_inputs: Callable[[PreTrainedModel, Sequence[int], Tensor], Tensor | None] | None = None
    finish_all_keys: Callable[[PreTrainedModel, Sequence[int], Tensor], Tensor | None] | None = None
    num_positions: Callable[[PreTrainedModel], int | None] = _stated_size
    rotary: bool = False
    sizes: Callable[[PreTrainedModel], Dimensions] = Dimensions.of
    far_keys_and_bias: Callable[[PreTrainedModel, int, Tensor], tuple[Tensor, Tensor | None]] | None = None
    absolute_positions: bool = False
    shallow_view: Callable[[PreTrainedModel, Tensor], PreTrainedModel] | None = None
    reads_first: bool = False
    with_layer_index: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    own_attention: bool = False
    last_layer_tokens: Callable[[nn.Module, Tensor], nn.Module] | None = None
    reads: str = "input_ids"
    feature_tokens: Callable[[PreTrainedModel, Tensor], int] | None = None
    with_own_pooler: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    check: Callable[[PreTrainedModel], None] | None = None
