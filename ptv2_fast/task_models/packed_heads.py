"""The loss of a packed batch through the head of an adapter, its own or its copy of the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ptv2_fast.adapter import Adapter
from ptv2_fast.backbone.locate import with_backbone
from ptv2_fast.backbone.view import view_of
from ptv2_fast.families.family import Family
from ptv2_fast.families.registry import is_listed
from ptv2_fast.losses import LOSSES, base_targets, chosen_loss, classification_loss, span_loss
from ptv2_fast.step.packed import PackedBatch, PackedTask, packed_inputs, packed_labels
from ptv2_fast.task_models.captured import CapturedModel
from ptv2_fast.task_types import SINGLE_LABEL, TASKS

# What transformers' own classifiers compare, by what they solve.
_BASE_LOSSES = {
    SINGLE_LABEL: F.cross_entropy,
    "regression": lambda logits, numbers: F.mse_loss(logits.view_as(numbers), numbers),
    "multi_label_classification": F.binary_cross_entropy_with_logits,
}


class PackedHeads(CapturedModel):
    """What the tasks with trained heads share of packed batches."""

    def packed_task(self) -> PackedTask:
        """By what a batch is packed for the active adapter."""
        adapter = self.adapters[self.active_adapter]
        if adapter.heads:
            head = next(iter(adapter.heads.values()))
            return PackedTask(head.config.task_type, head.pooling, head.config.problem_type)
        task_type = adapter.config.task_type
        if TASKS[task_type].gives != "row":
            return PackedTask(task_type)
        classes = None if adapter.labels is None else len(adapter.labels)
        return _task_of_classifier(task_type, self.base_model.config, classes, self._family)

    def why_not_packed(self) -> str | None:
        """Why the active adapter's loss cannot be computed of a `PackedBatch`; None where it can."""
        adapter = self.adapters[self.active_adapter]
        if len(adapter.heads) > 1:
            return "the adapter has several heads"
        task = self.packed_task()
        if chosen_loss(self.base_model) is not None and (adapter.heads or task.gives != "token"):
            return "the loss is another one than its task's"
        if not TASKS[task.task_type].packs:
            return f"a {task.task_type} batch is no text"
        reason = None if adapter.heads or task.gives == "token" else self._why_not_known(task)
        return reason or super().why_not_packed()

    def _why_not_known(self, task: PackedTask) -> str | None:
        """Why it is not known what the base's own head reads; None where it is."""
        base, config = self.base_model, self.base_model.config
        if not type(base).__module__.startswith("transformers.") or not is_listed(self.backbone):
            return f"what {type(base).__name__} reads of a row is not known: it is no listed model of transformers"
        if task.gives == "span":
            return None
        if task.pooling == "last" and task.padding_id is None:
            return "the base's configuration names no padding token, by which its classifier finds the last one"
        if task.in_groups:
            plain = task.pooling != "mean" and getattr(config, "summary_type", "first") == "first"
            return None if plain else "the base's head reads more of a choice than its first token"
        if task.problem_type == "regression" and config.problem_type is None:
            return "the base's forward has not set its problem_type yet"
        return None if task.problem_type in _BASE_LOSSES else f"the base's problem_type is {task.problem_type!r}"

    def packed_output(self, packed: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """As `CapturedModel` says."""
        if reason := self.why_not_packed():
            raise ValueError(f"packed must suit the active adapter: {reason}")
        adapter, task = self.adapters[self.active_adapter], self.packed_task()
        if task.gives == "span":
            return self._packed_span(packed, adapter)
        if task.gives == "row":
            return self._packed_rows(packed, adapter, task)
        if adapter.heads:
            logits = adapter.head(None)(self.packed_states(packed)[None], None)[0]
            return classification_loss(logits, packed.targets), logits
        base, labels = adapter.base_with_head(self.base_model), packed_labels(packed)
        targets = base_targets(base, task.task_type, (1, labels.shape[1]), {"labels": labels})
        output = self.run(base, {**packed_inputs(packed), **targets})
        return output.loss, output.logits[0]

    def _packed_rows(self, packed: PackedBatch, adapter: Adapter, task: PackedTask) -> tuple[Tensor, Tensor]:
        """The loss of rows and their logits (K, C)."""
        states, mask = self.packed_rows(packed, task.pooling)
        if adapter.heads:
            logits = adapter.head(None)(states, mask)
        else:
            logits = self._base_head(adapter, states, {"attention_mask": mask}).logits
        if task.in_groups:
            logits = logits.view(-1, packed.width)
        if adapter.heads or task.in_groups:
            return LOSSES[task.problem_type](logits, packed.targets), logits
        base = adapter.base_with_head(self.base_model)
        targets = base_targets(base, task.task_type, (logits.shape[0], None), {"labels": packed.targets})["labels"]
        return _BASE_LOSSES[task.problem_type](logits, targets), logits

    def _packed_span(self, packed: PackedBatch, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """The loss of spans and the logits (K, W, 2) of slots: those of padding are of a state of zeros."""
        states = self.run(self.backbone, packed_inputs(packed)).last_hidden_state
        states = F.pad(states, (0, 0, 0, 1))
        if adapter.heads:
            of_tokens = adapter.head(None)(states, None)[0]
        else:
            output = self._base_head(adapter, states, {})
            of_tokens = torch.stack((output.start_logits[0], output.end_logits[0]), -1)
        slots, count = packed.tokens[:, None], states.shape[1] - 1
        # Not gathered from the last one: gradients of many slots would be added to it in any order.
        real = of_tokens.index_select(0, packed.tokens.clamp(max=count - 1))
        logits = torch.where(slots < count, real, of_tokens[-1]).masked_fill(slots > count, -torch.inf)
        logits = logits.view(-1, packed.width, 2)
        start, end = packed.targets.unbind(-1)
        if adapter.heads:
            return span_loss(logits, start, end), logits
        of_starts, of_ends = logits.unbind(-1)
        return (F.cross_entropy(of_starts, start) + F.cross_entropy(of_ends, end)) / 2, logits

    def _base_head(self, adapter: Adapter, states: Tensor, inputs: Mapping[str, Any]) -> Any:
        """The output of the base whose backbone gives these last states (B, N, D), by the adapter's copy of its head.

        Args:
            inputs: keyword arguments of the head.
        """
        base, backbone = adapter.base_with_head(self.base_model), self.backbone
        # In the view that knows its layers a pooler is a module whole.
        hooked = self._follow_backbone().hooked
        pooler = getattr(hooked.with_layer_index(hooked.attention(backbone)), "pooler", None)
        pooled = None if pooler is None else pooler(states)
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)
        still = view_of(backbone, forward=lambda *_, **__: output)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return with_backbone(base, still)(input_ids=ids, **inputs)


def _task_of_classifier(task_type: str, config: Any, classes: int | None, family: Family) -> PackedTask:
    """What a base's own classifier reads of each row, and what it solves.

    Args:
        config: the base's configuration.
        classes: how many there are, where they are not the configuration's.
    """
    pooling, padding_id = "first", None
    if family.causal and not family.reads_first:
        pooling, padding_id = "last", config.get_text_config().pad_token_id
    elif getattr(config, "classifier_pooling", None) == "mean":
        pooling = "mean"
    problem = SINGLE_LABEL
    if not TASKS[task_type].in_groups:
        count = config.num_labels if classes is None else classes
        problem = config.problem_type or ("regression" if count == 1 else SINGLE_LABEL)
    return PackedTask(task_type, pooling, problem, padding_id)
