"""The model class of the task CAUSAL_LM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptv2_fast.backbone.view import view_of
from ptv2_fast.base_methods import refuse_unserved
from ptv2_fast.inputs.arguments import named_arguments
from ptv2_fast.inputs.cache import CACHE, with_cache_name
from ptv2_fast.inputs.text import text_size
from ptv2_fast.losses import IGNORED_LABEL, causal_loss, check_labels, chosen_loss
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.step.labelled_rows import (
    kept_items,
    labelled_rows_loss,
    labelled_tokens,
    predictable_labels,
    why_not_labelled_rows,
)
from ptv2_fast.step.linear_cross_entropy import linear_cross_entropy
from ptv2_fast.step.packed import PackedBatch, PackedTask
from ptv2_fast.task_models.captured import CapturedModel
from ptv2_fast.task_models.captured_decode import CapturedDecode
from ptv2_fast.task_models.continuous_batching import ContinuousBatching
from ptv2_fast.task_models.other_forward import with_prompted_backbone
from ptv2_fast.task_models.task_model import for_tasks, text_inputs


class PTuningV2ModelForCausalLM(ContinuousBatching, CapturedModel):
    """Prompts for a causal language model (task_type CAUSAL_LM).

    Example:
        ```python
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
        model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM", injection="prefix"))
        ids = torch.tensor([[5, 6, 7]])
        assert model(ids, labels=ids).loss > 0
        assert model.eval().generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 7)
        ```
    """

    task_type = "CAUSAL_LM"
    # The base's loss divides by Trainer's num_items_in_batch, the labels of all accumulated batches.
    accepts_loss_kwargs = True

    @for_tasks("CAUSAL_LM")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's output: logits (B, N, V), the cache of the text alone, and the loss of shifted labels (B, N).

        A row's first token has nothing before it: its label counts nowhere, on whichever side the padding is.

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, D).
            attention_mask: (B, N) over the text alone, any padding side; with a cache over what is in it, too.
            labels: (B, N) int64, the input's own ids; -100 is ignored.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes; num_items_in_batch is Trainer's count of the labels behind the first
                column, in this batch and in those that are accumulated with it.
        """
        if kwargs.pop("task", None) is not None:
            raise ValueError("task must be None: a causal language model has the one head of its base")
        self._check_read(kwargs)
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        if labels is None:
            output = self.run(self.base_model, inputs, adapter_names)
            return self._as_asked(output, kwargs.get("return_dict"))
        check_labels("labels", labels, self.base_model.config.get_text_config().vocab_size, text_size(inputs))
        count = kwargs.get("num_items_in_batch")
        beside = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        captured = self._captured(beside, labels, adapter_names, count) if self._may_capture() else None
        if captured is not None:
            return self._as_asked(CausalLMOutputWithPast(captured[0]), kwargs.get("return_dict"))
        call = self._predictable({**inputs, "labels": labels})
        plan = self.step_plan()
        if plan.labelled_rows_loss and not self._disabled and why_not_labelled_rows(self.base_model, call) is None:
            output = self._run_labelled_rows(call, adapter_names)
        else:
            output = self.run(self._with_its_loss(), call, adapter_names)
        return self._as_asked(output, kwargs.get("return_dict"))

    def _with_its_loss(self) -> PreTrainedModel:
        """The base; where transformers takes a loss by default and logs that, breaking graphs, a view that has it."""
        base = self.base_model
        if chosen_loss(base) is not None or getattr(base, "loss_type", None) in LOSS_MAPPING:
            return base
        return view_of(base, attributes={"_loss_function": causal_loss(base)})

    def _predictable(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a call without the labels that nothing predicts, nor their share of Trainer's count."""
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        if labels is None or self._disabled or inputs.get("shift_labels") is not None:
            return inputs
        kept = predictable_labels(labels, mask)
        count = kept_items(inputs.get("num_items_in_batch"), labels, kept)
        return {**inputs, "labels": kept} | ({} if count is None else {"num_items_in_batch": count})

    def _run_labelled_rows(self, inputs: dict[str, Any], adapter_names: Sequence[str] | None) -> Any:
        """The loss alone: logits are computed for labelled tokens only, a chunk at a time, and not returned."""
        count = inputs.pop("num_items_in_batch", None)
        inputs.pop("logits_to_keep", None)
        tokens, targets = labelled_tokens(inputs.pop("labels"))
        output = self.run(self.backbone, inputs, adapter_names, read=tokens)
        head = self.base_model.get_output_embeddings()
        loss = labelled_rows_loss(output.last_hidden_state, tokens, targets, head, count)
        return CausalLMOutputWithPast(loss=loss, hidden_states=output.hidden_states)

    def __setattr__(self, name: str, value: Any) -> None:
        """As everywhere; a forward that trl's trainers set gets the backbone with the prompts."""
        super().__setattr__(name, with_prompted_backbone(self, value) if name == "forward" else value)

    @property
    def loss_type(self) -> str:
        """The base's, or the one that transformers takes where it knows no other; Trainer counts labels by it."""
        own = getattr(self.base_model, "loss_type", None)
        return own if own in LOSS_MAPPING else "ForCausalLM"

    @loss_type.setter
    def loss_type(self, loss_type: str) -> None:
        self.base_model.loss_type = loss_type

    def _get_name(self) -> str:
        """The base's name, by which Trainer's label smoothing knows that labels are one token ahead of logits."""
        name = self.base_model._get_name()
        return name if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "LlamaForCausalLM"

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def packed_task(self) -> PackedTask:
        """By what a batch is packed for the active adapter."""
        return PackedTask("CAUSAL_LM")

    def why_not_packed(self) -> str | None:
        """Why the loss cannot be computed of a `PackedBatch`; None where it can."""
        return why_not_labelled_rows(self.base_model, {}) or super().why_not_packed()

    def packed_output(self, packed: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """As `CapturedModel` says; without logits."""
        if reason := self.why_not_packed():
            raise ValueError(f"packed must suit the active adapter: {reason}")
        head = self.base_model.get_output_embeddings()
        total = linear_cross_entropy(self.packed_states(packed), head.weight, head.bias, packed.targets)
        return total / (packed.targets != IGNORED_LABEL).sum().clamp(min=1), None

    def _generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        first_pass: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` of rows that write text, all of them.

        Args:
            first_pass: asked for the output of each pass before the model runs, until it has given one.
        """
        refuse_unserved(kwargs.get("generation_config") or self.generation_config, kwargs, seq2seq=False)
        base = self._follow_backbone()
        model, target = self.for_one_call(), base.hooked.whole(base.model)
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, PTuningV2Model):
            kwargs["assistant_model"] = assistant.for_one_call()
        # Made by the first of several threads.
        captured = self.__dict__.setdefault("_captured_decode", CapturedDecode())
        with torch.no_grad(), captured.call(model, base, adapter_names, args, kwargs) as decode:

            def forward(original: Any, *args: Any, **inputs: Any) -> Any:
                # generate calls with keywords, logits processors with positions too; what they leave out stays out.
                given = {**named_arguments(original, args), **inputs}
                output = None if first_pass is None else first_pass(model, adapter_names, given)
                if output is None and decode is not None:
                    output = decode(given)
                return model.run(target, given, adapter_names) if output is None else output

            slots = {} if decode is None else {CACHE: decode.cache}
            output = view_of(target, forward=forward).generate(*args, **with_cache_name(kwargs), **slots)
            if decode is not None and not isinstance(output, Tensor):
                # The next call writes to that memory.
                output[CACHE] = decode.cache.as_dynamic(base.model.config)
            return output
