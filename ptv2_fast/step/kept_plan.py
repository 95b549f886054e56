"""The plan of a model's steps, decided again only where what it depends on is another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.float8_plan import Float8Found
from ptv2_fast.step.options import StepOptions, StepPlan, logger, plan_step


class KeptPlan:
    """The last plan of one model; each plan is logged once, however often it comes back."""

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], StepPlan] | None = None
        self._logged: set[StepPlan] = set()

    def of(
        self,
        options: StepOptions,
        *,
        training: bool,
        device: torch.device,
        backend: str,
        weights_owner: str | None,
        without: Mapping[str, str],
        find_float8: Callable[[], Float8Found],
    ) -> StepPlan:
        """What `plan_step` decides for these arguments; `without` never changes for one backbone.

        Raises:
            ValueError: as `plan_step` does.
        """
        traced = torch.compiler.is_compiling()
        asked = (options, training, device, backend, weights_owner, device.type in CAPTURES)
        if not traced and self._last is not None and self._last[0] == asked:
            return self._last[1]
        plan = plan_step(
            options,
            training=training,
            device=device,
            backend=backend,
            weights_owner=weights_owner,
            without=without,
            find_float8=find_float8,
        )
        if not traced:
            self._last = asked, plan
            if plan not in self._logged:
                self._logged.add(plan)
                logger.info("training step: %s", plan)
        return plan
