"""What the classes of all tasks share: rows of another task's adapters are run by the class that is theirs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from ptv2_fast.adapter import BASE_ROW, Adapter, language_task
from ptv2_fast.inputs.arguments import named_arguments
from ptv2_fast.inputs.cache import with_cache_name
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.prompts.learning_rate import watch_rate
from ptv2_fast.task_models.mixed_generation import generate_mixed
from ptv2_fast.task_models.mixed_rows import run_mixed
from ptv2_fast.task_types import TASKS

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="TaskModel")


class TaskModel(PTuningV2Model):
    """What the classes of all tasks share."""

    def tasks_of(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        """The tasks of a call's rows, each once; unknown names have none, and are refused where the rows are read.

        A row of the bare base goes with the others. Where those are read by heads, or have several tasks, it writes
        text, if the base does.
        """
        own = self.adapters[self.active_adapter].config.task_type
        if adapter_names is None or isinstance(adapter_names, str):
            return (own,)
        found = {self.adapters[name].config.task_type: None for name in adapter_names if name in self.adapters}
        tasks = tuple(found) or (own,)
        if BASE_ROW in adapter_names and (len(tasks) > 1 or TASKS[tasks[0]].has_head):
            written = language_task(self.base_model)
            if written is not None:
                return tuple({**found, written: None})
        return tasks

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """`generate` of the base with the prompts in every step; all its modes, caches and arguments.

        The cache that it returns holds the text alone: a second turn on it is a run on the whole text.

        Args:
            adapter_names: one name per row, `"__base__"` for none; None runs the active adapter on all rows.

        Returns:
            What the base's own `generate` gives; where rows of other tasks stand among them, a `MixedGeneration`: the
            text of the rows that write some, and what the others' tasks give, of the pass that reads all their texts.

        Raises:
            ValueError: no row writes text, or an argument asks for what prompts cannot be part of.
        """
        if self._disabled:
            return self.base_model.generate(*args, **with_cache_name(kwargs))
        tasks = self.tasks_of(adapter_names)
        if adapter_names and set(adapter_names) == {BASE_ROW}:
            tasks = (language_task(self.base_model) or tasks[0],)
        writers = [task for task in tasks if TASKS[task].gives == "text"]
        if not writers:
            active = "adapter_names" if adapter_names else f"the active adapter {self.active_adapter!r}"
            raise ValueError(
                f"{active} must be for a task that writes text; got {', '.join(tasks)} (call the model itself for that)"
            )
        model = self.held_as(writers[0])
        if len(tasks) == 1:
            return model._generate(*args, adapter_names=adapter_names, **kwargs)
        return generate_mixed(model, model._generate, args, kwargs, cast("Sequence[str]", adapter_names))

    def _generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """`generate` of rows that write text, all of them; the classes that do say how."""
        raise NotImplementedError(f"{type(self).__name__} writes no text")

    def _batching(self, method: str) -> Any:
        """A method of continuous batching, which the class of causal language models has, whatever is active."""
        if not self._disabled and self.task_type != "CAUSAL_LM" and language_task(self.base_model) == "CAUSAL_LM":
            return getattr(self.held_as("CAUSAL_LM"), method)
        return super()._batching(method)

    def train(self: M, mode: bool = True) -> M:
        """As everywhere; training finds the memory free that captured decode steps have kept. Its rate is looked at."""
        if mode and "_captured_decode" in self.__dict__:
            self.__dict__["_captured_decode"].forget()
        if mode:
            watch_rate(self)
        return super().train(mode)

    def set_adapter(self, name: str) -> None:
        """As everywhere; what trains now has its rate looked at."""
        super().set_adapter(name)
        watch_rate(self, begins=False)

    def _register(self, name: str, adapter: Adapter) -> None:
        super()._register(name, adapter)
        watch_rate(self, begins=False)

    def _apply(self: M, *args: Any, **kwargs: Any) -> M:
        """Move or cast; what was captured, whichever task's steps, is given back first, with its memory."""
        for name in ("_captured_forward", "_captured_decode"):
            if name in self.__dict__:
                self.__dict__[name].forget()
        return super()._apply(*args, **kwargs)


def for_tasks(*served: str) -> Callable[[F], F]:
    """A forward that runs rows of these tasks; a call with other ones goes to the class of theirs.

    Rows of several tasks have one result each, in a `MixedOutput`.
    """

    def decorate(forward: F) -> F:
        # Without self.
        place = list(inspect.signature(forward).parameters).index("adapter_names") - 1

        @functools.wraps(forward)
        def run(self: TaskModel, *args: Any, **kwargs: Any) -> Any:
            names = args[place] if len(args) > place else kwargs.get("adapter_names")
            tasks = self.tasks_of(None if self._disabled else names)
            if len(tasks) == 1 and tasks[0] in served:
                return forward(self.held_as(served[0]), *args, **kwargs)
            given = {**named_arguments(forward.__get__(self), args), **kwargs}
            given = {name: value for name, value in given.items() if value is not None}
            if len(tasks) == 1:
                other = self.held_as(tasks[0])
                # Not the object's: accelerate and others set one there, which is this very one again.
                return type(other).forward(other, **given)
            return run_mixed(self, tasks, given)

        return cast(F, run)

    return decorate


def text_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """A text's arguments by name."""
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        **others,
    }
