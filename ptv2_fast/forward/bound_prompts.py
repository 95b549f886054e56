"""Encoder-decoder models with prompts: views whose two stacks each carry what is theirs.

`generate` calls the encoder once and the decoder again and again, so the prompts are bound to views of the stacks
instead of being among the arguments of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.attention import hook
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.locate import backbone_of, with_backbone
from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import visible_prompts, with_virtual_tokens
from ptv2_fast.forward.row_prompts import new_account
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.call import TextCall, read_text
from ptv2_fast.inputs.max_length import check_length
from ptv2_fast.inputs.right_padding import (
    ENCODER_STATES,
    HIDDEN_STATES,
    OUTPUT_STATES,
    change_states,
    reorder_tokens,
    to_right_padding,
)

# What these models count or know themselves; transformers would hand it on to every layer, unread.
_UNREAD = ("position_ids", "token_type_ids", "cu_seq_lens_q", "cu_seq_lens_k")
_OF_ENCODER = ("input_ids", "inputs_embeds", "attention_mask")


@dataclass(frozen=True)
class BoundPrompts:
    """The prompts of a call, or of all calls of one `generate`.

    Attributes:
        base: the frozen base.
        batch: the prompts of all layers; its index (R,) is of the rows that were named.
        offsets: "encoder" and "decoder" -> how far the text's positions are shifted, (R,) where the named rows differ.
        virtual: (P, D) virtual tokens that evolve in front of the encoder's text, or None.
        named: R, how many rows were named; 1 where all are alike.
    """

    base: FrozenBase
    batch: PromptBatch
    offsets: Mapping[str, int | Tensor]
    virtual: Tensor | None = None
    named: int = 1

    @property
    def length(self) -> int:
        """P virtual tokens that stand in the encoder's rows."""
        return 0 if self.virtual is None else self.virtual.shape[0]

    def around(self, target: PreTrainedModel) -> PreTrainedModel:
        """A view of a model, or of its backbone, with the prompts in both stacks; what it returns stands where a call
        has its tokens."""
        backbone = self.base.hooked(backbone_of(target))
        children = {"encoder": view_of(backbone.encoder, forward=self._encode)}
        children["decoder"] = view_of(backbone.decoder, forward=self._decode)
        return with_backbone(target, view_of(view_of(backbone, children=children), forward=self._run))

    def encoder(self) -> PreTrainedModel:
        """A view of the encoder alone with its prompts; what it returns has the N tokens of the text."""
        encoder = view_of(self.base.hooked(self.base.backbone).encoder, forward=self._encode)
        return view_of(encoder, forward=self._run_alone)

    def _run(self, original: Callable[..., Any], input_ids: Tensor | None = None, **call: Any) -> Any:
        """The whole backbone: what it derives the decoder's inputs from are rows with their tokens first."""
        call = self._given({"input_ids": input_ids, **call})
        back = None
        if not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(call):
            if "encoder_outputs" in call:
                raise ValueError("decoder_input_ids must be given with encoder_outputs")
            self._read_text({name: call[name] for name in _OF_ENCODER if name in call})
            if "input_ids" not in call:
                raise ValueError("decoder_input_ids must be given with inputs_embeds")
            call, back = to_right_padding(call)
            padding = self.base.backbone.config.pad_token_id
            if back is not None and padding is not None:
                # mBART counts what is no padding to find each row's last token, with which its decoder starts.
                call["input_ids"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, padding)
        output = original(**call)
        if self.length:
            change_states(output, ENCODER_STATES, lambda states: states[:, self.length :])
        if back is not None:
            change_states(output, (*OUTPUT_STATES, *HIDDEN_STATES), lambda states: reorder_tokens(states, back))
        return output

    def _run_alone(self, original: Callable[..., Any], input_ids: Tensor | None = None, **call: Any) -> Any:
        """The encoder without its decoder, which alone would read the states of virtual tokens."""
        output = original(**self._given({"input_ids": input_ids, **call}))
        if self.length:
            change_states(output, (*OUTPUT_STATES, *HIDDEN_STATES), lambda states: states[:, self.length :])
        return output

    def _given(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call without what is None.

        Raises:
            ValueError: something is given that the model does not read.
        """
        given = {name: value for name, value in call.items() if value is not None}
        unread = [name for name in _UNREAD if name in given]
        if unread:
            raise ValueError(f"{unread[0]} must be None: {type(self.base.backbone).__name__} has no use for it")
        return given

    def _encode(
        self,
        original: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The encoder: each row's tokens first, virtual tokens in front of them; states (B, P + N, D)."""
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        rows = self._read(original.__self__, given, others, "encoder").rows
        call, back = to_right_padding({name: value for name, value in given.items() if value is not None})
        if self.virtual is not None:
            words = call.pop("inputs_embeds", None)
            words = original.__self__.embed_tokens(call.pop("input_ids")) if words is None else words
            call["inputs_embeds"] = with_virtual_tokens(self.virtual, words)
            if back is not None:
                call["attention_mask"] = visible_prompts(call["attention_mask"], self.length)
                front = torch.arange(self.length, device=back.device).expand(rows, -1)
                back = torch.cat([front, back + self.length], dim=1)
        output = self._through(original, call, others, rows, "encoder")
        if back is not None:
            change_states(output, (*OUTPUT_STATES, *HIDDEN_STATES), lambda states: reorder_tokens(states, back))
        return output

    def _decode(
        self,
        original: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The decoder; its own padding may stand anywhere where no cache is kept.

        A mask (B, 1, M, L) is taken as it is, with positions that are slots.
        """
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        rows = self._read(original.__self__, given, others, "decoder").rows
        call: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        back = None
        if attention_mask is not None:
            if others.get(CACHE) is None and others.get("use_cache") is False:
                call, back = to_right_padding(call)
            else:
                self._check_kept_padding(attention_mask)
        self._check_encoded(encoder_hidden_states, encoder_attention_mask, rows)
        call["encoder_hidden_states"] = encoder_hidden_states
        call["encoder_attention_mask"] = visible_prompts(encoder_attention_mask, self.length)
        output = self._through(original, call, others, rows, "decoder")
        if back is not None:
            change_states(output, (*OUTPUT_STATES, *HIDDEN_STATES), lambda states: reorder_tokens(states, back))
        return output

    def _through(self, original: Any, call: dict[str, Any], others: dict[str, Any], rows: int, stack: str) -> Any:
        """One stack with its prompts, each row of the call with those of the row that was named for it."""
        first = self.base.sizes.encoder_layers
        own = range(first) if stack == "encoder" else range(first, len(self.batch.layers))
        layers = tuple(prompt if layer in own else None for layer, prompt in enumerate(self.batch.layers))
        index = self.batch.index
        if index is not None:
            # Beams and several returned sequences repeat each row in place.
            index = index.repeat_interleave(rows // self.named)
        batch = replace(self.batch, layers=layers, index=index, asked=new_account())
        run = self._shifted(original, rows, stack)
        output = run(**call, **others, ptv2_prompts=batch)
        batch.check_reached(type(original.__self__).__name__, len(own) if self.batch.layers else 1)
        return output

    def _shifted(self, original: Any, rows: int, stack: str) -> Any:
        """The stack's forward, with the text's learned positions shifted."""
        offset = self.offsets[stack]
        if isinstance(offset, int) and not offset:
            return original
        offset = offset.repeat_interleave(rows // self.named)[:, None] if isinstance(offset, Tensor) else offset

        def embed(
            original: Any, input_ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None
        ) -> Any:
            table = original.__self__
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=table.weight.device) + past_key_values_length
            return F.embedding(position_ids[None] + offset + table.offset, table.weight)  # (1 or B, N, D)

        module = original.__self__
        return view_of(module, children={"embed_positions": view_of(module.embed_positions, forward=embed)}).forward

    def _read(self, module: nn.Module, given: Mapping[str, Any], others: Mapping[str, Any], stack: str) -> TextCall:
        """A stack's text, read and known to fit beside its prompts.

        Args:
            module: the stack.
            given: its text and mask, as the stack calls them; others: its other keyword arguments.

        Raises:
            ValueError: an input is missing, of another shape, device or length; the message names it.
        """
        hook.check_served(others, module.config)
        mask = given["attention_mask"]
        if stack == "encoder" and isinstance(mask, Tensor) and mask.dim() != 2:
            # The decoder reads the encoder's tokens through the same mask.
            raise ValueError(f"attention_mask must have shape (B, N); got {tuple(mask.shape)}")
        # The encoder has no cache, though it may be handed the decoder's.
        prefix, cache = ("", None) if stack == "encoder" else ("decoder_", others.get(CACHE))
        static = getattr(cache, "is_compileable", False)  # for which `generate` makes a mask of all slots
        call = self._read_text({**given, CACHE: cache}, prefix, mask_of_slots=static)
        if call.rows % self.named:
            raise ValueError(f"adapter_names must name {call.rows} rows; got {self.named} names")
        length = call.length()
        if length is not None:
            offset = self.offsets[stack]
            most = int(offset.max()) if isinstance(offset, Tensor) else offset
            room = length + most + (self.length if stack == "encoder" else 0)
            check_length(self.base.backbone, self.base.family, room, f"{prefix}input_ids")
        return call

    def _read_text(self, inputs: Mapping[str, Any], prefix: str = "", *, mask_of_slots: bool = False) -> TextCall:
        family, backbone = self.base.family, self.base.backbone
        return read_text(inputs, family, backbone, backbone, prefix, mask_of_slots=mask_of_slots)

    def _check_encoded(self, states: Tensor | None, mask: Tensor | None, rows: int) -> None:
        if states is None:
            raise ValueError("input_ids, inputs_embeds or encoder_outputs must be given: the decoder reads its encoder")
        expected = (rows, states.shape[1] - self.length)
        if states.shape[0] != rows or (mask is not None and tuple(mask.shape) != expected):
            virtual = f", {self.length} virtual tokens in front of the text's," if self.length else ""
            raise ValueError(
                f"encoder_outputs and attention_mask must be of the decoder's {rows} rows and of the same "
                f"tokens{virtual} as this model's own encoder gives them; got states {tuple(states.shape)} and "
                f"{'no mask' if mask is None else f'a mask {tuple(mask.shape)}'}"
            )

    def _check_kept_padding(self, mask: Tensor) -> None:
        """Refuse padding that would count where the decoder's keys are kept in the order of their slots."""
        if mask.dim() != 2 or torch.compiler.is_compiling():
            return
        starts = F.pad(mask.bool().int(), (1, 0)).diff(dim=1) > 0  # (B, N), of runs of tokens
        # Where only distances count, padding around a row's tokens changes none.
        wrong = starts.sum(1) > 1 if self.base.family.relative_positions else starts[:, 1:].any(1)
        if bool(wrong.any()):
            raise ValueError(
                "decoder_attention_mask must have its padding at the right where a cache is kept (use_cache=False runs "
                "it anywhere); got padding in front of a row's tokens"
            )
