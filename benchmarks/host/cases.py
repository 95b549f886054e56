"""The cells of the suite `host`: models so small that a step is nothing but what the host does."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# Rows, tokens and virtual tokens of every cell; a batch of many tasks has a row of each.
ROWS, TOKENS, PROMPT, TASKS = 4, 32, 16, 16
KINDS = ("launch", "step", "token", "tasks", "cpu-eval", "cpu-step")
# A whole batch with its padding, or without.
_PADDED = ("step", "cpu-eval", "cpu-step")
DEPTHS = {"tiny-bert": 12, "tiny-llama": 24}


@dataclass(frozen=True)
class HostCase:
    """One thing that the host does.

    Attributes:
        kind: one of `KINDS`: a launch of attention, an eager training step, a generated token, a step whose rows have
            as many tasks; and without a stand-in, a CPU's own forward of evaluation and training step.
        model: key of `step.models.SHAPES`; empty for a launch.
        layers: its depth.
        injection: of our prompts; "forward" or "backward" for a launch.
        padding: share of the tokens that are padding.
    """

    kind: str
    model: str = ""
    layers: int = 1
    injection: str = "deep"
    padding: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {self.kind!r}")

    @property
    def id(self) -> str:
        """A name that no other cell has."""
        if self.kind == "launch":
            return f"launch-{self.injection}"
        padding = f"-pad{round(100 * self.padding)}" if self.kind in _PADDED else ""
        return f"{self.kind}-{self.model}-L{self.layers}-{self.injection}{padding}"

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU is the device itself, and nothing may stand in for one."""
        return self.kind.startswith("cpu-")

    @property
    def rows(self) -> int:
        """B."""
        return TASKS if self.kind == "tasks" else ROWS

    def as_dict(self) -> dict[str, object]:
        """For the result file."""
        return {**asdict(self), "dtype": "fp32"}


def host_cases(tiny: bool = False) -> list[HostCase]:
    """Every cell; models of two layers where it is tiny."""
    depths = dict.fromkeys(DEPTHS, 2) if tiny else DEPTHS
    llama = {"model": "tiny-llama", "layers": depths["tiny-llama"]}
    paddings = (0.4,) if tiny else (0.0, 0.4)
    return [
        HostCase("launch", injection="forward"),
        HostCase("launch", injection="backward"),
        *(
            HostCase("step", model, layers, injection, padding)
            for model, layers in depths.items()
            for injection in ("deep", "prefix")
            for padding in paddings
        ),
        *(HostCase("token", injection=injection, **llama) for injection in ("deep", "prefix")),
        *(
            HostCase("tasks", model, layers, injection)
            for model, layers in depths.items()
            for injection in ("deep", "prefix")
        ),
        *(
            HostCase(kind, model, layers, injection, padding)
            for kind in ("cpu-eval", "cpu-step")
            for model, layers in depths.items()
            for injection in ("deep", "prefix")
            for padding in paddings
        ),
    ]  # fmt: skip
