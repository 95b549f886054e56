"""The backbone as a training step runs it: a view with fused projections, maps in float8, compiled layers, and a last
layer that computes what is read."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.float8_bases import lacks_backward
from ptv2_fast.backbone.kept_views import KeptViews
from ptv2_fast.backbone.own_attention import AttentionCall
from ptv2_fast.backbone.sharded_weights import device_of, weights_owner
from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.families.family import Family
from ptv2_fast.families.registry import is_listed
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.step.float8_maps import Float8Maps, find_float8
from ptv2_fast.step.float8_plan import Float8Found
from ptv2_fast.step.fused_projections import FusedProjections
from ptv2_fast.step.options import StepOptions, StepPlan

COMPILER = "inductor"


class StepLayers:
    """Makes views of one backbone for the steps of one wrapper; the weights stay the backbone's.

    Attributes:
        backbone: the one.
        without: which switches save nothing on this backbone, and why.
        lacks_backward: maps of it cannot be differentiated but through what stands in for them in float8.
    """

    def __init__(self, backbone: PreTrainedModel, family: Family) -> None:
        self.backbone = backbone
        self._family = family
        self._fused: FusedProjections | None = None
        # By (fused, copies): a pass that was captured under other switches may be replayed again.
        self._float8: dict[tuple[bool, bool], Float8Maps] = {}
        self._compiled: Callable | None = None
        self._views = KeptViews()
        # Found once: every step asks, and a configuration is slow to read.
        self.without = self._find_without()
        self.lacks_backward = any(map(lacks_backward, backbone.modules()))

    def weights_owner(self, *above: nn.Module) -> str | None:
        """Who brings the weights of the backbone, or of modules above it, while they run; None where they stay."""
        return weights_owner((*above, self.backbone), self._family.layers(self.backbone))

    def find_float8(self) -> Float8Found:
        """What float8 can do with the linear maps of the layers, as they are now."""
        return find_float8(self.backbone, self._family.layers_path, device_of(self.backbone))

    def check_shallow(self) -> None:
        """Refuse shallow prompts that could not be trained.

        Raises:
            ValueError: their tokens would run through maps without a backward.
        """
        if self.lacks_backward:
            raise ValueError(
                "injection must be 'deep' or 'prefix' to train over torchao's float8 weights that quantize their "
                "inputs: virtual tokens of a shallow prompt run through the layers as they are, which have no "
                "backward; got 'shallow'"
            )

    def check_inline(self, options: StepOptions) -> None:
        """Refuse virtual tokens that are rows of the batch where they would not run as asked for, or not train.

        Raises:
            ValueError: float8 is asked for, or maps have no backward.
        """
        self.check_shallow()
        if options.float8:
            raise ValueError(
                "step_options.float8 must be None or False with a shallow prompt on a bidirectional model, whose "
                "virtual tokens run with the text through the layers as they are; got True"
            )

    def renew_copies(self) -> None:
        """Make what steps have copied of weights anew where these have been written to; for passes that replay."""
        for maps in self._float8.values():
            maps.renew()

    def copied_bytes(self) -> int:
        """Bytes of the copies that steps have made of weights."""
        return sum(maps.memory() for maps in self._float8.values())

    def stand_ins(self, plan: StepPlan) -> Mapping[str, nn.Module]:
        """Path -> what stands in for a linear map there; weights move here, before anything takes their address."""
        if plan.float8:
            key = plan.fused_projections, plan.float8_copies
            if key not in self._float8:
                fused, copies = key
                self._float8[key] = Float8Maps(self.backbone, self._family.layers_path, fused=fused, copies=copies)
            return self._float8[key].modules()
        if not plan.fused_projections:
            return {}
        if self._fused is None:
            self._fused = FusedProjections(self.backbone)
        return self._fused.modules()

    def view(
        self, backbone: PreTrainedModel, plan: StepPlan, stand_ins: Mapping[str, nn.Module], read: Tensor | None
    ) -> PreTrainedModel:
        """`backbone`, or a view of it.

        Args:
            backbone: the backbone of this object, or a view of it.
            plan: which savings are on.
            stand_ins: what `stand_ins` gave for this plan.
            read: (R,) the tokens of the flattened (B, N) whose last states are read; None for all.
        """
        call = self._compiled_call(dynamic=plan.unpad) if plan.compile_layers else None
        whole = backbone
        if stand_ins or call is not None:
            whole = self._views.of((backbone, stand_ins, call), lambda: self._changed(backbone, stand_ins, call))
        if not plan.last_rows or read is None or "last_rows" in self.without:
            return whole
        # How many rows are read changes with every batch: that layer is not compiled.
        layers = self._family.layers(whole if call is None else with_modules(backbone, stand_ins))
        path = f"{self._family.layers_path}.{len(layers) - 1}"
        return with_modules(whole, {path: self._family.last_layer_tokens(layers[-1], read)})

    def _changed(
        self, backbone: PreTrainedModel, stand_ins: Mapping[str, nn.Module], call: Callable | None
    ) -> PreTrainedModel:
        """The backbone with other linear maps, and with layers that run through `call` where there is one."""
        backbone = with_modules(backbone, stand_ins)
        if call is None:
            return backbone
        layers, path = enumerate(self._family.layers(backbone)), self._family.layers_path
        return with_modules(backbone, {f"{path}.{i}": compiled_layer(one, i, call) for i, one in layers})

    def _find_without(self) -> dict[str, str]:
        if self._family.sizes(self.backbone).decoder_layers:
            names = [field.name for field in fields(StepOptions) if field.name != "cuda_graphs"]
            return dict.fromkeys(names, "an encoder-decoder runs its padded rows as they are")
        found = {}
        if self._family.absolute_positions:
            found["unpad"] = "positions are slots of padded rows"
        if not reads_text(self._family):
            found["unpad"] = f"{self._family.reads} have no padding"
        # Written for a family's own layers, which those of a model that behaves like it need not be.
        if not self._family.skips_unread_tokens or not is_listed(self.backbone):
            found["last_rows"] = "not written for this family"
        return found

    def release(self) -> None:
        """Undo what was done to the backbone's weights, and give back what was copied of them."""
        for maps in self._float8.values():
            maps.release()
        self._float8 = {}
        if self._fused is not None:
            self._fused.release()
            self._fused = None

    def _compiled_call(self, *, dynamic: bool) -> Callable:
        """What all layers' bodies are compiled through; of this wrapper alone, so that no other model's variants
        count towards the compiler's limit."""
        if self._compiled is None:
            own = types.FunctionType(_call.__code__.replace(co_name=f"layer_{id(self)}"), _call.__globals__)
            # With padding dropped every batch has another number of tokens.
            self._compiled = torch.compile(own, backend=COMPILER, dynamic=True if dynamic else None)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_float8": {}}


