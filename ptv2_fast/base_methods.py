"""Methods of transformers' models which, read from the base, would run or count the base alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.view import view_of
from ptv2_fast.inputs.arguments import named_arguments


class BaseMethods(nn.Module):
    """What a PTuningV2Model answers in the place of its base; mixed into it."""

    base_model: PreTrainedModel

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are, the adapters' among them; or those that train, or are no embeddings."""
        this: Any = self
        return PreTrainedModel.num_parameters(this, only_trainable, exclude_embeddings)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, the adapters' among them, and of buffers."""
        this: Any = self
        return int(PreTrainedModel.get_memory_footprint(this, return_buffers))

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder of an encoder-decoder, with the prompts of each call; else what the base answers."""
        return self._prompted("encoder", self.base_model.get_encoder(*args, **kwargs))

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder (a causal model is one) with the prompts of each call; else what the base answers."""
        return self._prompted("decoder", self.base_model.get_decoder(*args, **kwargs))

    def _prompted(self, stack: str, part: Any) -> Any:
        """A view of a part of the base whose calls have the prompts, where it is one that reads tokens."""
        model: Any = self
        if part is self.base_model:
            return self
        base = model._follow_backbone()
        if base.sizes.decoder_layers:
            own = part is getattr(backbone_of(self.base_model), stack, None)
            return view_of(part, forward=_stack_of(model, stack)) if own else part
        reads_tokens = part is base.backbone or (stack == "decoder" and base.family.causal)
        return view_of(part, forward=_backbone_of(model)) if reads_tokens else part

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The bare model's continuous batching; that of a causal language model knows adapters.

        Raises:
            ValueError: an adapter is on.
        """
        return self._without_prompts("generate_batch")(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate_batch`."""
        return self._without_prompts("init_continuous_batching")(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate_batch`."""
        return self._without_prompts("continuous_batching_context_manager")(*args, **kwargs)

    def _without_prompts(self, method: str) -> Any:
        model: Any = self
        if not model._disabled:
            raise ValueError(
                f"{method} must be called on a model whose adapters are of task_type 'CAUSAL_LM', or within "
                f"disable_adapter; got a {type(self).__name__}"
            )
        return getattr(self.base_model, method)


def _stack_of(model: Any, stack: str) -> Any:
    """A forward of a stack of an encoder-decoder, with the prompts that the model has when it is called."""

    def forward(original: Any, *args: Any, **inputs: Any) -> Any:
        if model._disabled:
            return original(*args, **inputs)
        base = model._follow_backbone()
        target = base.hooked.whole(base.backbone)
        prompted = getattr(model._bound_prompts(None).around(target), stack)
        return prompted(**{**named_arguments(original, args), **inputs})

    return forward


def _backbone_of(model: Any) -> Any:
    """The same of a backbone."""

    def forward(original: Any, *args: Any, **inputs: Any) -> Any:
        given = {**named_arguments(original, args), **inputs}
        return model._as_asked(model.run(model.backbone, given), inputs.get("return_dict"))

    return forward


def refuse_unserved(generation_config: Any, given: dict[str, Any], *, seq2seq: bool) -> None:
    """Refuse what `generate` would do with a part of the model, or with another text, than the prompts belong to.

    Args:
        generation_config: the one of the call, or the model's.
        given: the keyword arguments of `generate`.

    Raises:
        ValueError: the message names the argument.
    """

    def asked(name: str) -> Any:
        value = given.get(name)
        return getattr(generation_config, name, None) if value is None else value

    scale = asked("guidance_scale")
    if seq2seq and scale not in (None, 1):
        raise ValueError(
            "guidance_scale must be None for an encoder-decoder: transformers runs what the decoder has written "
            f"through the encoder, as if it were its text; got {scale}"
        )
    layers = asked("assistant_early_exit")
    if layers is not None:
        raise ValueError(
            "assistant_early_exit must be None: prompts belong to all layers; assistant_model=model.base_model drafts "
            f"without them; got {layers}"
        )
