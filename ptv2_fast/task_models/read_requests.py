"""Requests that generate nothing: what their text's last states say, or a head of the adapter's own makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from ptv2_fast.adapter import Adapter
from ptv2_fast.backbone.locate import backbone_of, part_at, with_backbone
from ptv2_fast.backbone.view import in_eval, view_of, with_modules
from ptv2_fast.families.family import Family
from ptv2_fast.heads import Head
from ptv2_fast.task_types import TASKS

# What heads may give: of one row, since a request is one.
_READ = ("row", "token", "span")


@dataclass
class HeadOutput(GenerationOutput):
    """The result of a request that generates nothing: transformers' own, with no tokens, and what was read.

    Attributes:
        logits: what the adapter's head gives for the request's N tokens, on the CPU: (C,) of a head over rows, (N, C)
            over tokens, (N, 2) of starts and ends. None where there is no head, or the request failed.
        last_hidden_state: (N, D) the backbone's last states, on the CPU, where the adapter has no head; else None.

    Example:
        ```python
        from transformers import ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
        model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM"), "writer")
        topic = HeadConfig("SEQ_CLS", 3, pooling="last")
        model.add_adapter("topics", PTuningV2Config("SEQ_CLS", heads={"topic": topic}))
        pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        names = ["writer", "topics"]
        results = model.generate_batch(
            [[5, 6, 7], [8, 9]], continuous_batching_config=pages, adapter_names=names, max_new_tokens=4
        )
        written, read = results.values()
        assert len(written.generated_tokens) == 4 and read.logits.shape == (3,)
        ```
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Reading:
    """What is read of a request's text, while it comes part by part."""

    def __init__(self, head: Head | None) -> None:
        self._head = None if head is None else in_eval(head)
        self._parts: list[Tensor] = []
        self._found: Tensor | None = None

    @classmethod
    def of(cls, adapter: Adapter | None, name: str, task: str | None) -> Reading | None:
        """What a request of an adapter reads; None where it generates.

        Args:
            name: the adapter's, for messages.
            task: the head's name; None where it is the only one, or there is none.

        Raises:
            ValueError: there is no such head, or it reads more than one text.
        """
        if adapter is not None and len(adapter.heads):
            head = adapter.head(task)
            kind = TASKS[head.config.task_type]
            if kind.gives in _READ and not kind.in_groups:
                return cls(head)
        elif task is not None:
            raise ValueError(f"task must be None where the request's adapter has no heads; got {task!r} for {name!r}")
        elif adapter is None or TASKS[adapter.config.task_type].gives == "text":
            return None
        elif TASKS[adapter.config.task_type].gives == "states":
            return cls(None)
        raise ValueError(
            "adapter_name must be of an adapter that generates, gives states or has a head over the text of one "
            f"request; got {name!r}, of task_type {adapter.config.task_type!r}"
        )

    def take(self, past: int, states: Tensor, ends: bool) -> None:
        """Read the next states (n, D) of a text, which stand behind `past` others.

        A request whose pages were taken away comes again from the beginning, or from where it was.

        Args:
            ends: no part comes after this one.
        """
        known = sum(map(len, self._parts))
        if known < past:
            raise RuntimeError(f"a request's states must come in one piece; {known} of {past} are there")
        if known > past:
            self._parts = [torch.cat(self._parts)[:past]]
        self._parts.append(states)
        if not ends:
            return
        read = torch.cat(self._parts)
        self._parts = []
        self._found = (read if self._head is None else self._head(read[None], None)[0]).cpu()

    def output(self, of: GenerationOutput) -> HeadOutput:
        """A request's result, with what was read of it."""
        kept: dict[str, Any] = {field.name: getattr(of, field.name) for field in fields(of)}
        kept |= {"generated_tokens": [], "logprobs": []}
        if self._head is None:
            return HeadOutput(**kept, last_hidden_state=self._found)
        return HeadOutput(**kept, logits=self._found)


def noting_states(target: PreTrainedModel, family: Family) -> PreTrainedModel:
    """A view of a model that appends its backbone's last states (1, T, D) to the keyword argument `ptv2_states`.

    Some models call their backbone, others (OPT) the part of it that has the layers.
    """
    backbone, path = backbone_of(target), family.layers_path.rpartition(".")[0]
    if path:
        backbone = with_modules(backbone, {path: view_of(part_at(backbone, path), forward=_noting)})
    return with_backbone(target, view_of(backbone, forward=_noting))


def noted(states: list[Tensor]) -> Tensor:
    """The last states that a step noted.

    Raises:
        RuntimeError: there are none.
    """
    if not states:
        raise RuntimeError("base must hand the keyword argument ptv2_states on to its backbone; nothing was noted")
    return states[-1]


def _noting(original: Callable[..., Any], *args: Any, ptv2_states: list[Tensor] | None = None, **inputs: Any) -> Any:
    output = original(*args, **inputs)
    if ptv2_states is not None:
        ptv2_states.append(output.last_hidden_state)
    return output
