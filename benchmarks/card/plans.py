"""What is done with a card's minutes, as data: which phases, in which order, how long each may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# When a phase is run: whatever the gates say, only where they are green, only where they are red.
ALWAYS, GREEN, RED = "always", "green", "red"
VARIANTS = ("tune", "rest", "kernels", "steps")


@dataclass(frozen=True)
class Phase:
    """One thing that is done in one process.

    Attributes:
        name: of the phase, once in a plan.
        work: key of `work.WORK`.
        limit: seconds after which it is stopped.
        latest: seconds after the start of the run at which it is not begun any more.
        timed: it measures time or fills the card, so that it is alone: whatever runs beside is stopped meanwhile.
        beside: it is not waited for, and measures no time.
        when: `ALWAYS`, `GREEN` or `RED`.
        arguments: of the work.
        tiny: what differs from `arguments` in a rehearsal on small models.
    """

    name: str
    work: str
    limit: float
    latest: float
    timed: bool = False
    beside: bool = False
    when: str = ALWAYS
    arguments: Mapping[str, object] = field(default_factory=dict)
    tiny: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Phases in order, and the seconds that they are laid out for."""

    phases: tuple[Phase, ...]
    seconds: float
    # Phases that are over later than this are none where the gates are red.
    red_seconds: float

    def scaled(self, seconds: float) -> Plan:
        """The same plan in other time."""
        by = seconds / self.seconds
        phases = tuple(replace(p, limit=p.limit * by, latest=p.latest * by) for p in self.phases)
        return Plan(phases, seconds, self.red_seconds * by)


# Ids end with the dtype, but for the cells that also compile FlexAttention.
_HEADLINE = (
    "roberta-large-*-B32-N512-P128-*-pad0-bf16", "roberta-large-training-B32-N512-P128-*-pad40-bf16",
    "roberta-large-training-B64-N128-P20-*-pad40-bf16", "t5-3b-encoder-*-B32-N512-P128-*-pad0-bf16",
    "llama-3-8b-training-B8-N2048-P128-*-pad0-bf16",
)  # fmt: skip
_KERNEL_PEERS = (
    "ours", "ours_by_gradient", "ours_packed", "ours_prefix", "ours_bank16", "sdpa_user", "sdpa_outside", "cudnn",
    "flash",
)  # fmt: skip
_EAGER = ("ours", "ours_captured", "ours_graph", "peft", "literal_sdpa", "floor", "ours_p0", "ours_tasks16")
_STEP_PEERS = (*_EAGER, "peft_compiled", "floor_compiled")
_CAPTURED = ("ours", "ours_captured", "ours_graph", "peft", "peft_compiled", "floor_compiled")
_DECODE = ("qwen3-0.6b-decode-B64-P512-*",)
_GENERATORS = ("ours", "peft", "ours_compiled", "static_compiled")
# A rehearsal runs every line once, on as few cells and peers as that takes.
_TINY_BERT = {
    "only": ("tiny-bert-B3-N9-P4-pad40-fp32",), "providers": ("ours", "ours_graph", "peft", "floor", "floor_compiled"),
}  # fmt: skip
_TINY_QWEN = {"only": ("tiny-qwen3-B3-N9-P4-pad0-fp32",), "providers": ("ours", "ours_graph", "peft")}
_TINY_PADDED = {**_TINY_QWEN, "only": ("tiny-qwen3-B3-N9-P4-pad40-fp32",)}
_TINY_MEMORY = {"only": ("tiny-qwen3-B3-N9-P4-pad0-fp32",), "providers": ("ours", "floor", "literal_sdpa")}
_TINY_DECODE = {"only": (), "providers": ("ours", "ours_compiled")}
# What is compiled is rehearsed in the first plan.
_TINY_COMPILED = {"only": _TINY_BERT["only"], "providers": ("floor_compiled",)}
_TINY_TASKS = {"only": ("tiny-bert-*-tasks16",)}
_TINY_PROFILE = {**_TINY_BERT, "providers": ("ours", "ours_graph", "peft")}
# What another phase does too is rehearsed there: one peer, one cell that no other phase of the plan has, one pass.
_TINY_SMALL = {"only": ("tiny-bert-B3-N9-P4-pad0-fp32",), "providers": ("peft",)}
_TINY_DROPPED = {"only": ("tiny-bert-*-drop10",), "providers": ("ours", "peft")}
_TINY_LLAMA, _TINY_FORWARD = {**_TINY_PADDED, "providers": ("peft",)}, {"only": ("tiny-forward-*",)}
_TINY_TUNE = {"only": ("forward-*",)}
# Somebody who compiles nothing: what is compiled is rehearsed once.
_TINY_FLOOR, _TINY_OURS = {**_TINY_COMPILED, "providers": ("floor",)}, {"only": (), "providers": ("ours",)}
_TESTS, _ONE_CHECK = ({"tests": path} for path in ("tests/kernels/test_bank_rows.py", "benchmarks/card/one_check.py"))


def _start() -> Phase:
    return Phase("start", "start", 30, 10)


