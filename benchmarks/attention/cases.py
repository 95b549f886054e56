"""What is measured: attention shapes of real models, in the order in which a short run should meet them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
DIRECTIONS = ("forward", "backward", "training")
PEER_SETS = ("all", "flex")


@dataclass(frozen=True)
class Shape:
    """Attention of one model: H query heads, Hkv key/value heads of size d."""

    heads: int
    kv_heads: int
    head_dim: int


# Read from the models' published configurations. bert-base and gpt2 differ from roberta-large only in H.
MODELS = {
    "roberta-large": Shape(16, 16, 64),
    "t5-3b-encoder": Shape(32, 32, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "llama-3-8b": Shape(32, 8, 128),
    "qwen3-0.6b": Shape(16, 8, 128),
    "tiny": Shape(2, 1, 16),
}
# Which model stands for (head size, causal) in the grid.
_GRID_MODELS = {
    (64, False): "roberta-large",
    (128, False): "t5-3b-encoder",
    (64, True): "llama-3.2-1b",
    (128, True): "llama-3-8b",
}
_GRID_BATCHES = ((64, 128), (32, 512), (8, 2048), (2, 8192))
_GRID_PROMPTS = (8, 20, 64, 128, 512, 2048)
_GRID_PADDING = (0.0, 0.4)
FLEX_CELLS_AT_MOST = 16


@dataclass(frozen=True)
class Case:
    """One cell: a batch of B rows of N tokens, a prompt of P, and what of it is run.

    Attributes:
        name: key of `MODELS` that H, Hkv and d come from.
        B, N, P, H, Hkv, d: sizes, as in `prompt_attention`.
        causal: a text query sees the prompt and the text up to itself.
        padding: share of the B * N positions that are padding, at the right end of rows; < 0.5.
        dtype: key of `DTYPES`.
        direction: "forward", "backward" (all five gradients) or "training" (both).
        peers: "all", or "flex" for the cells that also compile FlexAttention.
    """

    name: str
    B: int
    N: int
    P: int
    H: int
    Hkv: int
    d: int
    causal: bool = False
    padding: float = 0.0
    dtype: str = "bf16"
    direction: str = "training"
    peers: str = "all"

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}; got {self.direction!r}")
        if self.peers not in PEER_SETS:
            raise ValueError(f"peers must be one of {PEER_SETS}; got {self.peers!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}; got {self.dtype!r}")
        if not 0.0 <= self.padding < 0.5:
            raise ValueError(f"padding must be in [0, 0.5); got {self.padding!r}")

    @property
    def id(self) -> str:
        """A name that no other cell has."""
        sight = "causal" if self.causal else "full"
        parts = [self.name, self.direction, f"B{self.B}", f"N{self.N}", f"P{self.P}", f"d{self.d}"]
        parts += [sight, f"pad{round(100 * self.padding)}", self.dtype]
        return "-".join(parts + (["flex"] if self.peers == "flex" else []))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of every tensor of the case."""
        return DTYPES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.H // self.Hkv

    @property
    def gradients(self) -> bool:
        """Whether the cell runs a backward pass."""
        return self.direction != "forward"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row: evenly spread, the longest of them N, `padding` of them missing."""
        if self.B == 1:
            return (max(1, round(self.N * (1 - self.padding))),)
        step = 2 * self.padding / (self.B - 1)
        return tuple(max(1, round(self.N * (1 - step * row))) for row in range(self.B))

    @property
    def tokens(self) -> int:
        """T, the real tokens of the batch."""
        return sum(self.lengths)

    def as_dict(self) -> dict[str, object]:
        """The case as JSON values."""
        return asdict(self)


def case_of(model: str, B: int, N: int, P: int, **options) -> Case:
    """A case with H, Hkv and d of a model of `MODELS`."""
    shape = MODELS[model]
    return Case(model, B, N, P, shape.heads, shape.kv_heads, shape.head_dim, **options)


def kernel_cases() -> list[Case]:
    """The grid of the kernels suite; whatever its first minutes give already judges every goal."""
    ordered = itertools.chain(_headline(), _second_wave(), _grid())
    return list({case.id: case for case in ordered}.values())


def _headline() -> Iterator[Case]:
    """One cell for each goal, the cheapest to set up first; FlexAttention compiles, so it is last."""
    encoder, wide = ("roberta-large", 32, 512, 128), ("t5-3b-encoder", 32, 512, 128)
    yield case_of(*encoder, direction="forward")  # K1
    yield case_of(*encoder, direction="backward")  # K3 at d = 64, K7
    yield case_of(*encoder, direction="training")  # T1
    yield case_of(*encoder, direction="training", padding=0.4)  # K4 at N >= 512
    yield case_of("roberta-large", 64, 128, 20, direction="training", padding=0.4)  # K4 at N = 128
    yield case_of(*wide, direction="forward")  # K2
    yield case_of(*wide, direction="backward")  # K3 at d = 128
    yield case_of("llama-3-8b", 8, 2048, 128, causal=True, direction="training")  # K6
    yield case_of(*encoder, direction="training", peers="flex")  # K5


def _second_wave() -> Iterator[Case]:
    """The corners of each goal: short and long text, short and long prompts, both head sizes."""
    for model, causal in (("roberta-large", False), ("t5-3b-encoder", False)):
        for (B, N), P in itertools.product(((8, 2048), (2, 8192), (64, 128)), (20, 512)):
            for direction in ("forward", "backward"):
                yield case_of(model, B, N, P, causal=causal, direction=direction)
    for model, P in itertools.product(("llama-3.2-1b", "llama-3-8b", "qwen3-0.6b"), (20, 128)):
        yield case_of(model, 32, 512, P, causal=True)
        yield case_of(model, 8, 2048, P, causal=True, padding=0.4)
    for (B, N), P in itertools.product(((64, 128), (8, 2048)), (8, 128, 512)):
        yield case_of("roberta-large", B, N, P, padding=0.4)
    yield from _flex_cases()


def _flex_cases() -> Iterator[Case]:
    """The cells that FlexAttention is compiled for; with the headline one, 13."""
    for model, causal in (("roberta-large", False), ("llama-3-8b", True)):
        for (B, N), P in (((32, 512), 20), ((8, 2048), 128), ((8, 2048), 512)):
            for padding in _GRID_PADDING:
                yield case_of(model, B, N, P, causal=causal, padding=padding, peers="flex")


def _grid() -> Iterator[Case]:
    """Every cell that PERFORMANCE names, goal-deciding directions first."""
    for direction in ("training", "forward", "backward"):
        for padding, P in itertools.product(_GRID_PADDING, (128, 20, 512, 8, 64, 2048)):
            for (d, causal), (B, N) in itertools.product(_GRID_MODELS, _GRID_BATCHES):
                yield case_of(
                    _GRID_MODELS[d, causal],
                    B,
                    N,
                    P,
                    causal=causal,
                    padding=padding,
                    direction=direction,
                )


def gate_cases(dtype: str = "bf16") -> list[Case]:
    """Small odd shapes, every feature of the suite once: what has to be right before any timing.

    Two have short rows, of heads enough for `row_backward.is_chosen` on 132 multiprocessors.
    """
    cases = [
        case_of("roberta-large", 3, 129, 17, padding=0.4),
        case_of("roberta-large", 17, 100, 20, padding=0.4),
        case_of("t5-3b-encoder", 9, 65, 0),
        case_of("llama-3.2-1b", 2, 127, 33, causal=True),
        case_of("llama-3-8b", 17, 63, 100, causal=True, padding=0.4),
    ]
    return [replace(case, dtype=dtype) for case in cases]


def tiny_cases() -> list[Case]:
    """What Triton's interpreter gets through in seconds: each direction, both sights, padding."""
    tiny = {"dtype": "fp32"}
    return [
        case_of("tiny", 2, 7, 3, direction="forward", **tiny),
        case_of("tiny", 2, 6, 3, causal=True, padding=0.4, direction="training", **tiny),
    ]


