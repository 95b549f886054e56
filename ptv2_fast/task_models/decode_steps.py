"""Decode steps of a model in one state, by their sizes: eager at first, then captured and replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.prompt_batch import LazyPrompt, PromptBatch
from ptv2_fast.forward.plain import run_plain
from ptv2_fast.forward.row_prompts import ReadyPrompts, RowPrompts
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.call import read_call
from ptv2_fast.inputs.max_length import text_limit
from ptv2_fast.step.capture import CAPTURES, WARM_UP_STEPS, Capture
from ptv2_fast.step.held import HeldModules
from ptv2_fast.step.observers import Observers
from ptv2_fast.step.options import StepPlan
from ptv2_fast.step.prompt_place import PromptPlace, sizes_of
from ptv2_fast.step.slot_cache import SlotCache

# So many sizes are kept; the one that was used least recently goes first.
MAX_GRAPHS = 32
# What a decode step is called with, and may be: anything else that is not off runs eagerly.
_READ = {"input_ids", "position_ids", "attention_mask", CACHE, "use_cache", "logits_to_keep", "return_dict"}


@dataclass
class _Size:
    """Steps of one size: the buffers that they read, how many there were, and what replays them.

    Attributes:
        input_ids, position_ids: (B, 1) int64.
        mask: (B, slots) bool, True where a slot is of the text or not written yet.
        prompts: of the call's rows.
        run: the step, computed of what the buffers hold; gives logits (B, 1, V).
        steps: how many ran eagerly.
        replay: the same, captured.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    prompts: PromptPlace
    run: Callable[[], Tensor]
    steps: int = 0
    replay: Callable[[], Tensor | None] | None = None