def _gates(latest: float, limit: float, *, large: bool = True, tiny=_TINY_FORWARD) -> Phase:
    return Phase("gates", "gates", limit, latest, arguments={"large": large, "ahead": _HEADLINE}, tiny=tiny)


def _bisection(latest: float, limit: float) -> Phase:
    return Phase("bisection", "bisect", limit, latest, when=RED)


def _native(latest: float, limit: float) -> Phase:
    return Phase("native", "native", limit, latest, tiny=_TESTS)


def _steps(name: str, limit: float, latest: float, only, providers, tiny=_TINY_BERT, **options) -> Phase:
    return Phase(
        name, "steps", limit, latest, timed=True, when=GREEN,
        arguments={"only": only, "providers": providers, **options}, tiny=tiny,
    )  # fmt: skip


def _kernels(name: str, limit: float, latest: float, **arguments) -> Phase:
    chosen = {"only": _HEADLINE, "providers": _KERNEL_PEERS, **arguments}
    tiny = {"only": ("tiny-training-*" if name == "flex" else "tiny-forward-*",)}
    return Phase(name, "kernels", limit, latest, timed=True, when=GREEN, arguments=chosen, tiny=tiny)


def _beside(name: str, work: str, arguments, tiny) -> Phase:
    """Something compiled into the caches on disk while gates and native tests run, which time nothing."""
    return Phase(name, work, 150, 150, beside=True, when=GREEN, arguments=arguments, tiny=tiny)


def _compiled(name: str, only, *providers: str, tiny=_TINY_FLOOR) -> Phase:
    """Whole compiled models: a process for each, since tracing one keeps one core busy."""
    return _beside(name, "compile_steps", {"only": only, "providers": providers}, tiny)


def _decode(name: str, limit: float, latest: float, only, providers) -> Phase:
    arguments = {"only": only, "providers": providers}
    return Phase(name, "decode", limit, latest, timed=True, when=GREEN, arguments=arguments, tiny=_TINY_OURS)


def _checks(name: str, limit: float, latest: float, *only: str) -> Phase:
    return Phase(name, "checks", limit, latest, arguments={"only": only})


def first() -> Plan:
    """Is it right; then the headline of every goal, what is cheap before what is dear."""
    bert, small, tasks = "bert-base-B32-N128-P20-pad*-bf16", "bert-base-B8-N64-P20-*", "bert-base-*-tasks16"
    dropped = "bert-base-B32-N128-P20-*-drop10"
    qwen, llama = ("qwen3-0.6b-B8-N512-P64-*",), ("llama-3-8b-B8-N512-P128-*",)
    flex = ("roberta-large-training-B32-N512-P128-*-flex",)
    few = ("ours_graph", "ours_graph_compiled", "peft")
    static, generated = ({"only": _DECODE, "providers": (name,)} for name in ("static_compiled", "ours_compiled"))
    phases = (
        _start(),
        # What takes longest to compile begins before the gates; the rest when those leave cores free.
        _compiled("compile-qwen3", qwen, "peft_compiled"),
        _beside("compile-static", "compile_decode", static, _TINY_OURS),
        _compiled("compile-bert", (bert,), "peft_compiled", "floor_compiled", tiny=_TINY_COMPILED),
        # Some 60 codes are compiled before the first is judged: what takes long here costs the last phases, not all.
        _gates(90, 110, tiny={}),
        _bisection(130, 70),
        _compiled("compile-small", (small,), "peft_compiled"),
        _compiled("compile-layers", (*qwen, *llama), "ours_graph_compiled"),
        _beside("compile-ours", "compile_ours", {"only": (bert, small, *_DECODE)}, {"only": ()}),
        _beside("compile-decode", "compile_decode", generated, _TINY_DECODE),
        _beside("compile-flex", "compile_kernels", {"only": flex}, {"only": (), "providers": ("ours", "flex_concat")}),
        _native(190, 80),
        _kernels("kernels", 40, 230),
        _steps("steps", 60, 290, (bert,), _STEP_PEERS),
        _steps("small", 45, 320, (small,), _STEP_PEERS, _TINY_SMALL),
        _steps("tasks", 15, 335, (tasks,), ("ours", "ours_tasks16"), _TINY_TASKS),
        Phase("decode", "decode", 60, 350, timed=True, when=GREEN, arguments={
            "only": _DECODE, "providers": ("static_compiled", "ours_compiled"),
        }, tiny=_TINY_DECODE),
        _kernels("flex", 20, 380, only=flex, providers=("ours", "sdpa_user", "flex_concat", "flex_split")),
        _steps("qwen3", 80, 390, qwen, (*few, "peft_compiled"), _TINY_QWEN),
        _steps("llama", 80, 410, llama, few, _TINY_PADDED),
        _steps("dropout", 15, 420, (dropped,), _EAGER, _TINY_DROPPED),
        Phase(
            "memory", "memory", 20, 430, timed=True, when=GREEN,
            arguments={"only": ("bert-base-B32-N128-P128-*",), "providers": ("ours", "peft", "literal_sdpa", "floor")},
            tiny=_TINY_MEMORY,
        ),
        _steps(
            "profile", 25, 435, ("bert-base-B32-N128-P20-pad40-bf16",), ("ours", *few[::2]), _TINY_PROFILE,
            profile=True,
        ),
    )  # fmt: skip
    return Plan(phases, 450, 200)


