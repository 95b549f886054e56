"""PTuningV2Model: a frozen transformers model with trained prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.attention import hook
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.backbone.view import outside_graphs
from ptv2_fast.base_attributes import BaseAttributes
from ptv2_fast.base_methods import BaseMethods
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.forward.bound_prompts import BoundPrompts
from ptv2_fast.forward.encoder_decoder import bind_prompts, run_encoder, run_encoder_decoder
from ptv2_fast.forward.gradient_checkpointing import enable_checkpointing
from ptv2_fast.forward.inline import run_inline
from ptv2_fast.forward.plain import run_plain
from ptv2_fast.forward.route import Route, route_of
from ptv2_fast.forward.row_prompts import RowPrompts
from ptv2_fast.inputs.call import named_inputs, read_call
from ptv2_fast.inputs.max_length import text_limit
from ptv2_fast.prompts.cache import PromptCache
from ptv2_fast.prompts.placement import is_inline, text_offset
from ptv2_fast.saving.mixin import Persistence
from ptv2_fast.step.kept_plan import KeptPlan
from ptv2_fast.step.options import StepOptions, StepPlan
from ptv2_fast.typed_modules import ModuleDictOf


class PTuningV2Model(BaseAttributes, BaseMethods, Persistence):
    """A frozen transformers model whose attention layers also see trained prompts.

    The base keeps its code, its weights and its outputs' shapes: prompts enter as keys and values
    inside attention, so every output has the N rows of the text. One model holds any number of
    adapters over one base, for one task or several.

    Use `get_ptv2_model` to build the subclass that fits a task. The class is always that of the active adapter's task:
    `set_adapter` changes it with the adapter.

    Attributes:
        task_type: the task of the class, a row of `TASKS`; None for this one, which serves none.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"topic": 3}), "topics")
        model.add_adapter("names", PTuningV2Config("TOKEN_CLS", heads={"tags": 5}))
        model.print_trainable_parameters()  # of the active adapter, "topics"
        model.save_pretrained("adapters")

        model = PTuningV2Model.from_pretrained(base, "adapters")  # frozen, in eval mode
        output = model(torch.tensor([[101, 7592, 102]] * 2), adapter_names=["topics", "names"])
        assert [tuple(row.shape) for row in output.logits] == [(3,), (3, 5)]
        ```
    """

    task_type: ClassVar[str | None] = None

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
            tokenizer: splits `init_text` into tokens.
            init_text: the text for `prompt_init="text"`.
            step_options: which savings of a training step are on; may be replaced at any time.
            adapter: a ready adapter (a loaded one) to take instead of a fresh one for `config`.

        Raises:
            ValueError: base, configuration and task do not fit together.
        """
        super().__init__()
        if not isinstance(base, PreTrainedModel):
            raise ValueError(
                f"base must be a transformers PreTrainedModel; got {type(base).__name__} (what wraps a model, "
                "torch.compile for instance, is given the PTuningV2Model)"
            )
        hook.check_served({}, backbone_of(base).config)
        self._look_at(base)
        self._kept = PromptCache()
        if adapter is None:
            adapter = self._new_adapter(base, config, tokenizer, init_text)
        self.step_options = StepOptions() if step_options is None else step_options
        self._plan = KeptPlan()
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
        # Everything is built and checked before the base is touched.
        built = {name: Adapter.from_tensors(base, name, *parts) for name, parts in adapters.items()}
        config = adapters[first][0]
        model = cls.class_of(config.task_type)(base, config, first, adapter=built.pop(first))
        for name, adapter in built.items():
            model._register(name, adapter)
        if is_trainable:
            model.set_adapter(first)
        else:
            model.requires_grad_(False)
            model.eval()
        return model

    @staticmethod
    def class_of(task_type: str) -> type[PTuningV2Model]:
        """The class that serves a task."""
        # The classes of the tasks stand above this one.
        from ptv2_fast.task_models.classes import MODEL_CLASSES

        return MODEL_CLASSES[task_type]

    def held_as(self, task_type: str) -> PTuningV2Model:
        """This very model as a class that runs a task, which it stays while another thread chooses an adapter.

        What is set on either is set on both.
        In training, where choosing one changes what trains, and in graphs, which know the class, it is the model itself
        if that can be.
        """
        own, kind = type(self), self.class_of(task_type)
        fits = issubclass(own, kind)
        if fits and (torch.compiler.is_compiling() or (self.training and torch.is_grad_enabled())):
            return self
        return self._as(own if fits else kind)

    @outside_graphs
    def _as(self, kind: type[PTuningV2Model]) -> PTuningV2Model:
        other: PTuningV2Model = object.__new__(kind)
        object.__setattr__(other, "__dict__", self.__dict__)
        return other

    def _serve(self, task_type: str) -> None:
        """Become the class of a task, that of an adapter which is about to be active.

        Raises:
            ValueError: the class is somebody's own (a subclass, or what `fully_shard` makes) and serves another task.
        """
        own = self.task_type
        if own is None or own == task_type:
            return
        if type(self) is not self.class_of(own):
            raise ValueError(
                f"name must be of an adapter for {own}, which the model's class {type(self).__name__} is made for; got "
                f"one for {task_type}: choose it before the class is changed"
            )
        object.__setattr__(self, "__class__", self.class_of(task_type))

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
            input_ids: (B, N) int64.
            attention_mask: (B, N) over the text alone, any padding side; or (B, 1, N, N).
            token_type_ids: (B, N), where the base has them.
            position_ids: (B, N), counted as without prompts.
            inputs_embeds: (B, N, D) in place of input_ids.
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.
            kwargs: whatever else the base takes.

        Raises:
            ValueError: an argument that nobody reads, an unknown adapter, or shapes that disagree.
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
        """Call `target` with the prompts among its inputs.

        Inputs that are None are left out, so that a target need not know every one.

        Args:
            target: the base, its backbone, or a view of one; or the encoder of an encoder-decoder, which runs alone.
            read: (R,) the tokens of the flattened (B, N) whose last states the caller reads, where it reads few; the
                others' may be anything.
        """
        inputs = named_inputs(inputs, self.base_model.config)
        if self._disabled:
            return target(**inputs)
        base = self._follow_backbone()
        call = read_call(inputs, base.family, base.model, base.backbone, stacks=base.sizes.decoder_layers > 0)
        rows = self._row_prompts(adapter_names, call.rows)
        route = route_of(base, rows, target)
        if route is Route.INLINE:
            if self.training:
                base.layers.check_inline(self.step_options)
            return run_inline(base, target, call, self.adapters[rows.names[0]], training=self.training)
        plan = self.step_plan()
        if route is Route.ENCODER:
            return run_encoder(base, call, rows, training=self.training)
        if route is Route.ENCODER_DECODER:
            return run_encoder_decoder(base, target, call, rows, training=self.training)
        return run_plain(base, target, call, rows, plan, training=self.training, read=read)

    def _run_states(
        self, inputs: Mapping[str, Any], adapter_names: Sequence[str] | None, read: Tensor | None = None
    ) -> Any:
        """Run what gives one state for each of the text's tokens: the backbone, or an encoder-decoder's encoder alone.

        Args:
            read: as in `run`.
        """
        backbone = self.backbone
        target = backbone.encoder if self._frozen.sizes.decoder_layers else backbone
        return self.run(target, inputs, adapter_names, read)

    def _row_prompts(self, adapter_names: Sequence[str] | None, rows: int | None) -> RowPrompts:
        """The prompts that each of B rows asks for; None where B is not known yet."""
        names = self._row_names(adapter_names, rows)
        known, members = self.adapters, sorted(set(names))
        mixed = len(members) > 1 or members == [BASE_ROW]
        return RowPrompts(
            names,
            [None if name == BASE_ROW else known[name] for name in names],
            known[self.active_adapter].config.backend,
            [None if name == BASE_ROW else self._source(name) for name in members],
            [members.index(name) for name in names] if mixed else None,
            self._kept,
            len(adapter_names) if adapter_names else 1,
        )

    def _bound_prompts(self, adapter_names: Sequence[str] | None) -> BoundPrompts:
        """The prompts of an encoder-decoder's rows that are named, for any number of calls.

        Raises:
            ValueError: a name is unknown, or adapters that no batch can have together.
        """
        base, rows = self._follow_backbone(), self._row_prompts(adapter_names, None)
        route_of(base, rows)
        return bind_prompts(base, rows)

    def text_limit(self) -> int | None:
        """The most tokens of a text that the active adapter leaves room for; None where there is no limit."""
        limit = text_limit(self.backbone, self._family)
        return None if limit is None else limit - text_offset(self.adapters[self.active_adapter].config, self._family)

    def why_not_packed(self) -> str | None:
        """Why the active adapter's loss cannot be computed of a `PackedBatch`; None where it can."""
        if self._frozen.sizes.decoder_layers:
            return "an encoder-decoder runs its padded rows as they are"
        if is_inline(self.adapters[self.active_adapter].config, self._family):
            return "a shallow prompt on a bidirectional model is rows of the padded batch"
        return None

    def step_plan(self) -> StepPlan:
        """What this step leaves out, by `step_options`; logged once, however often it comes back.

        Raises:
            ValueError: float8 is asked for, or needed, where it cannot be; or needed and off.
        """
        layers, base = self._frozen.layers, self.base_model
        config = self.adapters[self.active_adapter].config
        if self.training and config.injection == "shallow":
            layers.check_shallow()
        return self._plan.of(
            self.step_options,
            training=self.training,
            device=device_of(backbone_of(base)),
            backend=config.backend,
            weights_owner=layers.weights_owner(self, base),
            without=layers.without,
            find_float8=layers.find_float8,
        )

    def renew_copies(self) -> None:
        """Make what steps have copied of the base's weights anew where these have been written to."""
        self._frozen.layers.renew_copies()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the base's activations in backward; gradients stay the same."""
        enable_checkpointing(self.base_model, activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
