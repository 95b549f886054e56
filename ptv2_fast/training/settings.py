"""How long and how fast to train; what is out of range is refused without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptv2_fast.choices import SCHEDULES


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast to train.

    Attributes:
        learning_rate: of AdamW, at the start.
        epochs: passes over the training rows.
        batch_size: rows of a batch.
        gradient_accumulation: batches of a step.
        schedule: "linear" (to zero at the end) or "exponential" (times `decay` after each epoch).
        decay: the factor of the exponential schedule.
        warmup: share of the steps in which the rate rises from zero (linear schedule).
        weight_decay: of AdamW.
        max_grad_norm: what gradients are clipped to.
        early_stopping: stop after so many epochs without a better dev metric; None never stops.
        restore_best: end with the weights of the best epoch on dev; False keeps the last epoch's, which is the better
            choice where there are so few dev rows that the best epoch is one by chance.
        seed: of the order of rows, dropout and everything else drawn while training.
        bf16: run the model's arithmetic in bfloat16 (autocast); the trained weights stay as they are.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        ```python
        from ptv2_fast.training.fit import FitSettings

        settings = FitSettings(learning_rate=5e-3, epochs=20, early_stopping=3)
        assert settings.batch_size == 32
        ```
    """

    learning_rate: float = 1e-2
    epochs: int = 10
    batch_size: int = 32
    gradient_accumulation: int = 1
    schedule: str = "linear"
    decay: float = 0.95
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    early_stopping: int | None = None
    restore_best: bool = True
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation"):
            _positive_integer(name, getattr(self, name))
        if self.early_stopping is not None:
            _positive_integer("early_stopping", self.early_stopping)
            if not self.restore_best:
                raise ValueError("restore_best must be True with early_stopping: the last epoch is a worse one")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        for name, low, high in (("decay", 0, 1), ("warmup", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in [{low}, {high}]; got {getattr(self, name)!r}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive; got {self.max_grad_norm!r}")
        # NumPy takes no larger one.
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32); got {self.seed!r}")


def _positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a positive integer below 2**31; got {value!r}")
