"""What a model says of its training steps, asked again only where somebody may have changed what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ptv2_fast.families.registry import family_of
from ptv2_fast.step.options import StepPlan
from ptv2_fast.step.packed import PackedTask


@dataclass(frozen=True)
class Look:
    """What decides how steps run, as long as the model is as it was.

    Attributes:
        plan: what a step leaves out.
        not_packed, not_captured: why a step is not; None where it is.
        task: by what batches are packed; None where they are not.
        limit: the longest text; None where there is no limit.
        padding: the id whose tokens have no position of their own where there is no mask; None where all have.
        relies_on: the active adapter, the switches and the task, which what is captured has been captured with.
    """

    plan: StepPlan
    not_packed: str | None
    not_captured: str | None
    task: PackedTask | None
    limit: int | None
    padding: int | None
    relies_on: tuple[str, StepPlan, PackedTask | None]

    @classmethod
    def at(cls, model: Any, plan: StepPlan, not_captured: str | None) -> Look:
        """Ask a PTuningV2Model.

        Args:
            plan: its `step_plan`, which walks the model.
            not_captured: why steps are not captured.
        """
        not_packed = model.why_not_packed()
        if not_packed is None and plan.weights_owner:
            not_packed = f"only the model's own forward brings the weights: {plan.weights_owner}"
        task, limit = (model.packed_task(), model.text_limit()) if not_packed is None else (None, None)
        first = family_of(model.backbone).first_position(model.backbone)
        padding = first - 1 if first else None
        relies_on = model.active_adapter, replace(plan, reasons=()), task
        return cls(plan, not_packed, not_captured, task, limit, padding, relies_on)


class Attributes:
    """The attributes that a look at a model reads: asked again for nothing now and then, but never too late.

    Those of the model, its base, its backbone, the active adapter and the heads, and of their configurations. Modules
    and weights are `HeldModel`'s.
    """

    def __init__(self, model: Any) -> None:
        """Note them as they are."""
        base, adapter = model.base_model, model.adapters[model.active_adapter]
        head = base.get_output_embeddings()
        modules = [model, base, model.backbone, adapter, *adapter.heads.values(), *([] if head is None else [head])]
        settings = [base.config, base.config.get_text_config(), model.backbone.config, adapter.config]
        self._places: list[Mapping[str, Any]] = [vars(one) for one in (*modules, *settings)]
        # An equal configuration in the place of one would be changed unseen.
        self._settings = [
            (place, name, value)
            for place in self._places
            for name, value in place.items()
            if any(value is one for one in settings)
        ]
        self._places += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._noted = [dict(place) for place in self._places]

    def same(self) -> bool:
        """Whether nobody has set one since."""
        if any(place.get(name) is not value for place, name, value in self._settings):
            return False
        try:
            return self._places == self._noted
        except Exception:
            # What is another object now may refuse to be compared, as tensors do.
            return False
