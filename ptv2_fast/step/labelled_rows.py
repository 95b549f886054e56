"""The loss of a causal language model from its labelled tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.heads import IGNORED_LABEL
from ptv2_fast.step.linear_cross_entropy import linear_cross_entropy

# Settings by which a model changes its logits after the head.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def has_plain_head(base: PreTrainedModel) -> bool:
    """Whether the model's logits are a linear map of its backbone's output, and its loss their cross-entropy alone."""
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        return False  # experts' load is balanced by a loss of its own
    changed = any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_CHANGES)
    return type(base.get_output_embeddings()) is nn.Linear and not changed


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