def large_cases() -> list[Case]:
    """Sizes that only a GPU can run, in every dtype."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        cases += [
            case_of("roberta-large", 32, 512, 128, padding=0.4, dtype=dtype),
            case_of("llama-3-8b", 4, 2048, 2048, causal=True, dtype=dtype),
            case_of("t5-3b-encoder", 1, 8192, 20, dtype=dtype),
        ]
    return cases


def huge_case(memory: int) -> Case:
    """A batch whose q holds more than 2^31 elements; k and v too where a device has `memory` bytes enough for that."""
    return case_of("t5-3b-encoder" if memory >= 120 * 10**9 else "llama-3-8b", 520, 1024, 64)


def tune_cases(tiny: bool = False) -> list[Case]:
    """The shapes that a launch configuration is chosen on."""
    if tiny:
        return [case_of("tiny", 1, 17, 3, dtype="fp32")]
    return [
        case_of("roberta-large", 32, 512, 128),
        case_of("roberta-large", 8, 2048, 128),
        case_of("llama-3-8b", 8, 2048, 128, causal=True),
        case_of("t5-3b-encoder", 32, 512, 128),
        case_of("llama-3.2-1b", 8, 2048, 128, causal=True),
        case_of("roberta-large", 64, 128, 20, padding=0.4),
    ]