def second(variant: str, only: tuple[str, ...] = ()) -> Plan:
    """What the second call does, by what the first one gave.

    Args:
        variant: "tune" (all was green), "rest" (and tuned before: what takes long to compile, and the checks of the
            machine), "kernels" (gates or tests were red), "steps" (steps or decode were).
        only: cells that variant "steps" measures.

    Raises:
        ValueError: the variant is none of those.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}; got {variant!r}")
    start, memcheck = _start(), _checks("memcheck", 60, 290, "sanitizer-memcheck")
    if variant == "kernels":
        native = replace(_native(200, 110), arguments={"failed": True}, tiny=_ONE_CHECK)
        return Plan((start, _gates(90, 90), _bisection(160, 80), native, memcheck), 330, 330)
    # First of what is timed: no card has run it.
    float8 = Phase("float8", "float8", 40, 110, timed=True, when=GREEN)
    tune = Phase("tune", "tune", 75, 175, timed=True, when=GREEN)
    again = _kernels("kernels-again", 50, 240, tuned=True, providers=(*_KERNEL_PEERS, "ours_tuned"))
    if variant == "steps":
        chosen = only or ("bert-base-B32-N128-P20-*",)
        fixed = _steps("steps-again", 100, 120, chosen, _STEP_PEERS, _TINY_QWEN)
        decode = Phase(
            "decode-again", "decode", 60, 180, timed=True, when=GREEN,
            arguments={"only": only or _DECODE, "providers": _GENERATORS}, tiny=_TINY_OURS,
        )  # fmt: skip
        after = (replace(tune, latest=260.0, tiny=_TINY_TUNE), replace(again, latest=290.0))
        return Plan((start, _gates(90, 70, large=False), fixed, decode, *after), 330, 200)
    failed = {"failed": True}
    if variant == "tune":
        bert, few = ("bert-base-B32-N128-P20-pad*-bf16",), ("peft", "floor")
        phases = (
            start,
            _compiled("compile-bert", bert, "peft_compiled", "ours_graph_compiled"),
            _gates(90, 70, large=False),
            float8,
            replace(_native(120, 60), arguments=failed, tiny=_ONE_CHECK),
            tune,
            again,
            _steps("steps", 60, 260, bert, (*_STEP_PEERS, "ours_graph_compiled"), _TINY_PROFILE),
            _steps("profile", 30, 290, bert, ("ours_graph", "ours_graph_compiled", *few), _TINY_PROFILE, profile=True),
            replace(memcheck, latest=310.0),
        )
        return Plan(phases, 330, 200)
    bert, small = ("bert-base-B32-N128-P20-pad*-bf16",), ("bert-base-B8-N64-P20-*",)
    dropped, prompted = ("bert-base-B32-N128-P20-*-drop10",), ("llama-3-8b-decode-B128-P2048-*",)
    qwen, llama = ("qwen3-0.6b-B8-N512-P64-*",), ("llama-3-8b-B8-N512-P128-*",)
    generators = ("ours_compiled", "static_compiled")
    phases = (
        start,
        # All that times nothing comes first, so that models are compiled beside it; large ones do not fit together.
        _compiled("compile-qwen3", qwen, "peft_compiled"),
        _compiled("compile-bert", bert, "peft_compiled", "floor_compiled"),
        _compiled("compile-small", small, "peft_compiled"),
        _beside("compile-decode", "compile_decode", {"only": _DECODE, "providers": generators}, _TINY_OURS),
        _gates(90, 100, large=False),
        float8,
        _compiled("compile-layers", (*qwen, *llama), "ours_graph_compiled"),
        replace(memcheck, limit=70.0, latest=140.0),
        replace(_native(190, 32), arguments=failed, tiny=_ONE_CHECK),
        _decode("decode", 60, 250, _DECODE, generators),
        replace(again, name="kernels", limit=30.0, latest=270.0, arguments={**again.arguments, "tuned": False}),
        _steps("steps", 75, 290, bert, _CAPTURED, _TINY_QWEN),
        _steps("small", 60, 320, small, ("ours_graph", "peft_compiled"), _TINY_SMALL),
        _steps("qwen3", 100, 340, qwen, ("ours_graph_compiled", "peft_compiled"), _TINY_LLAMA),
        _steps("dropout", 45, 360, dropped, ("ours_graph", "peft"), _TINY_DROPPED),
        # It fills the card.
        replace(_checks("offsets", 60, 385, "offsets-past-2^31*"), timed=True, when=GREEN),
        _steps("llama", 90, 395, llama, ("ours_graph_compiled", "peft"), _TINY_LLAMA),
        replace(tune, latest=400.0, tiny=_TINY_TUNE),
        # Compiled with nothing beside: only where there is time. A cell replaces the one with its id.
        _steps("llama-compiled", 150, 408, llama, ("ours_graph_compiled", "peft", "peft_compiled"), _TINY_LLAMA),
        _decode("prompted", 150, 410, prompted, generators),
    )  # fmt: skip
    return Plan(phases, 420, 200)