class DecodeSteps:
    """The decode steps of one model while its base is as it was: modules, where weights lie, configurations, switches.

    What changes from call to call is read from buffers: tokens, positions, padding, prompts, and the cache.

    Attributes:
        cache: of every `generate` that runs these steps, one after the other.
        observers: who watches the base's modules.
    """

    def __init__(self, base: FrozenBase, plan: StepPlan, device: torch.device) -> None:
        """Nothing is captured yet.

        Args:
            base: a decoder whose prompts are keys and values.
            plan: of a step that does not train.
            device: of all of the base.
        """
        self.base, self.device = base, device
        self.cache = SlotCache(base.sizes.num_layers, device)
        self.observers = Observers(base.model.modules(), [])
        self._plan = replace(plan, reasons=())
        self._settings = _settings(base)
        self._sizes: dict[tuple[Any, ...], _Size] = {}
        self._places: weakref.WeakValueDictionary[Any, PromptPlace] = weakref.WeakValueDictionary()
        self._moves = 0
        self._capture: Capture | None = None
        # Known after the first step.
        self._held: HeldModules | None = None
        self._stream: Any = None

    @property
    def captured(self) -> int:
        """How many sizes are."""
        return sum(size.replay is not None for size in self._sizes.values())

    def changed(self, base: FrozenBase, plan: StepPlan) -> str | None:
        """Why what was captured would be wrong now; None where it would not."""
        if base is not self.base:
            return "the base's backbone is another one"
        if replace(plan, reasons=()) != self._plan:
            return "the step options say something else"
        if self._settings != _settings(base):
            return "the base's configuration says something else"
        return None if self._held is None else self._held.changed()

    def size_of(self, prompts: PromptBatch) -> _Size:
        """The steps of the cache's rows and slots beside prompts of these sizes, as this surrounding has them."""
        dtype = autocast_dtype(self.device)
        key = (*self.cache.sizes, sizes_of(prompts), dtype, torch.are_deterministic_algorithms_enabled())
        size = self._sizes.pop(key, None)
        if size is None:
            if len(self._sizes) >= MAX_GRAPHS:
                del self._sizes[next(iter(self._sizes))]
            size = self._new(self._place(key[2], prompts), dtype)
        self._sizes[key] = size
        return size

    def forget_moved(self) -> bool:
        """Drop what was captured before the cache took memory anew; whether anything was."""
        moved = self.cache.moves != self._moves
        if moved:
            # The memory that graphs share is given back with the last one: the next one begins with its own.
            self._sizes, self._capture, self._moves = {}, None, self.cache.moves
        return moved

    def run(self, size: _Size) -> Tensor:
        """The logits (B, 1, V) of one step, of what the buffers hold.

        Raises:
            CaptureError: the step is due to be captured and cannot be; nothing has run then.
        """
        if self._capture is None:
            self._capture = CAPTURES[self.device.type](self.device)
        if size.replay is None and size.steps < WARM_UP_STEPS:
            logits = self._capture.warm_up(size.run)
            size.steps += 1
            if self._held is None:
                self._held = HeldModules(nn.ModuleList([self.base.model]))
            return logits
        if size.replay is None:
            try:
                size.replay = self._capture(size.run)
            except Exception as error:
                raise CaptureError(error) from error
        replayed = size.replay()
        assert replayed is not None
        return replayed

    def follow(self) -> None:
        """Buffers are written on the current stream from now on, after what an earlier one has to do with them."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _place(self, sizes: tuple[Any, ...], prompts: PromptBatch) -> PromptPlace:
        place = self._places.get(sizes)
        if place is None:
            place = self._places[sizes] = PromptPlace(prompts)
        return place

    def _new(self, place: PromptPlace, dtype: torch.dtype | None) -> _Size:
        rows, room = self.cache.sizes
        with torch.inference_mode(False):
            ids, positions = (torch.zeros(rows, 1, dtype=torch.int64, device=self.device) for _ in range(2))
            mask = torch.ones(rows, room, dtype=torch.bool, device=self.device)
        base, cache, plan = self.base, self.cache, self._plan
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, CACHE: cache, "use_cache": True}
        under: dict[str, Any] = {"enabled": False} if dtype is None else {"dtype": dtype, "cache_enabled": False}

        def run() -> Tensor:
            # What autocast casts may not outlive a capture, nor may what is made be of inference mode.
            autocast = torch.autocast(ids.device.type, **under)
            with torch.inference_mode(False), torch.no_grad(), autocast, cache.in_place():
                call = read_call(inputs, base.family, base.model, base.backbone, stacks=False)
                target = base.hooked.whole(base.model)
                logits: Tensor = run_plain(base, target, call, ReadyPrompts(place.batch), plan, training=False).logits
                return logits

        return _Size(ids, positions, mask, place, run)


class CaptureError(RuntimeError):
    """A step could not be captured."""

    def __init__(self, error: BaseException) -> None:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        super().__init__(f"a decode step could not be captured: {type(error).__name__}: {line}")


class DecodeCall:
    """The decode steps of one `generate`, which hands its calls of the model in here."""

    def __init__(
        self, steps: DecodeSteps, rows_of: Callable[[int], RowPrompts], new: int | None, refuse: Callable[[str], None]
    ) -> None:
        """Begin with an empty cache.

        Args:
            rows_of: the prompts of each of B rows.
            new: as many tokens will be written at most; None where nobody knows.
            refuse: told why steps cannot be captured, now or later.
        """
        self._steps, self._rows_of, self._new, self._refuse = steps, rows_of, new, refuse
        self._limit = text_limit(steps.base.backbone, steps.base.family)
        self._size: _Size | None = None
        self._sizes = (0, 0)
        self._offset: int | Tensor = 0
        self._most_offset = 0
        self._is_off = False
        self.cache = steps.cache
        self.cache.clear(new)
        steps.follow()

    def __call__(self, given: Mapping[str, Any]) -> CausalLMOutputWithPast | None:
        """The output of a decode step; None where the call has to run as any other does.

        Args:
            given: the keyword arguments of the base's forward.
        """
        ids, cache = given.get("input_ids"), self.cache
        if self._is_off or given.get(CACHE) is not cache or not _is_step(given, cache):
            return None
        assert isinstance(ids, Tensor)
        cache.make_room(cache.length + 1)
        if self._steps.forget_moved() or self._size is None or cache.sizes != self._sizes:
            self._size = self._enter(given.get("attention_mask"))
        size = self._size
        # What is too long is refused where it always is.
        if size is None or (self._limit is not None and cache.length + 1 + self._most_offset > self._limit):
            return None
        size.input_ids.copy_(ids)
        size.position_ids.copy_(given["position_ids"])
        if self._most_offset:
            size.position_ids.add_(self._offset)
        cache.position.fill_(cache.length)
        try:
            logits = self._steps.run(size)
        except CaptureError as error:
            self._is_off = True
            self._refuse(str(error))
            return None
        cache.advance()
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def _enter(self, mask: Tensor | None) -> _Size | None:
        """The steps of the cache's size, their prompts and padding in place; None where prompts cannot be.

        Args:
            mask: (B, M) of the text with the next token.
        """
        steps = self._steps
        rows = self._rows_of(self.cache.sizes[0])
        prompts = rows.batch(steps.base, steps.device)
        if any(isinstance(layer, LazyPrompt) for layer in prompts.layers):
            return None
        offsets = rows.offsets(steps.base)
        self._most_offset, self._sizes = max(offsets), self.cache.sizes
        self._offset = offsets[0]
        if len(set(offsets)) > 1:
            self._offset = torch.tensor(offsets, device=steps.device)[:, None]
        size = steps.size_of(prompts)
        size.prompts.fill(prompts)
        size.mask.fill_(True)
        if mask is not None:
            size.mask[:, : mask.shape[1]].copy_(mask)
        return size


def _is_step(given: Mapping[str, Any], cache: SlotCache) -> bool:
    """Whether a call brings one more token for each of the rows that the cache has, and asks for nothing beside."""
    ids, positions, mask = given.get("input_ids"), given.get("position_ids"), given.get("attention_mask")
    rows = cache.sizes[0]
    if not cache.length or not isinstance(ids, Tensor) or ids.shape != (rows, 1):
        return False
    if not isinstance(positions, Tensor) or positions.shape not in ((rows, 1), (1, 1)):
        return False
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (rows, cache.length + 1)):
        return False
    return all(name in _READ or value is None or value is False for name, value in given.items())


def _settings(base: FrozenBase) -> list[dict[str, Any]]:
    """What the configurations of a base say now."""
    configs = {id(one): one for one in (base.model.config, base.model.config.get_text_config(), base.backbone.config)}
    return [_noted(vars(config)) for config in configs.values()]


def _noted(value: Any) -> Any:
    """A setting as it is now, if somebody changes its lists and dictionaries in place."""
    if isinstance(value, dict):
        return {name: _noted(one) for name, one in value.items()}
    return [_noted(one) for one in value] if isinstance(value, list) else value
