"""What the rest of the package needs to know about a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.models.dimensions import Dimensions
from ptv2_fast.models.projection import Projection


def _stated_size(backbone: PreTrainedModel) -> int | None:
    return getattr(backbone.config, "max_position_embeddings", None)


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
        normed_together, finished_together: (backbone, layer indices, (L, P, D) or (L, P, Hkv, d)) -> what `normed` and
            `finished` give for each of these layers, by operations on all of them; None, or gives None, where they must
            be asked one by one.
        first_position: (backbone) -> the position id of a row's first token.
        table_size: (backbone) -> how many positions its table of learned ones has; None where it has no table.
        rotary: positions are rotary: only differences count, there is no table of them, and a
            prompt stands at -P..-1 before a text at 0.. whatever its injection.
        sizes: (backbone) -> its sizes, one layer for every attention that may have a prompt.
        positioned: (backbone, layer index, keys (Hkv, P, d)) -> the keys, and what is added to their scores (H, P) or
            None, of tokens that stand so far in front of the text that no distance between them counts
            (`own_attention` says more); for families that add a term for the distance of two tokens to their score.
            None elsewhere.
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
        reads: the main input of its forward: "input_ids", a text; or "pixel_values" or "input_features", which have no
            padding and no positions that a call could give.
        feature_tokens: (backbone, main input) -> how many rows N it becomes, the first of which pools the others; for
            families that read no text. None where no row does.
        pooled: a view of a backbone, called with the rows as the caller gave them, whose pooler reads each row's own
            token; for families whose own pooler may read another's, or padding.
        refuse: raises ValueError for a backbone of the family whose configuration nobody made right; None where there
            is none.
    """

    causal: bool
    layers: Callable[[PreTrainedModel], nn.ModuleList]
    normed: Callable[[PreTrainedModel, int, Tensor], Tensor]
    projections: Callable[[PreTrainedModel, int], tuple[Projection, Projection]]
    finished: Callable[[PreTrainedModel, int, Tensor], Tensor]
    first_position: Callable[[PreTrainedModel], int]
    normed_together: Callable[[PreTrainedModel, Sequence[int], Tensor], Tensor | None] | None = None
    finished_together: Callable[[PreTrainedModel, Sequence[int], Tensor], Tensor | None] | None = None
    table_size: Callable[[PreTrainedModel], int | None] = _stated_size
    rotary: bool = False
    sizes: Callable[[PreTrainedModel], Dimensions] = Dimensions.of
    positioned: Callable[[PreTrainedModel, int, Tensor], tuple[Tensor, Tensor | None]] | None = None
    by_slot: bool = False
    shallow_view: Callable[[PreTrainedModel, Tensor], PreTrainedModel] | None = None
    reads_first: bool = False
    indexed: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    own_attention: bool = False
    read_rows: Callable[[nn.Module, Tensor], nn.Module] | None = None
    reads: str = "input_ids"
    feature_tokens: Callable[[PreTrainedModel, Tensor], int] | None = None
    pooled: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    refuse: Callable[[PreTrainedModel], None] | None = None
