"""Attention that is a model's own code, with a term for the distance of two tokens, run through the hook.

Where a prompt stands. The score of a query and a key depends on the distance between them, so a prompt key needs one:
it stands so far in front of the text that no distance counts any more. Every query sees it in the bucket of the
farthest token in front of it, the same for every query and every virtual token, whatever their number. This holds for
deep prompts and for prefixes alike; a prefix is the numbers that stand in place of a layer's projected keys, before any
term of position. Shallow prompts on these encoders are rows of the batch and stand where they are, right in front of
the text. Distances of the text's own tokens are what they are without a prompt.

Neither the heads of such a model nor its backbone hand unknown keyword arguments on. A view made for one call gives the
backbone its prompts, and what an attention module has to know travels as an argument that layers hand on unread: in the
place of the attention mask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.attention.hook import attention_forward
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.view import view_of, with_modules


@dataclass(frozen=True)
class AttentionCall:
    """What one forward pass tells every attention module.

    Attributes:
        mask: (B, N) nonzero at real tokens, (B, 1, N, N) bool or additive, or None.
        prompts: the prompts of this forward pass, or None.
        record: a deque to which the (key, value) of every layer is appended, or None.
    """

    mask: Tensor | None
    prompts: PromptBatch | None
    record: deque[tuple[Tensor, Tensor]] | None

    def at(self, layer: int) -> AttentionCall:
        """The call for one layer alone."""
        return self if self.prompts is None else replace(self, prompts=self.prompts.at(layer))


def given_prompts(backbone: PreTrainedModel, prompts: PromptBatch) -> PreTrainedModel:
    """A view of a backbone, for one call, that runs with these prompts whatever its caller hands on."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "ptv2_prompts": prompts})

    return view_of(backbone, forward=forward)


def with_attention(backbone: PreTrainedModel, paths: Sequence[str], attend: Callable[..., Any]) -> PreTrainedModel:
    """A view of a backbone whose attention modules know their layer and run `attend`.

    Args:
        paths: of the attention modules in the backbone, layer by layer.
        attend: called as attend(original_forward, hidden states, call, ...) with an AttentionCall where the module
            itself is given a mask.
    """
    attentions = {
        path: view_of(backbone.get_submodule(path), attributes={"layer_idx": layer}, forward=attend)
        for layer, path in enumerate(paths)
    }
    return with_modules(backbone, attentions)


def heads(states: Tensor, head_dim: int) -> Tensor:
    """(..., H, N, d), a view of (..., N, H * d)."""
    return states.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def attended(
    module: nn.Module, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """(B, N, H * d) what a layer's queries read, prompt included.

    Args:
        module: the attention module, with its `dropout` and `layer_idx`.
        query, key, value: (B, H, N, d).
        bias: (1 or B, H, N, N) added to the text's scores, or None.
    """
    output, _ = attention_forward(
        module,
        query,
        key,
        value,
        call.mask,
        scaling=scale,
        dropout=module.dropout.p if module.training else 0.0,
        is_causal=False,
        score_bias=bias,
        ptv2_prompts=call.prompts,
        ptv2_record=call.record,
    )
    return output.flatten(2)
