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
    """Prompts for classifying whole rows (task_type SEQ_CLS).

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS"))  # trains a copy of the base's head
        output = model(torch.tensor([[101, 7592, 102]]), labels=torch.tensor([2]))
        assert output.logits.shape == (1, 3) and output.loss > 0
        ```
    """

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
        """Logits (B, C) and, with labels (B,), the mean cross-entropy; `task` picks one of several heads.

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, D).
            attention_mask: (B, N) over the text alone, any padding side.
            labels: (B,) int64, or as `HeadConfig.problem_type` says; (B, N) for tags, -100 ignored.
            task: which head, where an adapter has several.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.
        """
        self._check_read(kwargs)
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        spans = {name: inputs.pop(name, None) for name in ("start_positions", "end_positions")}
        return self._run_task(inputs, adapter_names, task, {"labels": labels, **spans})


class PTuningV2ModelForTokenClassification(PTuningV2ModelForSequenceClassification):
    """Prompts for tagging tokens (task_type TOKEN_CLS): logits (B, N, C), labels (B, N), -100 ignored.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("TOKEN_CLS", heads={"tags": 5}))
        output = model(torch.tensor([[101, 7592, 102]]), labels=torch.tensor([[-100, 4, -100]]))
        assert output.logits.shape == (1, 3, 5)
        ```
    """

    task_type = "TOKEN_CLS"


class PTuningV2ModelForQuestionAnswering(PTuningV2ModelWithHeads):
    """Prompts for extractive question answering (task_type QUESTION_ANS).

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("QUESTION_ANS", heads={"span": 2}))
        ids = torch.tensor([[101, 2040, 102, 7592, 2088, 102]])
        output = model(ids, start_positions=torch.tensor([3]), end_positions=torch.tensor([4]))
        assert output.start_logits.shape == output.end_logits.shape == (1, 6)
        ```
    """

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
        """Start and end logits (B, N) over the text's own tokens and, with positions (B,), their mean loss.

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, D).
            attention_mask: (B, N) over the text alone, any padding side.
            start_positions: (B,) int64, the answer's first token, counted without the prompt.
            end_positions: (B,) int64, its last token.
            task: which head, where an adapter has several.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.
        """
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

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("MULTIPLE_CHOICE", heads={"score": 1}))
        ids = torch.tensor([[[101, 7592, 102], [101, 2088, 102]]])  # one example, two choices
        output = model(ids, labels=torch.tensor([1]))
        assert output.logits.shape == (1, 2)
        ```
    """

    task_type = "MULTIPLE_CHOICE"


class PTuningV2ModelForFeatureExtraction(PTuningV2ModelWithHeads):
    """Prompts for the backbone's hidden states themselves (task_type FEATURE_EXTRACTION), and for heads of any kind.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        heads = {"topic": HeadConfig("SEQ_CLS", 3), "tags": HeadConfig("TOKEN_CLS", 5)}
        model = get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION", heads=heads))
        ids = torch.tensor([[101, 7592, 102]])
        assert model(ids).last_hidden_state.shape == (1, 3, 32)
        assert model(ids, task="tags", labels=torch.tensor([[-100, 4, -100]])).logits.shape == (1, 3, 5)
        ```
    """

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

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, D).
            attention_mask: (B, N) over the text alone, any padding side.
            labels: what the head `task` is trained on; start_positions and end_positions for a head of spans.
            task: which head runs; None runs none.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.

        Raises:
            ValueError: labels are given without a task.
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
    """Prompts for classifying images (task_type IMAGE_CLS).

    Example:
        ```python
        import torch
        from transformers import ViTConfig, ViTModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
        model = get_ptv2_model(base, PTuningV2Config("IMAGE_CLS", heads={"kind": 10}))
        output = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([4, 7]))
        assert output.logits.shape == (2, 10)
        ```
    """

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
        """Logits (B, C) of images and, with labels, the mean cross-entropy.

        Args:
            pixel_values: (B, channels, height, width), as the base's processor makes them.
            labels: (B,) int64, or as `HeadConfig.problem_type` says.
            task: which head, where an adapter has several.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.
        """
        self._check_read(kwargs)
        return self._run_task({"pixel_values": pixel_values, **kwargs}, adapter_names, task, {"labels": labels})


class PTuningV2ModelForAudioClassification(PTuningV2ModelWithHeads):
    """Prompts for classifying sounds (task_type AUDIO_CLS).

    Example:
        ```python
        import torch
        from transformers import WhisperConfig, WhisperForAudioClassification

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "max_source_positions": 50}
        base = WhisperForAudioClassification(WhisperConfig(**sizes, num_labels=4))
        model = get_ptv2_model(base, PTuningV2Config("AUDIO_CLS"))
        output = model(torch.randn(1, 80, 100), labels=torch.tensor([3]))  # 80 bands, 100 frames
        assert output.logits.shape == (1, 4)
        ```
    """

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
        """Logits (B, C) of sounds and, with labels, the mean cross-entropy.

        Args:
            input_features: (B, bands, frames), as the base's feature extractor makes them.
            labels: (B,) int64, or as `HeadConfig.problem_type` says.
            task: which head, where an adapter has several.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.
        """
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

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))  # random weights
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=5, heads={"topic": 3}))
        output = model(torch.tensor([[101, 7592, 102]]), labels=torch.tensor([2]))
        output.loss.backward()  # gradients of the prompts and the head alone
        assert output.logits.shape == (1, 3)
        ```
    """
    if not isinstance(config, PTuningV2Config):
        raise ValueError(f"config must be a PTuningV2Config; got {type(config).__name__}")
    cls = MODEL_CLASSES[config.task_type]
    return cls(base, config, adapter_name, tokenizer=tokenizer, init_text=init_text, step_options=step_options)
