"""The adapters of a PTuningV2Model: adding, choosing, deleting and disabling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.adapter import Adapter
from ptv2_fast.attention import hook
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.models.backbone import backbone_of
from ptv2_fast.models.families import family_of
from ptv2_fast.models.family import Family
from ptv2_fast.models.features import reads_text
from ptv2_fast.models.module_dict import ModuleDictOf
from ptv2_fast.prompts.source import PromptSource
from ptv2_fast.prompts.text_init import initialise_from_text, token_ids
from ptv2_fast.step.layers import StepLayers
from ptv2_fast.storage.names import check_name, namesake

BASE_ROW = "__base__"  # an adapter name that means: this row runs without a prompt


class AdapterSet(nn.Module):
    """What a PTuningV2Model knows of its adapters; mixed into it."""

    base_model: PreTrainedModel
    adapters: ModuleDictOf[Adapter]
    active_adapter: str
    _family: Family
    _sources: dict[str, PromptSource]
    _step_layers: StepLayers
    _disabled: bool

    def add_adapter(
        self,
        name: str,
        config: PTuningV2Config,
        *,
        tokenizer: Callable[..., Any] | None = None,
        init_text: str | Sequence[str] | None = None,
    ) -> None:
        """Create another adapter over the same base; it becomes active only by `set_adapter`.

        Adapters of one model share a task type, or all have heads of their own (`config.heads`), of any kind.

        Args:
            name: a name that no adapter has, in any case, and that can be a folder's everywhere: no dots, slashes or
                blanks at its ends, no device of Windows.
            config: its configuration.
            tokenizer, init_text: the text for `prompt_init="text"`, and what splits it into tokens.

        Raises:
            ValueError: the name is taken or unusable, or the configuration does not fit the base or the other
                adapters.
        """
        self._check_unused(name)
        adapter = self._build(self.base_model, config, tokenizer, init_text)
        self._check_alike(config)
        self._initialise(adapter, tokenizer, init_text)
        self._take(name, adapter)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the one that runs by default and the only one that trains."""
        self._check_name(name)
        self.active_adapter = name
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was active, the oldest remaining one becomes active."""
        self._check_name(name)
        if len(self.adapters) == 1:
            raise ValueError(f"name must leave at least one adapter; {name!r} is the only one")
        del self.adapters[name]
        del self._sources[name]
        if name == self.active_adapter:
            self.set_adapter(next(iter(self.adapters)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is the bare base, with the base's own attention, bit for bit."""
        before, self._disabled = self._disabled, True
        self._detach()
        try:
            yield
        finally:
            self._disabled = before
            if not before:
                self._attach()

    def unload(self) -> PreTrainedModel:
        """Give the base back with its own attention implementation; its parameters stay frozen."""
        self._step_layers.release()
        self._detach()
        return self.base_model

    def _attach(self) -> None:
        """Freeze the base and let its attention run through the hook."""
        base: Any = self.base_model
        base.requires_grad_(False)
        if self._family.own_attention:
            return
        hook.register()
        current = self.backbone.config._attn_implementation
        if current != hook.IMPLEMENTATION:
            base._ptv2_original_attention = current
            _set_attention(base, hook.IMPLEMENTATION)
        if self.backbone.config._attn_implementation != hook.IMPLEMENTATION:
            raise ValueError(
                f"base must use transformers' attention interface; {type(base).__name__} does not let its attention "
                "implementation be set"
            )

    def _detach(self) -> None:
        """Give the base its own attention back; its parameters stay frozen."""
        if not self._family.own_attention:
            _set_attention(self.base_model, self.base_model._ptv2_original_attention)

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
    def _build(
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
            initialise_from_text(adapter.encoder, self.backbone, self._family, ids)

    def _take(self, name: str, adapter: Adapter) -> None:
        """Make an adapter one of this model's; only the active one trains."""
        adapter.requires_grad_(name == self.active_adapter)
        adapter.train(self.training)
        self.adapters[name] = adapter
        self._sources[name] = PromptSource(adapter.encoder, self.backbone, self._family)

    def _check_alike(self, config: PTuningV2Config) -> None:
        """Refuse an adapter that no forward could serve beside the ones that are there."""
        first = next(iter(self.adapters.values())).config
        same_task = config.task_type == first.task_type
        if (config.heads is None) != (first.heads is None) or not (same_task or config.heads):
            having = "with" if first.heads else "without"
            raise ValueError(
                f"config must have task_type {first.task_type!r} {having} heads like the adapters that are there"
                f"{', or another one with heads' if first.heads else ''}; got {config.task_type!r} "
                f"{'with' if config.heads else 'without'} heads"
            )

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
        if name not in self.adapters:
            raise ValueError(f"adapter must be one of {', '.join(self.adapters)}; got {name!r}")


def _set_attention(base: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of a model, and of models inside it that have a configuration of their own."""
    base.set_attn_implementation(name)
    for inner in base.modules():
        # Up to transformers 5.17 a copy of the model's own configuration (T5's stacks have one each) is passed over.
        if isinstance(inner, PreTrainedModel) and type(inner.config) is type(base.config):
            if inner.config._attn_implementation != name:
                inner.set_attn_implementation(name)