def compiled_layer(layer: nn.Module, position: int, call: Callable) -> nn.Module:
    """A view of a layer whose body runs through `call`, a compiled function that every layer of its kind shares.

    The layer gets its own prompt alone, so that nothing compiled depends on which layer it is.
    """

    def run(original: Any, *args: Any, ptv2_prompts: PromptBatch | None = None, **kwargs: Any) -> Any:
        if ptv2_prompts is not None:
            kwargs["ptv2_prompts"] = ptv2_prompts.at(position)
        own = [one.at(position) if isinstance(one, AttentionCall) else one for one in args]
        return call(_without_capture(original.__self__), *own, **kwargs)

    return view_of(layer, forward=run)


def _without_capture(module: nn.Module) -> nn.Module:
    """A view without the hooks by which transformers collects attention weights; the compiler cannot trace them.

    No weights are lost: prompt attention never has any. A hook of anyone else stays.
    """
    children = {}
    for name, child in module.named_children():
        view = _without_capture(child)
        if view is not child:
            children[name] = view
    hooks = module._forward_hooks.values()
    captures = [hook for hook in hooks if getattr(hook, "__module__", None) == output_capturing.__name__]
    if not children and not captures:
        return module
    view = view_of(module, children=children)
    if len(captures) == len(hooks):
        view._forward_hooks = OrderedDict()
    return view


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer.forward(*args, **kwargs)
