"""The adapters of a PTuningV2Model: adding, choosing, deleting and disabling them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.view import view_of
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.family import Family
from ptv2_fast.families.registry import family_of, sizes_of
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.prompts.cache import PromptCache
from ptv2_fast.prompts.source import PromptSource
from ptv2_fast.prompts.text_init import initialise_from_text, token_ids
from ptv2_fast.step.options import StepOptions
from ptv2_fast.storage.names import check_name, namesake
from ptv2_fast.typed_modules import ModuleDictOf

M = TypeVar("M", bound="AdapterSet")

# Of which models the adapters are disabled here, by the id of their attributes, which a model shares with itself as
# another class; once for each context that is open. Threads and asyncio's tasks have their own, since others may be
# serving meanwhile.
_disabled: ContextVar[tuple[int, ...]] = ContextVar("ptv2_disabled", default=())


class _DisabledInThread(threading.local):
    """The same for torch.compile, which guards on what belongs to a thread and cannot read what belongs to a task.

    By the id of the model: in graphs the bare base is run by the model itself.
    """

    def __init__(self) -> None:
        self.models: tuple[int, ...] = ()


_of_this_thread = _DisabledInThread()


class AdapterSet(nn.Module):
    """What a PTuningV2Model knows of its adapters; mixed into it."""

    base_model: PreTrainedModel
    adapters: ModuleDictOf[Adapter]
    active_adapter: str
    _frozen: FrozenBase
    _family: Family
    _sources: dict[str, PromptSource]
    _kept: PromptCache

    def __setattr__(self, name: str, value: Any) -> None:
        """As everywhere; what the next forward would stumble over is refused here.

        Raises:
            ValueError: `active_adapter` names no adapter, or one that the model's class cannot serve, or `step_options`
                are none.
        """
        if name == "active_adapter" and "_is_made" in self.__dict__:
            self._check_name(value)
            self._serve(self.adapters[value].config.task_type)
        if name == "step_options" and not isinstance(value, StepOptions):
            raise ValueError(f"step_options must be StepOptions; got {type(value).__name__}")
        super().__setattr__(name, value)

    def add_adapter(
        self,
        name: str,
        config: PTuningV2Config,
        *,
        tokenizer: Callable[..., Any] | None = None,
        init_text: str | Sequence[str] | None = None,
    ) -> None:
        """Create another adapter over the same base; it becomes active only by `set_adapter`.

        Adapters of one model may be for different tasks, as far as the base serves each of them.

        Args:
            name: a name that no adapter has, in any case, and that can be a folder's everywhere: no dots, slashes or
                blanks at its ends, no device of Windows.
            config: its configuration.
            tokenizer: splits `init_text` into tokens.
            init_text: the text for `prompt_init="text"`, or several.

        Raises:
            ValueError: the name is taken or unusable, or the configuration does not fit the base.
        """
        self._check_unused(name)
        adapter = self._new_adapter(self.base_model, config, tokenizer, init_text)
        self._initialise(adapter, tokenizer, init_text)
        self._register(name, adapter)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the one that runs by default and the only one that trains.

        The model's class becomes that of the adapter's task: Trainer and pipelines tell by it what a model is for.

        Raises:
            ValueError: there is no adapter of that name, or the model's class, one of your own, cannot serve its task.
        """
        self._check_name(name)
        self.active_adapter = name
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was active, the oldest remaining one becomes active.

        Raises:
            ValueError: there is no adapter of that name, or it is the only one.
        """
        self._check_name(name)
        if len(self.adapters) == 1:
            raise ValueError(f"name must leave at least one adapter; {name!r} is the only one")
        del self.adapters[name]
        self._sources.pop(name, None)
        if name == self.active_adapter:
            self.set_adapter(next(iter(self.adapters)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is the bare base, with the base's own attention, bit for bit.

        It is so for the calls of the thread, or of the asyncio task, that opened the context; others go on with their
        adapters. What `torch.compile` made of the model knows threads alone. Contexts may overlap: the adapters are
        back when the last one closes.
        """
        _disabled.set((*_disabled.get(), id(self.__dict__)))
        _of_this_thread.models = (*_of_this_thread.models, id(self))
        try:
            yield
        finally:
            _disabled.set(_without(_disabled.get(), id(self.__dict__)))
            _of_this_thread.models = _without(_of_this_thread.models, id(self))

    @property
    def _disabled(self) -> bool:
        """Whether the bare base runs here."""
        if torch.compiler.is_compiling():
            return id(self) in _of_this_thread.models
        return id(self.__dict__) in _disabled.get()

    def frozen_prompts(self) -> AbstractContextManager[None]:
        """Within this context the adapters' keys and values are made once, and kept from call to call in all threads.

        Frozen is what they are made of: the adapters' prompts, and the base's weights with whatever others have put
        there (LoRA, its scale, its being enabled). Who writes to one of these meanwhile may find it read or not. A call
        under autocast keeps its own. What cannot be kept is made for each call: with gradients, by an adapter in
        training mode, under `torch.compile`, with sharded or offloaded weights; so are virtual tokens that are rows of
        the batch. Contexts may overlap, in one thread or several: everything is forgotten when the last one closes.
        """
        return self._kept.frozen()

    def for_one_call(self: M) -> M:
        """A view of the model whose prompts are made when it first runs, for all of its forwards; nobody else's."""
        if self._disabled or self._kept.is_open:
            return self
        return view_of(self, attributes={"_kept": PromptCache.for_one_call()})

    def unload(self) -> PreTrainedModel:
        """Give the base back, which has its own attention all the time; its parameters stay frozen."""
        self._frozen.layers.release()
        return self.base_model

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise ValueError(
            "nn.DataParallel must not be used: its copies of a model have no parameters. Start one process for each "
            "device (`accelerate launch` or `torchrun`; Trainer works in both), or show the process one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    @property
    def backbone(self) -> PreTrainedModel:
        """The base without its task head."""
        return backbone_of(self.base_model)

    @property
    def ptv2_config(self) -> dict[str, PTuningV2Config]:
        """The configuration of every adapter, by name."""
        return {name: adapter.config for name, adapter in self.adapters.items()}

    def trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained parameters and of all parameters, base included."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many, and their share."""
        trained, total = self.trainable_parameters()
        print(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.4f} %)")

    @staticmethod
    def _new_adapter(
        base: PreTrainedModel, config: PTuningV2Config, tokenizer: Any, init_text: str | Sequence[str] | None
    ) -> Adapter:
        """An adapter for the base, which stays as it is; everything that can be refused is refused here."""
        family = family_of(backbone_of(base))
        if init_text is not None and not reads_text(family):
            raise ValueError(f"init_text must be None on {type(base).__name__}, which reads {family.reads} and no text")
        if config.prompt_init == "text" and reads_text(family) and (tokenizer is None or init_text is None):
            raise ValueError("tokenizer and init_text must be given with prompt_init='text'")
        if init_text is not None and tokenizer is None:
            raise ValueError("tokenizer must be given with init_text")
        if init_text is not None:
            token_ids(tokenizer, init_text, config.num_virtual_tokens)
        return Adapter(base, config)

    def _initialise(self, adapter: Adapter, tokenizer: Any, init_text: str | Sequence[str] | None) -> None:
        """Start a fresh adapter's prompts from a text where that is asked for, or given and possible."""
        config = adapter.config
        by_default = config.prompt_init is None and config.reparameterization is None
        if init_text is not None and (config.prompt_init == "text" or by_default):
            ids = token_ids(tokenizer, init_text, config.num_virtual_tokens)
            initialise_from_text(adapter.encoder, self.backbone, self._family, self._frozen.hooked, ids)

    def _register(self, name: str, adapter: Adapter) -> None:
        """Make an adapter one of this model's; only the active one trains."""
        adapter.requires_grad_(name == self.active_adapter)
        adapter.train(self.training)
        self.adapters[name] = adapter

    def _look_at(self, base: PreTrainedModel) -> None:
        """Find out all that is known of a base."""
        self._frozen = FrozenBase.of(base)
        self._family = self._frozen.family
        self._sources = {}

    def _follow_backbone(self) -> FrozenBase:
        """What is known of the base; looked at anew where somebody has put another backbone, or head, in its place.

        Raises:
            ValueError: its sizes are not those that the adapters were made for.
        """
        known, base = self._frozen, self.base_model
        backbone = backbone_of(base)
        if backbone is known.backbone:
            if base is not known.model:
                self._frozen = known = replace(known, model=base)
            return known
        had = known.sizes
        has = replace(sizes_of(backbone), initializer_range=had.initializer_range)
        if had != has:
            raise ValueError(f"base must keep the sizes that its adapters were made for, {had}; got {has}")
        known.layers.release()
        self._look_at(base)
        return self._frozen

    def _source(self, name: str) -> PromptSource:
        """Where an adapter's keys and values come from: the encoder that it has now."""
        encoder, source = self.adapters[name].encoder, self._sources.get(name)
        if source is None or source.encoder is not encoder:
            source = self._sources[name] = PromptSource(encoder, self.backbone, self._family, self._frozen.hooked)
        return source

    def _row_names(self, adapter_names: Sequence[str] | None, rows: int | None) -> tuple[str, ...]:
        """The adapter of every row; a single name where all rows have the same.

        Args:
            adapter_names: one per row; None means the active one. Beam search and several returned sequences repeat
                each row in place, and so do these.
            rows: B; None where that is not known yet, and a name stands for as many rows as it turns out.

        Raises:
            ValueError: they are no names of so many rows, or one is unknown.
        """
        if adapter_names is None:
            return (self.active_adapter,)
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names must be one name per row; got the string {adapter_names!r}")
        if rows is None and not adapter_names:
            raise ValueError(f"adapter_names must be one name per row; got {adapter_names!r}")
        if rows is not None and (not adapter_names or rows % len(adapter_names)):
            raise ValueError(f"adapter_names must name {rows} rows; got {len(adapter_names)} names")
        for name in set(adapter_names) - {BASE_ROW}:
            self._check_name(name)
        if len(set(adapter_names)) == 1:
            return (adapter_names[0],)
        repeats = 1 if rows is None else rows // len(adapter_names)
        return tuple(name for name in adapter_names for _ in range(repeats))

    def _serve(self, task_type: str) -> None:
        """What follows from another adapter's being active: a model has the class of its task."""

    def _check_unused(self, name: str) -> None:
        check_name(name)
        if name in self.adapters or name == BASE_ROW:
            raise ValueError(f"name must be unused; got {name!r}, adapters are {', '.join(self.adapters)}")
        other = namesake(name, self.adapters)
        if other is not None:
            raise ValueError(
                f"name must differ from {other!r} in more than case or Unicode's form: not every file system tells "
                f"their folders apart; got {name!r}"
            )

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.adapters:
            raise ValueError(f"adapter must be one of {', '.join(self.adapters)}; got {name!r}")


def _without(models: tuple[int, ...], model: int) -> tuple[int, ...]:
    """What is left when one context of a model closes."""
    left = list(models)
    if model in left:  # the context may have been opened in another thread
        left.remove(model)
    return tuple(left)
