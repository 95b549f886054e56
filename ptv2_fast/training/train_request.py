"""What a training run is asked for: a model's name, data, settings; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptv2_fast.training.data.source import DataSource
from ptv2_fast.training.settings import FitSettings


@dataclass(frozen=True)
class TrainRequest:
    """What a training run is asked for; all of it goes into settings.json.

    Attributes:
        model: a hub name, a folder or a .gguf file.
        task_type: one of `TRAINED_TASKS`.
        data, dev: training and development examples; without dev the last epoch is kept.
        fit: how long and how fast.
        num_virtual_tokens, injection, layers, init, reparameterization, prompt_dropout: of
            PTuningV2Config; init None means "text", or "normal" with a reparameterization.
        pooling: what a head with one vector for each row reads, and what SENTENCE_RETRIEVAL's vectors are; None means
            "last" on decoders, on encoders "mean" (MULTIPLE_CHOICE: "first").
        max_length: tokens of a row; None means the task's usual length.
        doc_stride: tokens that windows of a context share.
        dropout: of the base's hidden states; None keeps the base's own.
        problem_type: what a SEQ_CLS head solves, as `HeadConfig` says it; None is one class for each row.

    Raises:
        ValueError: max_length or doc_stride is out of range.
    """

    model: str
    task_type: str
    data: DataSource
    dev: DataSource | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    num_virtual_tokens: int = 20
    injection: str = "deep"
    layers: tuple[int, ...] | None = None
    init: str | None = None
    reparameterization: int | None = None
    prompt_dropout: float = 0.0
    pooling: str | None = None
    max_length: int | None = None
    doc_stride: int = 128
    dropout: float | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_length", 1), ("doc_stride", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value < 2**31:
                raise ValueError(f"{name} must be at least {low} and below 2**31; got {value!r}")
