"""The loss of a causal language model from its labelled tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.registry import listed_family
from ptv2_fast.losses import IGNORED_LABEL, causal_loss
from ptv2_fast.step.linear_cross_entropy import linear_cross_entropy

# Settings by which a model changes its logits after the head.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def why_not_labelled_rows(base: PreTrainedModel, inputs: Mapping[str, Any]) -> str | None:
    """Why a causal model's loss is not the cross-entropy of a linear map of its backbone's output; None where it is.

    Args:
        inputs: what the model is called with beside the labels.
    """
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    if type(head) is not nn.Linear or any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_CHANGES):
        return "the model changes its logits after the head"
    if type(head.weight) is not nn.Parameter:
        return f"the head's weight is a {type(head.weight).__name__}"
    family = listed_family(backbone_of(base))
    if family is None:
        return "the family is not listed, and its head may do more than a linear map"
    if not family.linear_head:
        return "the family's head does more than a linear map"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return "somebody hooks the head"
    if causal_loss(base) is not ForCausalLMLoss or inputs.get("shift_labels") is not None:
        return "the loss is another one than transformers' own"
    if balances_experts(base, inputs):
        return "experts' load is balanced by a loss of its own"
    return "the model is spread over devices" if getattr(base, "hf_device_map", None) else None


def balances_experts(base: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether the routers' logits are asked for, of all tokens: the loss then has a part that reads them."""
    asked = inputs.get("output_router_logits")
    if asked is None:
        config = base.config
        # Every step asks, and to look for the text's part of a configuration is slow: a backbone has its own.
        config = config if config is backbone_of(base).config else config.get_text_config()
        asked = getattr(config, "output_router_logits", False)
    return bool(asked)


def predictable_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels (B, N) without those of tokens that follow padding: nothing of their own row predicts them.

    With padding at the right, that is the label of slot 0, which no loss reads.
    """
    if attention_mask is None or attention_mask.shape != labels.shape:
        return labels
    after_padding = torch.nn.functional.pad(attention_mask[:, :-1] == 0, (1, 0))
    return labels.masked_fill(after_padding, IGNORED_LABEL)


def kept_items(count: Tensor | int | None, labels: Tensor, kept: Tensor) -> Tensor | None:
    """Trainer's count of labels without those that nothing predicts, which it counts too, by their share in this batch.

    Exact where a step is one batch of one process; where it has several, each weighs as Trainer counted its labels.

    Args:
        count: labels of all accumulated batches behind the first column; None gives None.
        labels: (B, N), this batch's.
        kept: (B, N), what `predictable_labels` left of them.
    """
    if count is None:
        return None
    counted, left = ((one[:, 1:] != IGNORED_LABEL).sum().clamp(min=1) for one in (labels, kept))
    return count * (left / counted)


def labelled_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens predict a label, and the labels: (R,) positions in the flattened (B, N), and (R,) targets.

    Args:
        labels: (B, N); the label of token i is compared with the prediction of token i - 1; -100 is ignored.
    """
    tokens = labels.shape[1]
    targets = labels[:, 1:].flatten()
    index = (targets != IGNORED_LABEL).nonzero().flatten()
    before = torch.div(index, tokens - 1, rounding_mode="floor") * tokens + index % (tokens - 1)
    return before, targets.index_select(0, index)


def labelled_rows_loss(
    hidden: Tensor,
    tokens: Tensor,
    targets: Tensor,
    head: nn.Linear,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token at every labelled position.

    Args:
        hidden: (B, N, D), the backbone's output.
        tokens, targets: what `labelled_tokens` gives.
        head: the model's output embedding.
        num_items_in_batch: divide the sum by this (Trainer's count over accumulated batches) instead of by this
            batch's own number of labels.
    """
    rows = hidden.flatten(0, 1).index_select(0, tokens)
    total = linear_cross_entropy(rows, head.weight, head.bias, targets)
    return total / (max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch)
