"""Padding dropped once before the first layer and put back, as zeros, after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of
from ptv2_fast.inputs.cache import CACHE

_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch stand.

    Attributes:
        rows, tokens: B and N of the padded batch.
        index: (T,) positions of the real tokens in the flattened (B, N).
        cu_seqlens: (B + 1,) int32, boundaries of the rows among the T tokens.
        longest: the most real tokens of a row.
    """

    rows: int
    tokens: int
    index: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, mask: Tensor, index: Tensor | None = None) -> Packing:
        """Read a mask (B, N), nonzero at real tokens; waits for the device.

        Args:
            index: where it is nonzero, flattened, if that is known.
        """
        lengths = mask.bool().sum(-1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max()) if lengths.numel() else 0
        rows, tokens = mask.shape
        return cls(rows, tokens, _nonzero(mask) if index is None else index, cu_seqlens, longest)

    @classmethod
    def of_padded(cls, mask: Tensor) -> Packing | None:
        """The same; None where there is no padding, or nothing else."""
        index = _nonzero(mask)
        return None if index.numel() in (0, mask.numel()) else cls.of(mask, index)

    def places(self, tokens: Tensor) -> Tensor:
        """Where tokens (R,) of the flattened (B, N) stand among the T real tokens; T for padding."""
        count = self.index.numel()
        found = torch.searchsorted(self.index, tokens)
        is_real = self.index.index_select(0, found.clamp(max=max(count - 1, 0))) == tokens if count else found < 0
        return torch.where(is_real, found, count)

    def pack(self, padded: Tensor) -> Tensor:
        """(B or 1, N, ...) -> (1, T, ...): the real tokens, row after row."""
        full = padded.expand(self.rows, *padded.shape[1:])
        return full.reshape(self.rows * self.tokens, *padded.shape[2:]).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, ...) -> (B, N, ...), zero at padding."""
        padded = packed.new_zeros(self.rows * self.tokens, *packed.shape[2:])
        return padded.index_copy(0, self.index, packed[0]).unflatten(0, (self.rows, self.tokens))


def _nonzero(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().flatten()


def can_unpad(inputs: Mapping[str, Any]) -> bool:
    """Whether a call has a padding mask and nothing that ties its tokens to slots (a cache, packed rows)."""
    mask = inputs.get("attention_mask")
    tied = inputs.get(CACHE) is not None or inputs["ptv2_prompts"].cu_seqlens is not None
    return isinstance(mask, Tensor) and mask.dim() == 2 and not tied


def unpadded(backbone: PreTrainedModel, packing: Packing) -> PreTrainedModel:
    """A view of a backbone that runs over real tokens only and returns the padded batch, zeros at padding.

    It is called like the backbone, with the prompts and (B, N) position ids among its inputs. Its outputs equal those
    of the padded run at every real token.
    """
    return _with_states(backbone, lambda call: _packed_call(call, packing), packing.unpack)


def zero_at_padding(backbone: PreTrainedModel, mask: Tensor) -> PreTrainedModel:
    """A view of a backbone that runs over padding too, and returns what `unpadded` does.

    Args:
        mask: (B, N), nonzero at real tokens.
    """
    hidden = (mask == 0)[..., None]
    return _with_states(backbone, lambda call: call, lambda states: states.masked_fill(hidden, 0.0))


def _with_states(
    backbone: PreTrainedModel, given: Callable[[dict[str, Any]], dict[str, Any]], made: Callable[[Tensor], Tensor]
) -> PreTrainedModel:
    """A view of a backbone that is called with other arguments and gives other states, which its pooler reads too.

    Args:
        given: from its own arguments to the backbone's.
        made: from the backbone's states to (B, N, ...).
    """
    # A pooler reads whole rows: it runs on the padded output instead.
    pooler = getattr(backbone, "pooler", None)
    inner = view_of(backbone, children={"pooler": None}) if pooler is not None else backbone

    def forward(original: Callable[..., Any], input_ids: Tensor | None = None, **call: Any) -> Any:
        call = {"input_ids": input_ids, **call}
        # The view's own call has run the backbone's hooks.
        output = original(**given(call))
        output.last_hidden_state = made(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(made(state) for state in output.hidden_states)
        # Heads read the pooled output by its place, which an attribute set later does not have.
        return output if pooler is None else replace(output, pooler_output=pooler(output.last_hidden_state))

    return view_of(inner, forward=forward)


def _packed_call(call: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """The backbone's arguments for the packed batch."""
    packed = {name: value for name, value in call.items() if value is not None}
    for name in _TOKEN_INPUTS:
        if name in packed:
            packed[name] = packing.pack(packed[name])
    # With a mask at hand transformers does not look for packed rows itself.
    packed["attention_mask"] = torch.ones_like(packed["position_ids"], dtype=torch.bool)
    packed["use_cache"] = False
    packed["ptv2_prompts"] = replace(call["ptv2_prompts"], cu_seqlens=packing.cu_seqlens, max_seqlen=packing.longest)
    return packed
