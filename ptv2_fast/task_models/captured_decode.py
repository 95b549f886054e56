"""Decides whether the decode steps of a `generate` are captured and replayed, and says once why they are not."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.families.registry import is_listed
from ptv2_fast.forward.route import Route, route_of
from ptv2_fast.forward.row_prompts import RowPrompts
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.cache import CACHE_NAMES
from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.observers import why_not_now
from ptv2_fast.step.options import StepOptions, StepPlan, logger
from ptv2_fast.task_models.decode_steps import DecodeCall, DecodeSteps

# In these `generate` asks for one more token of each row at a time.
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
# Hub folders of Gemma name this cache, which transformers takes for no choice at all.
_NO_CHOICE = (None, "hybrid")
# Whose modules keep nothing beside tensors that a forward depends on, or nothing that changes.
_KNOWN_MAKERS = ("torch", "transformers", "bitsandbytes")
_LAYERS = {"full_attention", "sliding_attention"}


class Generator(Protocol):
    """A wrapped model, as far as its decode steps know it."""

    training: bool
    step_options: StepOptions

    def step_plan(self) -> StepPlan:
        """What the step leaves out."""

    def _row_prompts(self, adapter_names: Sequence[str] | None, rows: int | None) -> RowPrompts:
        """The prompts that each of B rows asks for."""


class CapturedDecode:
    """The captured decode steps of one model, which its `generate` replays.

    The text that is given runs eagerly. Of what is written after it the first two tokens of each size run eagerly, the
    others by one launch each. A size is the number of rows and of the slots that they have in the cache. A copy has
    none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: DecodeSteps | None = None
        self._refused: str | None = None
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type[CapturedDecode], tuple[()]]:
        return CapturedDecode, ()

    @property
    def captured(self) -> int:
        """How many sizes have been captured and are kept."""
        return 0 if self._steps is None else self._steps.captured

    def forget(self) -> None:
        """Give all that was captured back, with its memory and the cache's: the model moves, trains or may not."""
        self._steps = None

    @contextmanager
    def call(
        self,
        model: Generator,
        base: FrozenBase,
        adapter_names: Sequence[str] | None,
        args: Sequence[Any],
        given: Mapping[str, Any],
    ) -> Iterator[DecodeCall | None]:
        """What runs the decode steps of one `generate`; None where they run as any other forward does.

        Args:
            args, given: its arguments; what they say of the cache comes first.
        """
        device = device_of(base.backbone)
        if model.step_options.cuda_graphs is False:
            self.forget()
        off = device.type not in CAPTURES or model.step_options.cuda_graphs is False or torch.compiler.is_compiling()
        settings = None if off else _settings(base.model, args, given)
        # Another thread generates, or somebody within a `generate` does: the cache is one at a time.
        if settings is None or not _steps_alone(settings, given) or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            yield self._begin(model, base, adapter_names, settings, device)
        finally:
            self._lock.release()

    def _begin(
        self,
        model: Generator,
        base: FrozenBase,
        adapter_names: Sequence[str] | None,
        settings: GenerationConfig,
        device: torch.device,
    ) -> DecodeCall | None:
        plan = model.step_plan()
        why = self._refused or _why_not(model, base, plan, model._row_prompts(adapter_names, None), device)
        if why is None:
            if self._steps is not None and (changed := self._steps.changed(base, plan)):
                if self._steps.captured:
                    logger.info("generate: captured decode steps are dropped: %s", changed)
                self._steps = None
            if self._steps is None:
                self._steps = DecodeSteps(base, plan, device)
            why = self._steps.observers.found()
        if why is not None:
            self._log_once(f"generate: decode steps are not captured: {why}")
            return None
        assert self._steps is not None
        line = "generate: decode steps are captured, one CUDA graph for each number of rows and slots"
        self._log_once(f"{line} (StepOptions(cuda_graphs=False) or cache_implementation='dynamic' switches that off)")
        rows_of = partial(model._row_prompts, adapter_names)
        return DecodeCall(self._steps, rows_of, _new(settings), self._refuse)

    def _refuse(self, why: str) -> None:
        """Capture nothing from now on, and replay nothing."""
        self._refused = why
        self.forget()
        self._log_once(f"generate: decode steps are not captured: {why}")

    def _log_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.info("%s", line)


def _settings(model: PreTrainedModel, args: Sequence[Any], given: Mapping[str, Any]) -> GenerationConfig:
    """What `generate` is asked for, by its arguments first, then by the model's own settings."""
    config = given.get("generation_config")
    if len(args) > 1:
        config = inspect.signature(model.generate).bind_partial(*args).arguments.get("generation_config")
    own = model.generation_config
    asked = copy.deepcopy(own if config is None else config)
    for source, stronger in ((vars(own), False), (given, True)):
        for name, value in source.items():
            if hasattr(asked, name) and (stronger or getattr(asked, name) is None):
                setattr(asked, name, value)
    return asked


def _steps_alone(asked: GenerationConfig, given: Mapping[str, Any]) -> bool:
    """Whether the cache is nobody's choice, and every step after the first brings one token a row."""
    if any(given.get(name) is not None for name in (*CACHE_NAMES, "custom_generate")):
        return False
    if asked.use_cache is False or asked.cache_implementation not in _NO_CHOICE or getattr(asked, "is_assistant", None):
        return False
    return asked.get_generation_mode(given.get("assistant_model")) in _MODES


def _new(asked: GenerationConfig) -> int | None:
    """As many tokens are written at most; None where nobody says."""
    said = [count for count in (asked.max_new_tokens, asked.max_length) if count is not None]
    return said[0] if said else None


def _why_not(model: Generator, base: FrozenBase, plan: StepPlan, rows: RowPrompts, device: torch.device) -> str | None:
    """Why steps cannot be captured, or would not be what a forward computes."""
    family, config = base.family, base.backbone.config
    if model.training or base.model.training:
        return "the model is in training mode"
    if route_of(base, rows) is not Route.PLAIN or family.own_attention or family.absolute_positions:
        return f"{type(base.backbone).__name__} does not read its prompts as keys and values alone"
    if not type(base.model).__module__.startswith("transformers.") or not is_listed(base.backbone):
        return f"{type(base.model).__name__} is not a listed model of transformers: it may do more than its layers"
    if not getattr(base.model, "_can_compile_fullgraph", False):
        return f"transformers says of {type(base.model).__name__} that it cannot be compiled as a whole"
    if not set(getattr(config, "layer_types", None) or ()) <= _LAYERS or getattr(config, "num_kv_shared_layers", None):
        return "layers keep something else than their own keys and values"
    if config.output_hidden_states or config.output_attentions:
        return "the base's configuration asks for hidden states or attention weights"
    if plan.weights_owner is not None:
        return f"weights come and go: {plan.weights_owner}"
    if len({str(place) for place in (getattr(base.model, "hf_device_map", None) or {}).values()}) > 1:
        return "the base is spread over several devices"
    quantizer = getattr(base.model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"transformers says of {type(quantizer).__name__} that it cannot be compiled"
    for module in base.model.modules():
        maker = type(module).__module__.split(".")[0]
        if maker not in _KNOWN_MAKERS:
            return f"the base has a {type(module).__name__} of {maker}, which may decide by what a replay cannot see"
    return why_not_now(device)
