"""How a PTuningV2Model runs an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.adapter import BASE_ROW
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.hooked import Hooked
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.config import HEAD_TASKS, PTuningV2Config
from ptv2_fast.forward.bound_prompts import BoundPrompts
from ptv2_fast.inputs.cache import CACHE

_BY_DEFAULT = ("encoder", "decoder")


class EncoderDecoder(nn.Module):
    """What a PTuningV2Model knows of encoders with decoders; mixed into it."""

    _hooked: Hooked

    def _run_stacks(
        self, target: PreTrainedModel, inputs: Mapping[str, Any], adapter_names: Sequence[str] | None
    ) -> Any:
        """Call `target`, an encoder-decoder, its backbone or a view of either, with prompts in both stacks."""
        own = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "encoder_outputs")
        given = [name for name in own if name in inputs]
        if given and self.adapters[self.active_adapter].config.task_type in HEAD_TASKS:
            raise ValueError(f"{given[0]} must be None: the head reads the decoder at the tokens of the encoder's text")
        if self.training:
            self._check_checkpointing()
            if inputs.get(CACHE) is None:
                inputs = {"use_cache": False, **inputs}
        self.step_plan()
        return self._bound_prompts(adapter_names).around(target)(**inputs)

    def _bound_prompts(self, adapter_names: Sequence[str] | None) -> BoundPrompts:
        """The prompts of the rows that are named, for any number of calls.

        Raises:
            ValueError: a name is unknown, or adapters that no batch can have together.
        """
        self._follow_backbone()
        names = self._named(adapter_names)
        configs = [None if name == BASE_ROW else self.adapters[name].config for name in names]
        evolving = any(config is not None and config.injection == "shallow" for config in configs)
        if evolving and len(names) > 1:
            raise ValueError(
                "adapter_names must not mix a shallow prompt on an encoder-decoder with other adapters: its virtual "
                f"tokens are rows of the batch; got {sorted(set(names))}"
            )
        backend = self.adapters[self.active_adapter].config.backend
        virtual = index = None
        if evolving:
            layers: tuple = ()
            virtual = self.adapters[names[0]].encoder().to(self.backbone.dtype)
        else:
            layers, bank = self._prompts(names, backend)
            index = None if bank is None else torch.tensor(bank, device=device_of(self.backbone))
        return BoundPrompts(
            self.backbone,
            self._family,
            self._hooked,
            PromptBatch(layers, index, backend=backend),
            {stack: self._offsets(configs, stack) for stack in ("encoder", "decoder")},
            virtual,
            len(adapter_names) if adapter_names else 1,
        )

    def _named(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        """The adapters that were named, row by row; a single one where all rows have the same."""
        if adapter_names is None:
            return (self.active_adapter,)
        if isinstance(adapter_names, str) or not adapter_names:
            raise ValueError(f"adapter_names must be one name per row; got {adapter_names!r}")
        for name in set(adapter_names) - {BASE_ROW}:
            self._check_name(name)
        return tuple(adapter_names) if len(set(adapter_names)) > 1 else (adapter_names[0],)

    def _offsets(self, configs: Sequence[PTuningV2Config | None], stack: str) -> int | Tensor:
        """How far a stack's positions are shifted: by the offset of an adapter that prompts its self-attention."""
        offsets = [
            config.position_offset or 0
            if config is not None and config.injection != "shallow" and stack in (config.stacks or _BY_DEFAULT)
            else 0
            for config in configs
        ]
        return offsets[0] if len(set(offsets)) == 1 else torch.tensor(offsets, device=device_of(self.backbone))
