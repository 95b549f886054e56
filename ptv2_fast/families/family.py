"""What the rest of the package needs to know about a model family: where its parts are, and what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.locate import part_at
from ptv2_fast.backbone.norms import normed_together
from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.tokens import mlp_of_tokens
from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.families.dimensions import Dimensions

# The main inputs that a call is read for.
READS = ("input_ids", "pixel_values", "input_features")
# What is asked of one layer -> the same of several layers at once.
_OF_SEVERAL = {"attention_input": "attention_inputs", "finish_keys": "finish_all_keys"}


class Family:
    """What differs between model families.

    A family is a subclass that says where the parts of its models are, and overrides a method only where they are odd:
    as it stands, the class below is a post-norm encoder without positions of its own. An instance has no state: all of
    one class are equal.

    Attributes:
        causal: text cannot see what stands after it; a shallow prompt then runs through the stack on its own.
        reads: the main input of its forward: "input_ids", a text; or "pixel_values" or "input_features", which have no
            padding and no positions that a call could give.
        reads_first: the family's own sequence classifier reads slot 0 of each row.
        rotary: positions are rotary: only differences count, there is no table of them, and a prompt stands at -P..-1
            before a text at 0.. whatever its injection.
        absolute_positions: positions are slots of the batch, whatever ids a call gives: rows run with their tokens
            first.
        relative_positions: scores have a term for the distance of two tokens; prompts that are keys stand so far in
            front of the text that no distance between them counts (`backbone.own_attention` says more).
        own_attention: attention does not run through transformers' attention interface; that of the view
            `with_layer_index` does run through the hook.
        own_pooler: the model's pooler may read another row's token, or padding; `with_own_pooler` makes it right.
        linear_head: logits of a causal language model are a linear map of its backbone's last states; a scale or a cap
            that its configuration names is seen without this.
        skips_unread_tokens: `last_layer_tokens` is right for its layers: as it stands, for pre-norm ones that call an
            `mlp` on states alone.
        layer_index: the attribute by which attention modules of the view `with_layer_index` know their layer:
            "layer_idx", or "prompt_layer" where `layer_idx` means something else. None where the model's own modules
            have a `layer_idx`.
        layers_path: where the layers are in a backbone.
        norm_path: the norm before attention, in a layer; None where attention reads a layer's input as it is.
        attention_path: the attention module, in a layer.
        key_path: the projection of keys, in an attention module.
        value_path: the projection of values, there too.

    Example:
        ```python
        from ptv2_fast.families.family import Family
        from ptv2_fast.families.llama import Llama

        class PostNorm(Family):  # layers in `layers`, attention in `self_attn`, and so on: as below
            layers_path = "encoder.layers"

        class MyModel(Llama):  # like Llama, but for three names
            attention_path, key_path, value_path = "attention", "wk", "wv"

        assert MyModel().causal and not PostNorm().causal
        ```
    """

    causal: bool = False
    reads: str = "input_ids"
    reads_first: bool = False
    rotary: bool = False
    absolute_positions: bool = False
    relative_positions: bool = False
    own_attention: bool = False
    own_pooler: bool = False
    linear_head: bool = True
    skips_unread_tokens: bool = False
    layer_index: str | None = None

    layers_path: str = "layers"
    norm_path: str | None = None
    attention_path: str = "self_attn"
    key_path: str = "k_proj"
    value_path: str = "v_proj"

    def __init_subclass__(cls, **options: Any) -> None:
        """Who overrides what is asked of one layer, and not what is asked of several, is asked layer by layer.

        A class that the family is mixed with may be the one that overrides it.
        """
        super().__init_subclass__(**options)
        for one, several in _OF_SEVERAL.items():
            if _place_of(one, cls) < _place_of(several, cls):
                setattr(cls, several, _one_by_one)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse a backbone of the family whose configuration nobody made right.

        Raises:
            ValueError: the message says what base must have, and what it has.
        """

    def sizes(self, backbone: PreTrainedModel) -> Dimensions:
        """Its sizes, one layer for every attention that may have a prompt."""
        return Dimensions.of(backbone)

    def layers(self, backbone: PreTrainedModel) -> nn.ModuleList:
        """The backbone's transformer layers in order."""
        layers: nn.ModuleList = part_at(backbone, self.layers_path)
        return layers

    def num_attentions(self, backbone: PreTrainedModel) -> int:
        """How many layers may have a prompt, counted in the backbone itself."""
        return len(self.layers(backbone))

    def path_of_attention(self, backbone: PreTrainedModel, layer: int) -> str:
        """Where the attention module of a layer is in the backbone."""
        return f"{self.layers_path}.{layer}.{self.attention_path}"

    def attention_paths(self, backbone: PreTrainedModel) -> list[str]:
        """`path_of_attention` of all layers that may have a prompt."""
        return [self.path_of_attention(backbone, layer) for layer in range(self.num_attentions(backbone))]

    def attention_input(self, backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
        """What a layer's projections read of states (P, D), (P, D)."""
        if self.norm_path is None:
            return states
        normed: Tensor = part_at(self.layers(backbone)[layer], self.norm_path)(states)
        return normed

    def attention_inputs(self, backbone: PreTrainedModel, layers: Sequence[int], states: Tensor) -> Tensor | None:
        """`attention_input` of several layers' states (L, P, D), by operations on all of them; None where they must be
        asked one by one."""
        if self.norm_path is None:
            return states
        own = self.layers(backbone)
        return normed_together([part_at(own[layer], self.norm_path) for layer in layers], states)

    def projections(self, backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
        """The projections that make a layer's keys and its values."""
        attention = part_at(backbone, self.path_of_attention(backbone, layer))
        key, value = (linear_projection(part_at(attention, path)) for path in (self.key_path, self.value_path))
        return key, value

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Projected keys (P, Hkv, d) as attention reads them, for tokens that stand right before the text.

        Those of R prompts at once come as (P, R * Hkv, d), prompt by prompt.
        """
        return keys

    def finish_all_keys(self, backbone: PreTrainedModel, layers: Sequence[int], keys: Tensor) -> Tensor | None:
        """`finish_keys` of several layers' keys (L, P, Hkv, d), by operations on all of them; None where they must be
        asked one by one."""
        return keys

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (..., P, Hkv, d) turned as attention does it; for families with `rotary`.

        Args:
            keys: the projected ones.
            cos: the table (P, 1, size) of the P positions, in the order and size in which the backbone's
                `rotary_emb` gives it.
            sin: the same.
        """
        return rotary.rotate(keys, cos, sin)

    def far_keys_and_bias(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The keys (Hkv, P, d), and what is added to their scores (H, P) or None, of tokens that stand so far in front
        of the text that no distance between them counts; for families with `relative_positions`."""
        return keys, None

    def first_position(self, backbone: PreTrainedModel) -> int:
        """The position id of a row's first token."""
        return 0

    def num_positions(self, backbone: PreTrainedModel) -> int | None:
        """How many positions its table of learned ones has; None where it has no table."""
        return getattr(backbone.config, "max_position_embeddings", None)

    def feature_tokens(self, backbone: PreTrainedModel, features: Tensor) -> int | None:
        """How many rows N a main input that is no text becomes, the first of which pools the others; None where no row
        does."""
        return None

    @property
    def has_shallow_view(self) -> bool:
        """Whether somebody wrote `shallow_view`."""
        return type(self).shallow_view is not Family.shallow_view

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the backbone with virtual tokens (P, E) that evolve in front of the text.

        For bidirectional families only.

        Raises:
            NotImplementedError: nobody wrote it for this family.
        """
        raise NotImplementedError(f"{type(self).__name__} has no shallow_view")

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of a backbone, or of a view of it, whose attention modules know their layer and run through the hook;
        the backbone itself where its own do."""
        if self.layer_index is None:
            return backbone
        views: dict[str, nn.Module] = {
            path: view_of(part_at(backbone, path), attributes={self.layer_index: layer})
            for layer, path in enumerate(self.attention_paths(backbone))
        }
        return with_modules(backbone, views)

    def with_own_pooler(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of a backbone, called with the rows as the caller gave them, whose pooler reads each row's own token;
        the backbone itself where its pooler does so anyway."""
        return backbone

    def last_layer_tokens(self, layer: nn.Module, index: Tensor) -> nn.Module:
        """A view of the last layer that works on the tokens `index` (R,) of the flattened (B, N) from its attention on,
        and leaves the others undefined; for families with `skips_unread_tokens`."""
        return mlp_of_tokens(layer, index)


def _place_of(name: str, cls: type) -> int:
    """How far up among its bases a class has a method from."""
    return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))


def _one_by_one(family: Family, backbone: PreTrainedModel, layers: Sequence[int], states: Tensor) -> None:
    """Nothing for several layers at once."""
