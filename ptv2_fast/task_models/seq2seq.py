"""The model class of the task SEQ_2_SEQ_LM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput

from ptv2_fast.base_methods import refuse_unserved
from ptv2_fast.inputs.cache import with_cache_name
from ptv2_fast.inputs.right_padding import ENCODER_STATES, change_states
from ptv2_fast.losses import check_labels, chosen_loss
from ptv2_fast.step.packed import PackedTask
from ptv2_fast.task_models.captured import CapturedModel
from ptv2_fast.task_models.task_model import for_tasks


class PTuningV2ModelForSeq2SeqLM(CapturedModel):
    """Prompts for an encoder-decoder that writes text (task_type SEQ_2_SEQ_LM).

    Example:
        ```python
        import torch
        from transformers import BartConfig, BartForConditionalGeneration

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        base = BartForConditionalGeneration(BartConfig(vocab_size=100, d_model=32, **layers))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_2_SEQ_LM", stacks=["encoder", "decoder"]))
        ids = torch.tensor([[0, 5, 6, 7, 2]])
        output = model(ids, labels=torch.tensor([[8, 9, 2]]))
        assert output.logits.shape == (1, 3, 100)
        print(model.eval().generate(ids, max_new_tokens=4))
        ```
    """

    task_type = "SEQ_2_SEQ_LM"

    @for_tasks("SEQ_2_SEQ_LM")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's output: logits (B, M, V) of the decoder's tokens, and the mean loss of labels (B, M), but -100.

        Args:
            input_ids: (B, N) the encoder's; or inputs_embeds (B, N, D), or encoder_outputs of an earlier call.
            attention_mask: (B, N) of the encoder's text, padding anywhere.
            decoder_input_ids: (B, M); left out with labels, from which the base derives them.
            decoder_attention_mask: (B, M), or with a cache of everything in it too; padding anywhere where no cache is
                kept, at the right where one is, or in front too where only distances count (T5). Or (B, 1, M, L) over
                the L cached and new tokens, bool or additive, whose positions are slots.
            labels: (B, M) int64, -100 ignored.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
        """
        self._check_read(kwargs)
        if kwargs.pop("task", None) is not None:
            raise ValueError("task must be None: an encoder-decoder has the one head of its base")
        if self.training and labels is None and decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "labels or decoder_input_ids must be given in training; where Trainer takes the labels away (label "
                "smoothing), DataCollatorForSeq2Seq(tokenizer, model=model) makes decoder_input_ids of them"
            )
        if labels is not None:
            beside = [x for x in (decoder_input_ids, decoder_inputs_embeds, labels) if isinstance(x, Tensor)]
            check_labels("labels", labels, self.base_model.config.vocab_size, beside[0].shape[:2] if beside else ())
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            **kwargs,
        }
        if (captured := self._captured_written(inputs, adapter_names)) is not None:
            return self._as_asked(captured, kwargs.get("return_dict"))
        return self._as_asked(self.run(self.base_model, inputs, adapter_names), kwargs.get("return_dict"))

    def _captured_written(self, inputs: Mapping[str, Any], adapter_names: Sequence[str] | None) -> Any:
        """The output of a captured pass; None where the call runs as any other does."""
        if not isinstance(inputs["labels"], Tensor) or not self._may_capture():
            return None
        batch = dict(self.packable(inputs, self.packed_task()))
        captured = self._captured(batch, batch.pop("labels"), adapter_names)
        if captured is None:
            return None
        loss, (logits, states) = captured
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=states)

    def packed_task(self) -> PackedTask:
        """By what a batch is read: rows stay padded, in sizes that repeat."""
        return PackedTask("SEQ_2_SEQ_LM")

    def why_not_packed(self) -> str | None:
        """Why steps are not computed of a `PaddedBatch`; None where they are."""
        return None if chosen_loss(self.base_model) is None else "the loss is another one than its task's"

    def packable(self, batch: Mapping[str, Any], task: PackedTask) -> Mapping[str, Any]:
        """A batch with the inputs of the decoder, as the base derives them from labels."""
        labels = batch.get("labels")
        if batch.get("decoder_input_ids") is not None or not isinstance(labels, Tensor):
            return batch
        return {**batch, "decoder_input_ids": self.base_model.prepare_decoder_input_ids_from_labels(labels=labels)}

    def packed_outputs(self, packed: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss of a `PaddedBatch`, its logits (B, M, V) and the encoder's states (B, N, D)."""
        output = self.run(self.base_model, packed.tensors())
        return output.loss, (output.logits, output.encoder_last_hidden_state)

    def packed_output(self, packed: Any) -> tuple[Tensor, Tensor | None]:
        """As `CapturedModel` says, of a `PaddedBatch`."""
        loss, (logits, _) = self.packed_outputs(packed)
        return loss, logits

    def _generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """`generate` of the base with the prompts in its encoder and in every step of its decoder."""
        refuse_unserved(kwargs.get("generation_config") or self.generation_config, kwargs, seq2seq=True)
        bound, base = self._bound_prompts(adapter_names), self._follow_backbone()
        with torch.no_grad():
            output = bound.around(base.hooked.whole(base.model)).generate(*args, **with_cache_name(kwargs))
        if bound.length and not isinstance(output, Tensor):
            change_states(output, ENCODER_STATES, lambda states: states[:, bound.length :])
        return output
