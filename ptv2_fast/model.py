"""PTuningV2Model: a frozen transformers model with trained prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.adapter_set import AdapterSet
from ptv2_fast.attention import hook
from ptv2_fast.attention.prompt_batch import Account, PromptBatch
from ptv2_fast.backbone.locate import backbone_of, with_backbone
from ptv2_fast.backbone.own_attention import given_prompts
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.backbone.tokens import gather_tokens
from ptv2_fast.backbone.view import outside_graphs
from ptv2_fast.base_attributes import BaseAttributes
from ptv2_fast.base_methods import BaseMethods
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.forward.encoder_decoder import EncoderDecoder
from ptv2_fast.forward.gradient_checkpointing import Recomputation
from ptv2_fast.inputs.cache import CACHE, cached_tokens, with_cache_name
from ptv2_fast.inputs.features import check_features, input_size, reads_text
from ptv2_fast.inputs.max_length import check_length, text_limit
from ptv2_fast.inputs.right_padding import with_right_padding
from ptv2_fast.inputs.sliding_window import check_cached_padding, counts_padding, smallest_window
from ptv2_fast.inputs.text import (
    check_beside,
    check_inputs,
    full_mask,
    packed_positions,
    packing_from_cu_seqlens,
    packing_from_positions,
    text_positions,
)
from ptv2_fast.prompts.cache import PromptCache, Prompts
from ptv2_fast.saving.mixin import Persistence
from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.labelled_rows import balances_experts
from ptv2_fast.step.options import StepOptions, StepPlan, logger, plan_step
from ptv2_fast.step.packed import PackedBatch, packed_inputs
from ptv2_fast.step.unpad import Packing, can_unpad, unpadded
from ptv2_fast.typed_modules import ModuleDictOf


class PTuningV2Model(BaseAttributes, BaseMethods, AdapterSet, Persistence, EncoderDecoder, Recomputation):
    """A frozen transformers model whose attention layers also see trained prompts.

    The base keeps its code, its weights and its outputs' shapes: prompts enter as keys and values
    inside attention, so every output has the N rows of the text. One model holds any number of
    adapters over one base.

    Use `get_ptv2_model` to build the subclass that fits a task.
    """

    # Trainer: our losses are means over a batch's own labels, so it divides by its accumulation steps itself.
    accepts_loss_kwargs = False
    # What trains is never quantized, whatever the base is; Trainer refuses models that say they are.
    is_quantized = False

    def __init__(
        self,
        base: PreTrainedModel,
        config: PTuningV2Config,
        adapter_name: str = "default",
        *,
        tokenizer: Callable[..., Any] | None = None,
        init_text: str | Sequence[str] | None = None,
        step_options: StepOptions | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Freeze `base` and create the first adapter.

        Args:
            base: a transformers model of a supported family; it is changed in one way: its parameters no longer
                require gradients. Its own calls, and other wrappers over it, go on as they were.
            config: the adapter's configuration.
            adapter_name: the adapter's name.
            tokenizer, init_text: the text for `prompt_init="text"`, and what splits it into tokens.
            step_options: which savings of a training step are on; may be replaced at any time.
            adapter: a ready adapter (a loaded one) to take instead of a fresh one for `config`.

        Raises:
            ValueError: base, configuration and task do not fit together.
        """
        super().__init__()
        if not isinstance(base, PreTrainedModel):
            raise ValueError(f"base must be a transformers PreTrainedModel; got {type(base).__name__}")
        hook.check_served({}, backbone_of(base).config)
        self._look_at(backbone_of(base))
        self._kept = PromptCache()
        if adapter is None:
            adapter = self._new_adapter(base, config, tokenizer, init_text)
        self.step_options = StepOptions() if step_options is None else step_options
        self._logged_plans: set[StepPlan] = set()
        self._last_plan: tuple[tuple[Any, ...], StepPlan] | None = None
        self.base_model = base
        self.adapters = ModuleDictOf()
        self.active_adapter = adapter_name
        self._check_unused(adapter_name)
        base.requires_grad_(False)
        self._initialise(adapter, tokenizer, init_text)
        self._register(adapter_name, adapter)
        self._is_made = True

    @classmethod
    def of_adapters(
        cls, base: PreTrainedModel, adapters: Mapping[str, tuple], first: str, *, is_trainable: bool
    ) -> PTuningV2Model:
        """A model of the first adapter's task with ready adapters over a base, the one named `first` active.

        Args:
            adapters: name -> (configuration, tensors, labels), as `saving.checkpoint.load_adapters` gives them.
            is_trainable: whether `first` goes on training; otherwise everything is frozen and in eval mode.

        Raises:
            ValueError: adapters, base and each other do not fit together.
        """
        # The classes of the tasks stand above this one; they are needed where a saved model is rebuilt.
        from ptv2_fast.task_models.classes import MODEL_CLASSES

        # Everything is built and checked before the base is touched.
        built = {name: Adapter.from_tensors(base, name, *parts) for name, parts in adapters.items()}
        config = adapters[first][0]
        model = MODEL_CLASSES[config.task_type](base, config, first, adapter=built.pop(first))
        for name, adapter in built.items():
            model._check_compatible(adapter.config)
            model._register(name, adapter)
        if is_trainable:
            model.set_adapter(first)
        else:
            model.requires_grad_(False)
            model.eval()
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base with prompts: what the base returns, for the N tokens of each row.

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, D).
            attention_mask: (B, N) over the text alone, any padding side; or (B, 1, N, N).
            adapter_names: one name per row, "__base__" for none; None runs the active adapter on
                all rows.
            kwargs: whatever else the base takes.
        """
        self._check_read(kwargs)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        return self._as_asked(self.run(self.base_model, inputs, adapter_names), kwargs.get("return_dict"))

    def _as_asked(self, output: Any, return_dict: bool | None) -> Any:
        """An output, or its tuple where the call or the base's configuration asks for tuples."""
        wanted = self.base_model.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def run(
        self,
        target: PreTrainedModel,
        inputs: Mapping[str, Any],
        adapter_names: Sequence[str] | None = None,
        read: Tensor | None = None,
    ) -> Any:
        """Call `target` (the base, its backbone, or a view of one) with the prompts among its inputs.

        Inputs that are None are left out, so that a target need not know every one.

        Args:
            read: (R,) the tokens of the flattened (B, N) whose last states the caller reads, where it reads few; the
                others' may be anything.
        """
        inputs = with_cache_name({name: value for name, value in inputs.items() if value is not None})
        # Outputs are read by name here; who asked for a tuple gets one at the end.
        if inputs.pop("return_dict", True) is False or not self.base_model.config.return_dict:
            inputs["return_dict"] = True
        if self._disabled:
            return target(**inputs)
        self._follow_backbone()
        hook.check_served(inputs, self.backbone.config)
        if self._sizes.decoder_layers:
            return self._run_stacks(target, inputs, adapter_names)
        names = self._row_names(adapter_names, inputs)
        evolving = [n for n in names if n != BASE_ROW and self._evolves_with_text(self.adapters[n])]
        if evolving:
            if len(names) > 1:
                raise ValueError(
                    "adapter_names must not mix a shallow prompt on a bidirectional model with other adapters: its "
                    f"virtual tokens are rows of the batch; got {sorted(set(names))}"
                )
            return self._run_evolving(target, inputs, self.adapters[names[0]])
        plan = self.step_plan()
        fused = self._step_layers.fused(plan)
        call = self.with_prompts(inputs, names)
        output = self._run_planned(target, call, read, plan, fused)
        self._check_reached(call["ptv2_prompts"])
        return output

    def _run_planned(
        self, target: PreTrainedModel, call: dict[str, Any], read: Tensor | None, plan: StepPlan, fused: Mapping
    ) -> Any:
        """Call `target` with its backbone run as the step's plan says."""
        view, call = self._planned(target, call, read, plan, fused)
        return view(**call)

    @outside_graphs
    def _planned(
        self, target: PreTrainedModel, call: dict[str, Any], read: Tensor | None, plan: StepPlan, fused: Mapping
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A view of `target` whose backbone runs as the step's plan says, and what to call it with."""
        if self.training and call.get(CACHE) is None and reads_text(self._family):
            call.setdefault("use_cache", False)
        original = backbone_of(target)
        packing = None
        # A loss over the routers' logits reads them for the padded batch.
        may_unpad = (
            can_unpad(call) and not self._family.absolute_positions and not balances_experts(self.base_model, call)
        )
        if may_unpad and (plan.unpad or counts_padding(original, call["attention_mask"])):
            packing = Packing.of(call["attention_mask"])
        if packing is not None and not (packing.has_padding and packing.index.numel()):
            packing = None
        if call.get("output_hidden_states") or original.config.output_hidden_states:
            read = None
        if packing is not None and read is not None:
            read = packing.places(read)
        backbone = self._step_layers.view(self._hooked(original), plan, fused, read)
        if self._family.absolute_positions:
            backbone = with_right_padding(backbone)
        if packing is not None:
            backbone = unpadded(backbone, packing)
        if self._family.own_attention:
            backbone = given_prompts(backbone, call["ptv2_prompts"])
        if self._family.with_own_pooler is not None:
            backbone = self._family.with_own_pooler(backbone)
        return (target if backbone is original else with_backbone(target, backbone)), call

    def packed_states(self, packed: PackedBatch) -> Tensor:
        """(R, D) the backbone's last states of the tokens that a packed batch reads; zero where it reads none."""
        output = self.run(self.backbone, packed_inputs(packed), read=packed.tokens)
        states = gather_tokens(output.last_hidden_state, packed.tokens)[0]
        return states * (packed.tokens < packed.input_ids.shape[1])[:, None]

    def text_limit(self) -> int | None:
        """The most tokens of a text that the active adapter leaves room for; None where there is no limit."""
        limit = text_limit(self.backbone, self._family)
        return None if limit is None else limit - self._text_offset(self.adapters[self.active_adapter])

    def why_not_packed(self) -> str | None:
        """Why the active adapter's loss cannot be computed of a `PackedBatch`; None where it can."""
        if self._sizes.decoder_layers:
            return "an encoder-decoder runs its padded rows as they are"
        if self._evolves_with_text(self.adapters[self.active_adapter]):
            return "a shallow prompt on a bidirectional model is rows of the padded batch"
        return None

    def step_plan(self) -> StepPlan:
        """What this step leaves out, by `step_options`; logged once, however often it comes back."""
        backend, base = self.adapters[self.active_adapter].config.backend, self.base_model
        device, gathered = device_of(backbone_of(base)), self._step_layers.weights_owner(self, base)
        traced = torch.compiler.is_compiling()
        asked = (self.step_options, self.training, device, backend, gathered, device.type in CAPTURES)
        if not traced and self._last_plan is not None and self._last_plan[0] == asked:
            return self._last_plan[1]
        plan = plan_step(
            self.step_options, training=self.training, device=device, backend=backend, weights_owner=gathered,
            without=self._step_layers.without,
        )  # fmt: skip
        if not traced:
            self._last_plan = asked, plan
            if plan not in self._logged_plans:
                self._logged_plans.add(plan)
                logger.info("training step: %s", plan)
        return plan

    def with_prompts(self, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """`inputs` with the prompts, and with the positions that the text has beside them.

        Args:
            inputs: keyword arguments of the base's forward, none of them None.
            names: the adapter of every row, or of all rows if it is only one.
        """
        self._check_checkpointing()
        if not reads_text(self._family):
            call = check_features(self._family, inputs, self.base_model)
            return {**call, "ptv2_prompts": self._prompt_batch(names)}
        inputs, backbone = dict(inputs), self.backbone
        past_length = cached_tokens(inputs)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if smallest_window(backbone) and getattr(inputs.get(CACHE), "is_compileable", False):
            mask = full_mask(mask, inputs.get("position_ids"), past_length, ids)
        rows, tokens = check_inputs(ids, inputs.get("inputs_embeds"), mask, past_length)
        check_beside(inputs, rows, tokens, self.base_model)
        device = device_of(backbone)
        is_first = inputs.get(CACHE) is None
        first = self._family.first_position(backbone)
        packing = packing_from_cu_seqlens(inputs)
        if packing is not None and inputs.get("position_ids") is None:
            inputs["position_ids"] = packed_positions(packing[0], tokens, first)
        if packing is None and is_first:
            packing = packing_from_positions(inputs.get("position_ids"), mask)
        offsets = [0 if n == BASE_ROW else self._text_offset(self.adapters[n]) for n in names]
        if isinstance(past_length, int):
            length = (tokens if packing is None else packing[2]) + past_length + max(offsets)
            check_length(backbone, self._family, length)
        positions = text_positions(
            inputs.get("position_ids"), mask,
            rows=rows, tokens=tokens, past_length=past_length, first=first, device=device,
            offset=offsets[0] if len(names) == 1 else torch.tensor(offsets, device=device)[:, None],
        )  # fmt: skip
        if isinstance(mask, Tensor) and mask.dim() == 2 and not is_first and tokens > 1:
            check_cached_padding(backbone, mask)
        if mask is None and positions is not None and is_first:
            # With a mask at hand transformers does not look for packed rows itself.
            mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
        batch = self._prompt_batch(names, packing)
        injected = {**inputs, "attention_mask": mask, "position_ids": positions, "ptv2_prompts": batch}
        return {name: value for name, value in injected.items() if value is not None}

    def _prompt_batch(self, names: Sequence[str], packing: tuple[Tensor, Tensor, int] | None = None) -> PromptBatch:
        """The prompts of a forward pass of `names`, and the boundaries of its rows where it is packed."""
        backend = self.adapters[self.active_adapter].config.backend
        prompts, bank = self._prompts(names, backend)
        index = None if bank is None else torch.tensor(bank, device=device_of(self.backbone))
        bounds = longest = None
        if packing is not None:
            bounds, row_of, longest = packing
            index = index[row_of] if index is not None else None
        return PromptBatch(prompts, index, bounds, longest, backend, asked=_account())

    def _check_reached(self, batch: PromptBatch) -> None:
        batch.check_reached(type(self.backbone).__name__, self._sizes.num_layers)

    def _run_evolving(self, target: PreTrainedModel, inputs: dict[str, Any], adapter: Adapter) -> Any:
        """Shallow prompts on a bidirectional model: virtual tokens are real rows in front of the text."""
        prompts = adapter.encoder().to(self.backbone.dtype)
        shallow_view = self._family.shallow_view
        assert shallow_view is not None, "every bidirectional family has one"
        empty = PromptBatch(layers=(), backend=adapter.config.backend, asked=_account())
        if not reads_text(self._family):
            self._check_checkpointing()
            call = check_features(self._family, inputs, self.base_model)
            backbone = shallow_view(self._hooked.attention(backbone_of(target)), prompts)
            output = with_backbone(target, backbone)(**call, ptv2_prompts=empty)
            self._check_reached(empty)
            return output
        mask = inputs.get("attention_mask")
        rows, tokens = check_inputs(inputs.get("input_ids"), inputs.get("inputs_embeds"), mask, 0)
        check_beside(inputs, rows, tokens, self.base_model)
        length, device = adapter.config.num_virtual_tokens, device_of(self.backbone)
        check_length(self.backbone, self._family, tokens + length)
        if packing_from_cu_seqlens(inputs) or packing_from_positions(inputs.get("position_ids"), mask):
            raise ValueError(
                "position_ids and cu_seq_lens_q must not pack rows with a shallow prompt on a bidirectional model"
            )
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape (B, N) with a shallow prompt; got {mask.shape}")
        positions = text_positions(
            inputs.get("position_ids"), mask,
            rows=rows, tokens=tokens, past_length=0, device=device, offset=length,
            first=self._family.first_position(self.backbone),
        )  # fmt: skip
        hooked = self._hooked if self._family.own_attention else self._hooked.attention
        backbone = shallow_view(hooked(backbone_of(target)), prompts)
        if self._family.absolute_positions:
            backbone = with_right_padding(backbone)
        if self._family.own_attention:
            backbone = given_prompts(backbone, empty)
        view = with_backbone(target, backbone)
        inputs = {**inputs, "position_ids": positions, "attention_mask": mask, "ptv2_prompts": empty}
        output = view(**{name: value for name, value in inputs.items() if value is not None})
        self._check_reached(empty)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(state[:, -tokens:] for state in output.hidden_states)
        return output

    def _prompts(self, names: Sequence[str], backend: str) -> tuple[Prompts, list[int] | None]:
        """Every layer's prompt, and which bank entry each row uses (None where all rows share one prompt)."""
        members = sorted(set(names))
        if members == [BASE_ROW]:
            return (None,) * self._sizes.num_layers, [0] * len(names)
        prompts = self._kept.of([None if name == BASE_ROW else self._source(name) for name in members], backend)
        return prompts, [members.index(name) for name in names] if len(members) > 1 else None

    def _row_names(self, adapter_names: Sequence[str] | None, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The adapter of every row; a single name where all rows use the same."""
        if adapter_names is None:
            return (self.active_adapter,)
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names must be one name per row; got the string {adapter_names!r}")
        rows, _ = input_size(self._family, inputs)
        # Beam search and several returned sequences repeat each row in place.
        if not adapter_names or rows % len(adapter_names):
            raise ValueError(f"adapter_names must name {rows} rows; got {len(adapter_names)} names")
        for name in set(adapter_names) - {BASE_ROW}:
            self._check_name(name)
        if len(set(adapter_names)) == 1:
            return (adapter_names[0],)
        repeats = rows // len(adapter_names)
        return tuple(name for name in adapter_names for _ in range(repeats))

    def _evolves_with_text(self, adapter: Adapter) -> bool:
        return adapter.config.injection == "shallow" and not self._family.causal

    def _text_offset(self, adapter: Adapter) -> int:
        """How far the text's positions shift; rotary ones need no room for a shallow prompt."""
        is_shallow = adapter.config.injection == "shallow"
        return 0 if is_shallow and self._family.rotary else adapter.config.text_offset


def _account() -> Account | None:
    """What every forward is checked by; the compiler cannot trace it, and what it traces is the view's own code."""
    return None if torch.compiler.is_compiling() else Account()
