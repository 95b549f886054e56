"""The goals of whole steps, memory and decoding, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.goals import BEST, Goal

Case = Mapping[str, object]
_ENCODERS = ("bert-base", "roberta-large")


def _cells(**wanted) -> Callable[[Case], bool]:
    """Cells in bf16 whose fields are as given; a callable judges its field. Dropout is 0 unless named."""
    wanted = {"dropout": 0.0, **wanted}

    def judged(case: Case) -> bool:
        if case["dtype"] != "bf16":
            return False
        return all(
            check(case.get(name, 0.0)) if callable(check) else case.get(name, 0.0) == check
            for name, check in wanted.items()
        )

    return judged


def _encoder(model: str) -> bool:
    return model in _ENCODERS


def _padded(padded: float, bare: float) -> Callable[[Case], float]:
    """One bound with 40 % padding, another without."""
    return lambda case: padded if case["padding"] else bare


def _large(large: float, others: float) -> Callable[[Case], float]:
    """One bound for the large encoder on short rows, another for the base or long rows."""
    return lambda case: large if case["model"] == "roberta-large" and case["N"] < 512 else others


def _big_batch(padding: float) -> Callable[[Case], bool]:
    judged = _cells(model=_encoder, padding=padding, P=lambda length: length <= 128)
    return lambda case: judged(case) and case["B"] * case["N"] >= 4096


def _whole_or_short_prompt(case: Case) -> bool:
    return _cells(model=_encoder, padding=0.4)(case) and case["P"] in (20, case["N"])


def _within(case: Case, short: float, long: float) -> float:
    return short if case["P"] <= 128 else long


def _joined_share(case: Case) -> float:
    return (1 - case["padding"]) * case["N"] / (case["N"] + case["P"])


def _bare_share(case: Case) -> float:
    return (0.65 if case["causal"] else 1.0) * (1 - case["padding"])


def _long(tokens: int) -> bool:
    return tokens >= 512


_LLAMA, _QWEN = (_cells(model=model, N=_long) for model in ("llama-3-8b", "qwen3-0.6b"))
_SMALL = _cells(model="bert-base", B=8, N=64)
_STEPS, _MEMORY, _DECODE = ({"suite": suite} for suite in ("steps", "memory", "decode"))
_D1 = _cells(model="qwen3-0.6b", P=512, B=64)
_D2 = _cells(model="llama-3-8b", P=2048, B=128)
_D3 = _cells(P=512, B=lambda rows: rows <= 64)

STEP_GOALS = (
    Goal(
        "S1", "encoder step, B·N ≥ 4096, 40 % padding, P ≤ 128, against compiled PEFT", _big_batch(0.4),
        BEST, "peft_compiled", _large(1.25, 1.55), _large(1.4, 1.8), asked="≥ 1.25× (large, N = 128), else ≥ 1.55×",
        **_STEPS,
    ),
    Goal(
        "S2", "the same without padding", _big_batch(0.0), BEST, "peft_compiled", lambda case: 1.0, 1.12,
        geomean_must=1.05, asked="≥ 1.00×, geomean ≥ 1.05×", **_STEPS,
    ),
    Goal(
        "S3", "encoder step, 40 % padding, against the literal form in SDPA, eager", _whole_or_short_prompt,
        BEST, "literal_sdpa", lambda case: 1.8 if case["P"] == 20 else 2.4,
        lambda case: 2.0 if case["P"] == 20 else 3.0, asked="≥ 1.80× (P = 20), ≥ 2.40× (P = N)", **_STEPS,
    ),
    Goal(
        "S4", "time over that of the compiled, padded, prompt-less model", _cells(), BEST, "floor_compiled",
        _padded(0.70, 1.06), _padded(0.60, 1.00), at_most=True, asked="≤ 0.70× (40 % padding), ≤ 1.06× (none)",
        **_STEPS,
    ),
    Goal(
        "S5", "cost of the prompts: ours over ours at P = 0", _cells(), "ours", "ours_p0",
        lambda case: _within(case, 1.10, 1.35), lambda case: _within(case, 1.05, 1.24), at_most=True,
        asked="≤ 1.10× (P ≤ 128), ≤ 1.35× (P = 512, N = 128)", **_STEPS,
    ),
    Goal(
        "S6a", "small batch, BERT-base B 8 N 64, against the literal form, eager", _SMALL, BEST, "literal_sdpa",
        lambda case: 2.0, 2.4, **_STEPS,
    ),
    Goal("S6b", "the same against PEFT, eager", _SMALL, BEST, "peft", lambda case: 2.4, 2.9, **_STEPS),
    Goal("S6c", "the same against compiled PEFT", _SMALL, BEST, "peft_compiled", lambda case: 1.25, 1.5, **_STEPS),
    Goal(
        "S7", "encoder with its own dropout 0.1, 40 % padding, against PEFT, eager",
        _cells(model=_encoder, padding=0.4, dropout=0.1), BEST, "peft", lambda case: 1.8, 2.5, **_STEPS,
    ),
    Goal(
        "S8a", "Llama-3-8B shape, N ≥ 512, against PEFT, eager", _LLAMA, BEST, "peft", _padded(1.85, 1.25),
        _padded(2.3, 1.36), asked="≥ 1.85× (40 % padding), ≥ 1.25× (none)", **_STEPS,
    ),
    Goal(
        "S8b", "the same against compiled PEFT", _LLAMA, BEST, "peft_compiled", _padded(1.45, 1.02),
        _padded(1.86, 1.09), asked="≥ 1.45× (40 % padding), ≥ 1.02× (none)", **_STEPS,
    ),
    Goal(
        "S9a", "Qwen3-0.6B shape, N ≥ 512, against PEFT, eager", _QWEN, BEST, "peft", _padded(3.3, 2.2),
        _padded(4.5, 2.7), asked="≥ 3.30× (40 % padding), ≥ 2.20× (none)", **_STEPS,
    ),
    Goal(
        "S9b", "the same against compiled PEFT", _QWEN, BEST, "peft_compiled", _padded(1.5, 1.15),
        _padded(2.5, 1.35), asked="≥ 1.50× (40 % padding), ≥ 1.15× (none)", **_STEPS,
    ),
    Goal(
        "T1 step", "a step on a batch of 16 tasks over one of one task", lambda case: case["peers"] == "tasks",
        "ours_tasks16", "ours", lambda case: 1.05, 1.02, at_most=True, **_STEPS,
    ),
    Goal(
        "M1a", "peak memory of a step at padding p over that of the literal form", _cells(), BEST, "literal_sdpa",
        _joined_share, _joined_share, at_most=True, quantity="peak_bytes", asked="≤ (1 − p) N / (N + P)", **_MEMORY,
    ),
    Goal(
        "M1b", "the same over that of the prompt-less model", _cells(), BEST, "floor", _bare_share, _bare_share,
        at_most=True, quantity="peak_bytes", asked="≤ 1 − p, decoders ≤ 0.65 (1 − p)", **_MEMORY,
    ),
    Goal(
        "D1", "decode, Qwen3-0.6B, P 512, B 64, against a compiled static cache", _D1, BEST, "static_compiled",
        lambda case: 1.8, 2.4, **_DECODE,
    ),
    Goal(
        "D2", "decode, Llama-3-8B, P 2048, B 128, against a compiled static cache", _D2, BEST, "static_compiled",
        lambda case: 2.0, 2.6, **_DECODE,
    ),
    Goal(
        "D3", "decode, P 512, B ≤ 64, against PEFT's generate", _D3, BEST, "peft",
        lambda case: 5.0 if case["model"] == "qwen3-0.6b" else 1.8,
        lambda case: 10.0 if case["model"] == "qwen3-0.6b" else 2.5, asked="≥ 5.00× (Qwen3), ≥ 1.80× (Llama)",
        **_DECODE,
    ),
)  # fmt: skip
