"""The model class of the task SENTENCE_RETRIEVAL: texts as vectors, trained on texts that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ptv2_fast.adapter import BASE_ROW
from ptv2_fast.inputs.arguments import named_arguments
from ptv2_fast.inputs.pooling import pool, tokens_read
from ptv2_fast.inputs.text import text_size
from ptv2_fast.losses import in_batch_negatives_loss
from ptv2_fast.step.packed import PackedBatch, PackedTask
from ptv2_fast.task_models.captured import CapturedModel
from ptv2_fast.task_models.groups import flat_rows, names_of_rows
from ptv2_fast.task_models.mixed_rows import normalised
from ptv2_fast.task_models.task_model import for_tasks, text_inputs


@dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """What `PTuningV2ModelForSentenceRetrieval` gives.

    Attributes:
        loss: (), where the rows are groups of texts that belong together.
        embeddings: (B, D) of length 1, or (B, G, D); float32, or float64 of a base in float64. A row without a real
            token has zeros by the pooling "mean".
        hidden_states: the backbone's, of the B (or B G) rows, where they are asked for.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SENTENCE_RETRIEVAL", pooling="mean")).eval()
        output = model(torch.tensor([[101, 7592, 102], [101, 2088, 102]]))
        assert output.embeddings.shape == (2, 32) and output.loss is None
        print(output.embeddings @ output.embeddings.T)  # cosines
        ```
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class PTuningV2ModelForSentenceRetrieval(CapturedModel):
    """Prompts for finding texts by their meaning (task_type SENTENCE_RETRIEVAL): pooled states, no head.

    In training the inputs are (B, G, N): a query, the text that belongs to it, and G - 2 that do not. All rows run in
    one forward, and the other examples' texts count as ones that do not belong to a query either.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SENTENCE_RETRIEVAL"))
        pairs = torch.randint(1000, 2000, (4, 2, 6))  # four queries, each with the text that belongs to it
        assert model(pairs).loss > 0
        vectors = model.encode(pairs[:, 0])
        assert vectors.shape == (4, 32)
        ```
    """

    task_type = "SENTENCE_RETRIEVAL"

    @for_tasks("SENTENCE_RETRIEVAL")
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_loss: bool = True,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embeddings (B, D) of texts (B, N); (B, G, D) of groups (B, G, N), with the loss of in-batch negatives.

        Args:
            input_ids: (B, N), or (B, G, N); or inputs_embeds with an axis more.
            attention_mask: as input_ids.
            return_loss: whether groups are compared.
            adapter_names: one name for each text, or for each group.
        """
        self._check_read(kwargs)
        if kwargs.pop("task", None) is not None:
            raise ValueError("task must be None: pooled states are the output, and no head reads them")
        if kwargs.pop("labels", None) is not None:
            raise ValueError("labels must be None: a text's place in its group says what it is")
        inputs = text_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        grouped = isinstance(input_ids, Tensor) and input_ids.dim() == 3 and input_ids.shape[1] > 1
        if return_loss and input_ids is not None and grouped and self._may_capture():
            # A query's own text is the first one of its group: there is nothing more to say.
            captured = self._captured(inputs, torch.zeros(input_ids.shape[0], dtype=torch.long), adapter_names)
            if captured is not None:
                return self._as_asked(SentenceEmbeddingOutput(captured[0], captured[1][0]), kwargs.get("return_dict"))
        groups = None
        if _is_grouped(input_ids, inputs_embeds):
            inputs, groups = flat_rows(inputs)
            if return_loss and groups[1] < 2:
                raise ValueError(f"input_ids must hold a query and a text for each example; got rows {groups[1]}")
            adapter_names = names_of_rows(adapter_names, groups)
            if return_loss and adapter_names is not None and len(set(adapter_names)) > 1:
                raise ValueError("return_loss must be False with several adapters in one batch: train one at a time")
        embeddings, states = self._embedded(inputs, adapter_names)
        loss = None
        if groups is not None:
            embeddings = embeddings.unflatten(0, groups)
            loss = in_batch_negatives_loss(embeddings) if return_loss else None
        output = SentenceEmbeddingOutput(loss=loss, embeddings=embeddings, hidden_states=states)
        return self._as_asked(output, kwargs.get("return_dict"))

    @torch.no_grad()
    def encode(self, *args: Any, **inputs: Any) -> Tensor:
        """Embeddings (B, D) of length 1, of texts (B, N) that are given as to `forward`; without gradients.

        Raises:
            ValueError: a row's adapter is for another task.
        """
        given = {**named_arguments(self.forward, args), **inputs}
        others = [task for task in self.tasks_of(given.get("adapter_names")) if task != self.task_type]
        if others and not self._disabled:
            raise ValueError(f"adapter_names must be for {self.task_type}, which encodes; got {', '.join(others)}")
        embeddings: Tensor = self(**{**given, "return_loss": False, "return_dict": True}).embeddings
        return embeddings

    def packed_task(self) -> PackedTask:
        """By what a batch is packed: every text is compared with every query, so none may be added."""
        return PackedTask("SENTENCE_RETRIEVAL", self._pooling(self.active_adapter), whole=True)

    def packed_output(self, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        """As `CapturedModel` says."""
        if reason := self.why_not_packed():
            raise ValueError(f"packed must suit the active adapter: {reason}")
        pooling = self._pooling(self.active_adapter)
        pooled = pool(*self.packed_rows(packed, pooling), pooling)
        embeddings = normalised(pooled).unflatten(0, (-1, packed.width))
        return in_batch_negatives_loss(embeddings), embeddings

    def _embedded(
        self, inputs: dict[str, Any], adapter_names: Sequence[str] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Pooled states (R, D) of length 1, and the hidden states where they are asked for."""
        names = self._row_names(adapter_names, text_size(inputs)[0])
        poolings = {name: self._pooling(name) for name in names}
        first = poolings[names[0]]
        alike = len(set(poolings.values())) == 1
        read = tokens_read(inputs, first) if alike else None
        output = self._run_states(inputs, adapter_names, read)
        hidden, mask = output.last_hidden_state, inputs.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 else None
        if alike:
            pooled = pool(hidden, mask, first, read)
        else:
            rows = [slice(row, row + 1) for row in range(hidden.shape[0])]
            masks = [None if mask is None else mask[row] for row in rows]
            each = zip(rows, masks, names, strict=True)
            pooled = torch.cat([pool(hidden[row], own, poolings[name]) for row, own, name in each])
        return normalised(pooled), output.hidden_states

    def _pooling(self, name: str) -> str:
        config = self.adapters[self.active_adapter if name == BASE_ROW else name].config
        return config.pooling or ("last" if self._family.causal else "mean")


def _is_grouped(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> bool:
    axes = {"input_ids": (input_ids, 3), "inputs_embeds": (inputs_embeds, 4)}
    return any(isinstance(value, Tensor) and value.dim() == count for value, count in axes.values())
