"""The model classes of the tasks: their forward signatures, heads and losses.

Trainer reads a model's labels off its class name and forward signature, so each task has a class of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.config import PTuningV2Config
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.step.options import StepOptions
from ptv2_fast.task_models.causal_lm import PTuningV2ModelForCausalLM
from ptv2_fast.task_models.pipelines import name_in_pipelines
from ptv2_fast.task_models.retrieval import PTuningV2ModelForSentenceRetrieval
from ptv2_fast.task_models.seq2seq import PTuningV2ModelForSeq2SeqLM
from ptv2_fast.task_models.task_model import for_tasks, text_inputs
from ptv2_fast.task_models.with_heads import PTuningV2ModelWithHeads
from ptv2_fast.task_types import TASKS


class PTuningV2ModelForSequenceClassification(PTuningV2ModelWithHeads):
    """Prompts for classifying whole rows (task_type SEQ_CLS)."""

    task_type = "SEQ_CLS"

    @for_tasks("SEQ_CLS", "TOKEN_CLS", "MULTIPLE_CHOICE")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, C) and, with labels (B,), the mean cross-entropy; `task` picks one of several heads."""
        self._check_read(kwargs)
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        spans = {name: inputs.pop(name, None) for name in ("start_positions", "end_positions")}
        return self._run_task(inputs, adapter_names, task, {"labels": labels, **spans})


class PTuningV2ModelForTokenClassification(PTuningV2ModelForSequenceClassification):
    """Prompts for tagging tokens (task_type TOKEN_CLS): logits (B, N, C), labels (B, N), -100 ignored."""

    task_type = "TOKEN_CLS"


class PTuningV2ModelForQuestionAnswering(PTuningV2ModelWithHeads):
    """Prompts for extractive question answering (task_type QUESTION_ANS)."""

    task_type = "QUESTION_ANS"

    @for_tasks("QUESTION_ANS")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        task: str | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Start and end logits (B, N) over the text's own tokens and, with positions (B,), their mean loss."""
        self._check_read(kwargs)
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        targets = {
            "labels": inputs.pop("labels", None),
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        return self._run_task(inputs, adapter_names, task, targets)


class PTuningV2ModelForMultipleChoice(PTuningV2ModelForSequenceClassification):
    """Prompts for choosing one of C texts (task_type MULTIPLE_CHOICE): each is a row with a score.

    Inputs are (B, C, N), as transformers' own multiple-choice models take them, adapter_names one name an example;
    logits (B, C) and, with labels (B,), their mean cross-entropy.
    """

    task_type = "MULTIPLE_CHOICE"


class PTuningV2ModelForFeatureExtraction(PTuningV2ModelWithHeads):
    """Prompts for the backbone's hidden states themselves (task_type FEATURE_EXTRACTION), and for heads of any kind."""

    task_type = "FEATURE_EXTRACTION"

    @for_tasks("FEATURE_EXTRACTION")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        task: str | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's output, last_hidden_state (B, N, D); with `task` the output of that head instead.

        Of an encoder-decoder it is the decoder's, or the encoder's where adapters have heads, which read that.
        Images and sounds are given by name, as pixel_values and input_features.
        """
        self._check_read(kwargs)
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        targets = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        if task is not None:
            return self._run_task(inputs, adapter_names, task, targets)
        given = [name for name, target in targets.items() if target is not None]
        if given:
            raise ValueError(f"task must name the head that {', '.join(given)} belong to; got None")
        return self._as_asked(self._run_without_head(inputs, adapter_names), kwargs.get("return_dict"))


class PTuningV2ModelForImageClassification(PTuningV2ModelWithHeads):
    """Prompts for classifying images (task_type IMAGE_CLS)."""

    task_type = "IMAGE_CLS"

    @for_tasks("IMAGE_CLS")
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, C) of images (B, C, H, W) and, with labels (B,), the mean cross-entropy."""
        self._check_read(kwargs)
        return self._run_task({"pixel_values": pixel_values, **kwargs}, adapter_names, task, {"labels": labels})


class PTuningV2ModelForAudioClassification(PTuningV2ModelWithHeads):
    """Prompts for classifying sounds (task_type AUDIO_CLS)."""

    task_type = "AUDIO_CLS"

    @for_tasks("AUDIO_CLS")
    def forward(  # type: ignore[override]
        self,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, C) of spectrograms (B, M, F) and, with labels (B,), the mean cross-entropy."""
        self._check_read(kwargs)
        return self._run_task({"input_features": input_features, **kwargs}, adapter_names, task, {"labels": labels})


MODEL_CLASSES: dict[str, type[PTuningV2Model]] = {
    "SEQ_CLS": PTuningV2ModelForSequenceClassification,
    "TOKEN_CLS": PTuningV2ModelForTokenClassification,
    "QUESTION_ANS": PTuningV2ModelForQuestionAnswering,
    "MULTIPLE_CHOICE": PTuningV2ModelForMultipleChoice,
    "CAUSAL_LM": PTuningV2ModelForCausalLM,
    "SEQ_2_SEQ_LM": PTuningV2ModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PTuningV2ModelForFeatureExtraction,
    "SENTENCE_RETRIEVAL": PTuningV2ModelForSentenceRetrieval,
    "IMAGE_CLS": PTuningV2ModelForImageClassification,
    "AUDIO_CLS": PTuningV2ModelForAudioClassification,
}

# transformers' pipelines know models by their class's name.
name_in_pipelines({kind: TASKS[name].pipelines for name, kind in MODEL_CLASSES.items()})


def get_ptv2_model(
    base: PreTrainedModel,
    config: PTuningV2Config,
    adapter_name: str = "default",
    *,
    tokenizer: Callable[..., Any] | None = None,
    init_text: str | Sequence[str] | None = None,
    step_options: StepOptions | None = None,
) -> PTuningV2Model:
    """Freeze a transformers model and give it trained prompts.

    Args:
        base: a model of a supported family: a task model (AutoModelFor...), whose head is copied
            and trained, or a backbone (AutoModel) with `config.heads`.
        config: how prompts are injected and what they are for.
        adapter_name: the name of the first adapter.
        tokenizer: splits `init_text` into tokens.
        init_text: a text, or several, for prompts that start as what the model computes for it.
        step_options: which savings of a training step are on; None means each where it is exact and pays.

    Returns:
        The PTuningV2ModelFor... of `config.task_type`.

    Raises:
        ValueError: base and configuration do not fit together.
    """
    if not isinstance(config, PTuningV2Config):
        raise ValueError(f"config must be a PTuningV2Config; got {type(config).__name__}")
    cls = MODEL_CLASSES[config.task_type]
    return cls(base, config, adapter_name, tokenizer=tokenizer, init_text=init_text, step_options=step_options)
