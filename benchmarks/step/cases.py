"""The cells of the step and memory suites, in the order in which a short run should meet them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.attention.cases import DTYPES
from benchmarks.step.models import MINILM, is_causal

# What a cell compares: eager forms, also the compiled ones, or a batch of many tasks against one of one.
PEER_SETS = ("eager", "compiled", "tasks")
TASKS = 16


@dataclass(frozen=True)
class StepCase:
    """One training step: a batch of B rows of N tokens, a prompt of P in every layer.

    Attributes:
        model: key of `models.SHAPES`, or "minilm".
        B, N, P: sizes.
        padding: share of the B * N positions that are padding, at the right end of rows; < 0.5.
        dropout: of an encoder's hidden states and attention.
        dtype: key of `attention.cases.DTYPES`, of the frozen weights; prompts are float32.
        peers: one of `PEER_SETS`.
    """

    model: str
    B: int
    N: int
    P: int
    padding: float = 0.0
    dropout: float = 0.0
    dtype: str = "bf16"
    peers: str = "eager"

    def __post_init__(self):
        if self.peers not in PEER_SETS:
            raise ValueError(f"peers must be one of {PEER_SETS}; got {self.peers!r}")
        if not 0.0 <= self.padding < 0.5:
            raise ValueError(f"padding must be in [0, 0.5); got {self.padding!r}")

    @property
    def id(self) -> str:
        """A name that no other cell has; with and without compiled peers it is the same cell."""
        parts = [self.model, f"B{self.B}", f"N{self.N}", f"P{self.P}", f"pad{round(100 * self.padding)}", self.dtype]
        parts += [f"drop{round(100 * self.dropout)}"] if self.dropout else []
        return "-".join(parts + ([f"tasks{TASKS}"] if self.peers == "tasks" else []))

    @property
    def causal(self) -> bool:
        """Whether the model is a causal language model."""
        return is_causal(self.model)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the frozen weights."""
        return DTYPES[self.dtype]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row: evenly spread, the longest of them N, `padding` of them missing."""
        step = 2 * self.padding / max(1, self.B - 1)
        return tuple(max(2, round(self.N * (1 - step * row))) for row in range(self.B))

    def as_dict(self) -> dict[str, object]:
        """The case as JSON values."""
        return {**asdict(self), "causal": self.causal}


@dataclass(frozen=True)
class Group:
    """Cells that one set of models serves: the same shapes, batches with and without padding."""

    cases: tuple[StepCase, ...]

    @property
    def first(self) -> StepCase:
        """The cell that names the group's shapes."""
        return self.cases[0]


def _group(model: str, B: int, N: int, P: int, *, padding=(0.4, 0.0), **options) -> Group:
    return Group(tuple(StepCase(model, B, N, P, padding=share, **options) for share in padding))


_BERT_CELLS = ((32, 128, 20), (8, 64, 20), (32, 128, 128), (64, 128, 8), (16, 512, 128), (8, 2048, 128))
_LLAMA_CELLS = ((8, 512, 128), (4, 2048, 20), (4, 2048, 512))
_QWEN_CELLS = ((8, 512, 64), (8, 64, 20), (8, 2048, 128))


def step_groups() -> list[Group]:
    """The grid of the steps suite: a cell of every goal first, compiled peers of the others last."""
    groups: dict[tuple[str, str], Group] = {}
    for group in [*_headline(), *_eager(), *_compiled()]:
        name, peers = group.first.id, group.first.peers
        # A cell replaces the one with its id: after a cell with compiled peers the one without would take them away.
        if peers != "eager" or (name, "compiled") not in groups:
            groups.setdefault((name, peers), group)
    return list(groups.values())


def _headline() -> Iterator[Group]:
    yield _group("bert-base", 32, 128, 20, peers="compiled")  # S1 to S5
    yield _group("bert-base", 32, 128, 20, dropout=0.1)  # S7
    yield _group("bert-base", 8, 64, 20, peers="compiled")  # S6
    yield _group("qwen3-0.6b", 8, 512, 64, peers="compiled")  # S9
    yield _group("bert-base", 32, 128, 20, padding=(0.0,), peers="tasks")  # T1
    yield _group("bert-base", 64, 128, 512)  # S5 at P = 512
    yield _group("llama-3-8b", 8, 512, 128, peers="compiled")  # S8
    yield _group("roberta-large", 32, 128, 20, peers="compiled")  # S1 at large


def _eager() -> Iterator[Group]:
    for model in ("bert-base", "roberta-large"):
        for cell in _BERT_CELLS:
            yield _group(model, *cell)
    yield _group("bert-base", 16, 512, 128, dropout=0.1)
    for cell in _QWEN_CELLS:
        yield _group("qwen3-0.6b", *cell)
    for cell in _LLAMA_CELLS:
        yield _group("llama-3-8b", *cell)


def _compiled() -> Iterator[Group]:
    for group in list(_eager()):
        if not group.first.dropout:
            yield Group(tuple(replace(case, peers="compiled") for case in group.cases))


def cpu_groups() -> list[Group]:
    """MiniLM with its own weights in float32: sizes that one core gets through."""
    cells = ((8, 64, 20), (8, 128, 128), (16, 128, 20))
    return [_group(MINILM, *cell, dtype="fp32") for cell in cells]


def tiny_groups() -> list[Group]:
    """An encoder with its compiled peers, a decoder, dropout, and a batch of several tasks, all in seconds."""
    return [
        _group("tiny-bert", 3, 9, 4, dtype="fp32", peers="compiled"),
        _group("tiny-qwen3", 3, 9, 4, dtype="fp32"),
        _group("tiny-bert", 3, 9, 4, dtype="fp32", padding=(0.4,), dropout=0.1),
        _group("tiny-bert", TASKS, 5, 3, dtype="fp32", padding=(0.0,), peers="tasks"),
    ]


# The cells of the memory suite.
MEMORY_CELLS = (
    ("bert-base", 32, 128, 128), ("qwen3-0.6b", 8, 512, 64), ("roberta-large", 16, 512, 128),
    ("llama-3-8b", 8, 512, 128), ("bert-base", 32, 128, 20), ("bert-base", 8, 2048, 128), ("qwen3-0.6b", 8, 2048, 128),
)  # fmt: skip


def memory_groups(cells) -> list[Group]:
    """Cells of the memory suite: (model, B, N, P), each with and without padding."""
    return [_group(*cell) for cell in cells]


def audited_case(device: torch.device) -> StepCase:
    """P + N and B are prime, so that nothing a step must have is as large as a copy over P + N.

    On a card the prompt's gradient is summed from partial sums: with 16 heads they are not as many as there are rows.
    """
    if device.type == "cuda":
        return StepCase("roberta-large", 11, 1000, 103, padding=0.4)  # P + N = 1103
    return StepCase("tiny-bert", 3, 13, 10, padding=0.4, dtype="fp32")  # P + N = 23
