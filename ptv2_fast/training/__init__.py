"""Training systems around the model: data, metrics, recipes, curves and the Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Trainer", "TrainingArguments"]

if TYPE_CHECKING:
    from ptv2_fast.training.trainer import Trainer, TrainingArguments
else:
    # Loaded when asked for: the rest of the room does not need transformers' Trainer.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("ptv2_fast.training.trainer"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
