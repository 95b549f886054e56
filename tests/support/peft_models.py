"""Tiny models in PEFT, with prompts and heads that matter, and what they give for the text's own tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from batches import Batch
from tiny_models import tiny_base

LENGTH = 3


def peft_model(family: str, task: str, kind: str, *, base_changes: dict | None = None, **config):
    """A PeftModel in eval mode over a tiny base; `kind` is PEFT's own name of the method, P_TUNING for instance."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft.PeftType, kind):
        pytest.skip(f"this PEFT has no {kind}")
    base = tiny_base(family, task, **(base_changes or {}))
    settings = {"peft_type": kind, "task_type": task, "num_virtual_tokens": LENGTH, **config}
    model = peft.get_peft_model(base, peft.get_peft_config(settings))
    trained(model)
    return model.eval()


def trained(model) -> None:
    """Move what trains by steps large enough to see."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)


def logits_of(output) -> Tensor:
    """What a task's model says: logits, of a question the start's, or hidden states."""
    if isinstance(output, transformers.modeling_outputs.QuestionAnsweringModelOutput):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def said(model, batch: Batch, task: str, **inputs) -> Tensor:
    """Logits of each row, or of the text's real tokens one row after the other.

    PEFT's prompt tuning has P places in front of them.
    """
    logits = logits_of(model(**batch.inputs, **inputs))
    if task == "SEQ_CLS":
        return logits
    width = batch.input_ids.shape[1]
    return torch.cat([batch.real(logits[:, -width:], row) for row in range(len(logits))])


def counted(batch: Batch) -> Tensor:
    """Position ids that count each row's real tokens."""
    return (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
