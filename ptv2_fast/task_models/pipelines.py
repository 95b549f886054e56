"""The names of our model classes in the list by which transformers' pipelines tell what they support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pipelines import base as pipelines


def name_in_pipelines(tasks: Mapping[type[nn.Module], Sequence[str]]) -> None:
    """Let a pipeline for these tasks take a model of a class without logging that it is not supported.

    transformers asks this list, of models that wrap another one, beside its own models; a version without it logs on.

    Args:
        tasks: class -> names of pipelines.
    """
    supported = getattr(pipelines, "SUPPORTED_PEFT_TASKS", {})
    for kind, names in tasks.items():
        for name in names:
            known = supported.setdefault(name, [])
            if kind.__name__ not in known:
                known.append(kind.__name__)
