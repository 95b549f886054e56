"""The suite `decode`: generation behind a prompt, milliseconds of a step and tokens per second."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.attention.precompile import warm_all
from benchmarks.attention.roofline import Work
from benchmarks.context import Context
from benchmarks.decode.cases import DecodeCase, cpu_decode_cases, decode_cases, tiny_decode_cases
from benchmarks.decode.precompile import compile_decode
from benchmarks.decode.providers import DecodeKit, DecodeProvider, Generate, decode_providers
from benchmarks.goals import best_of_ours
from benchmarks.health import BrokenContext, entry_of
from benchmarks.measure import quantiles
from benchmarks.step.batches import Batch, Prompts, make_prompts
from benchmarks.step.bench import clean_up, whole_graph
from benchmarks.step.clock import free_memory, synchronize
from benchmarks.step.forms import prefix_form
from benchmarks.step.models import FIRST_WORD, build_base, sizes_of
from benchmarks.step.roofline import layer_weights

_RED = ("wrong", "failed")
_SPARE_SECONDS = 5.0
# A generation that takes longer than this once it is warm compiles anew at every call.
_TOO_LONG = 30.0
_FIRST_COMPILE = 60.0
# A short run has compiled ahead.
_SMALL_COMPILE = 8.0
# What a cell's timed generations may take, kept free when something is compiled for it.
_TIMED_SECONDS = 50.0
# Rows and tokens that are judged, and how far below the best logit a chosen token may lie, in standard deviations.
_JUDGED_ROWS, _JUDGED_TOKENS = 8, 8
_REGRET = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}
_ROUNDS, _SMALL_ROUNDS = 7, 3


def run(context: Context, providers: list[DecodeProvider] | None = None, *, warm: bool = True) -> str:
    """Measure until the cells or the time run out; gives the state of the run.

    In each cell what is not compiled is timed first and stands in the record; then one compiled provider after the
    other is set up, timed in the same rounds as ours, and written in.

    Raises:
        BrokenContext: the device is unusable; what was measured is in the record.
    """
    providers = decode_providers() if providers is None else providers
    providers = [p for p in providers if context.every_peer or not p.extra]
    context.result.data["calls"] = {provider.name: provider.call for provider in providers}
    cells = decode_cases() if context.device.type == "cuda" else cpu_decode_cases()
    red, base = False, None
    chosen = context.chosen(tiny_decode_cases() if context.tiny else cells)
    if warm:
        warm_all(context, compile_decode, chosen)
    for case in chosen:
        if context.left < (2 * _SPARE_SECONDS if not context.tiny else 0.0):
            return "red" if red else "out of time"
        if base is None or base[0] != (case.model, case.dtype):
            base = None
            free_memory(context.device)
            model = build_base(case.model, context.device, case.torch_dtype).eval()
            # A random model means nothing by its end token: every row gets all its tokens.
            model.generation_config.eos_token_id = None
            base = ((case.model, case.dtype), model)
        try:
            peers = measure_cell(case, base[1], context, providers)["peers"]
            red |= any(p.ours and peers.get(p.name, {}).get("status") in _RED for p in providers)
        except BrokenContext as error:
            _fail(case, context, {"status": "failed", "reason": str(error)})
            raise
        except Exception as error:
            _fail(case, context, entry_of(error, context.device))
        clean_up(context.device)
    return "red" if red else "complete"


def _fail(case: DecodeCase, context: Context, entry: dict[str, str]) -> None:
    """Record a cell that could not be measured, where none stands yet."""
    if not any(cell["id"] == case.id for cell in context.result.cells):
        cell = {"id": case.id, "case": case.as_dict(), **entry, "peers": {}}
        context.result.put(cell)
        context.say(_line_of(cell))


def measure_cell(
    case: DecodeCase, base: nn.Module, context: Context, providers: list[DecodeProvider]
) -> dict[str, object]:
    """Every provider judged, then those that are right timed in turns; the cell, which is in the record as it grows."""
    device = context.device
    kit = DecodeKit(base, make_prompts(base, case.P), case, tiny=context.tiny)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD, base.config.vocab_size, (case.B, case.N), generator=generator).to(device)
    work = decode_work(case, base)
    peers: dict[str, dict] = {}
    cell: dict[str, object] = {
        "id": case.id,
        "case": case.as_dict(),
        "flops": work.flops,
        "bytes": work.bytes,
        "speed_of_light_ms": None if context.ceiling is None else work.speed_of_light(context.ceiling),
        "clocks": environment.clocks(device),
        "date": environment.now(),
        "peers": peers,
    }
    ready: dict[str, Generate] = {}
    for provider in providers:
        if not provider.compiles:
            peers[provider.name] = _set_up(provider, kit, ids, context, ready)
    _time_into(cell, list(ready), ready, ids, context, work)
    context.result.put(cell)
    context.say(_line_of(cell))
    for provider in providers:
        if not provider.compiles:
            continue
        entry = peers[provider.name] = _set_up(provider, kit, ids, context, ready)
        if entry["status"] == "passed":
            # A short run times again what a peer is compared with, and that alone: eager generations take seconds.
            names = (best_of_ours(cell), "ours")
            if context.small:
                names = () if provider.ours else names[:1]
            beside = [name for name in names if name in ready and name != provider.name]
            _time_into(cell, [*dict.fromkeys(beside), provider.name], ready, ids, context, work, late=provider.name)
        if not provider.ours:
            ready.pop(provider.name, None)
            free_memory(device)
        context.result.put(cell)
        context.say(_line_of(cell))
    return cell


def _time_into(
    cell: dict,
    names: list[str],
    ready: dict[str, Generate],
    ids: Tensor,
    context: Context,
    work: Work,
    late: str | None = None,
) -> None:
    """Time some providers in turns and write their records; of a late one alone, with what ours took beside it."""
    case, peers = cell["case"], cell["peers"]
    seconds = min(_TIMED_SECONDS, context.left - _SPARE_SECONDS)
    rounds = _SMALL_ROUNDS if context.small or context.tiny else _ROUNDS
    samples, failed = time_generation(
        {name: ready[name] for name in names}, ids, case["new"], context.device, seconds=seconds, rounds=rounds
    )
    for name, record in failed.items():
        peers[name] |= record
        ready.pop(name, None)
    timed = {name: _timed(case, pairs) for name, pairs in samples.items()}
    for name, facts in timed.items():
        if late is None or name == late:
            peers[name] |= facts
            if context.ceiling is not None:
                peers[name]["of_roofline"] = work.speed_of_light(context.ceiling) / facts["ms"]
    if late in timed:
        peers[late]["beside"] = {name: facts["ms"] for name, facts in timed.items() if name != late}


def _set_up(
    provider: DecodeProvider, kit: DecodeKit, ids: Tensor, context: Context, ready: dict[str, Generate]
) -> dict[str, object]:
    """Build one provider, run it warm and judge it; it is ready where it is right."""
    reason = provider.refuses(context.device) or _too_large(provider, kit, context)
    if reason is not None:
        return {"status": "not applicable", "reason": reason}
    longest = _SMALL_COMPILE if context.small else _FIRST_COMPILE + _TIMED_SECONDS
    if context.left < (longest if provider.compiles and not context.tiny else 0.0) + _SPARE_SECONDS:
        return {"status": "out of time", "reason": "the run's minutes were over"}
    start = time.monotonic()
    try:
        torch._dynamo.utils.counters.clear()
        generate = provider.build(kit)
        for _ in range(2):
            begin = time.monotonic()
            generate(ids, 4)
            synchronize(ids.device)
        last = time.monotonic() - begin
        if last > _TOO_LONG:
            return {"status": "failed", "reason": f"a warm generation of 4 tokens took {last:.0f} s"}
        count = min(_JUDGED_TOKENS, kit.case.new)
        regret = regret_of(generate(ids, count), ids, kit.base, kit.prompts)
    except Exception as error:
        entry = entry_of(error, ids.device)
        del error
        free_memory(ids.device)
        return entry
    errors = {"regret": regret if math.isfinite(regret) else None}
    entry: dict[str, object] = {"errors": errors, "setup_seconds": round(time.monotonic() - start, 1)}
    if provider.compiles:
        entry["compiled"] = whole_graph(1)
    allowed = _REGRET[kit.case.dtype]
    if not regret <= allowed:
        reason = f"tokens lie {regret:.2g} standard deviations below the best logit, allowed {allowed:.2g}"
        return {**entry, "status": "wrong", "reason": reason}
    ready[provider.name] = generate
    return {**entry, "status": "passed"}


def _too_large(provider: DecodeProvider, kit: DecodeKit, context: Context) -> str | None:
    """Why a provider that writes the prompt in front of every row cannot fit on the device; None where it does."""
    case, sizes = kit.case, sizes_of(kit.base)
    element = kit.base.dtype.itemsize
    keys = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * case.B * (case.P + case.N + case.new)
    weights = element * (layer_weights(kit.base) * sizes.num_layers + kit.base.config.vocab_size * sizes.hidden_size)
    needed = weights + provider.copies * element * keys
    if needed < 0.95 * context.memory:
        return None
    return f"needs about {needed / 1e9:.0f} GB; the device has {context.memory / 1e9:.0f}"


@torch.no_grad()
def regret_of(tokens: Tensor, ids: Tensor, base: nn.Module, prompts: Prompts) -> float:
    """How far below the best logit the chosen tokens lie on average, in standard deviations of the logits.

    The logits are those of one pass over text and chosen tokens with the prefix joined inside attention, so that a
    choice between near-equal tokens is no error, and an error does not grow with the tokens after it.
    """
    tokens, ids = tokens[:_JUDGED_ROWS], ids[:_JUDGED_ROWS]
    whole = torch.cat([ids, tokens], dim=1)
    batch = Batch(whole, torch.ones_like(whole), whole, (whole.shape[1],) * len(whole))
    form = prefix_form(base, prompts)
    input_ids, positions, mask, _ = form.prepare(batch)
    logits = form.logits(input_ids, positions, mask, slice(ids.shape[1] - 1, -1)).float()  # (B, count, V)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).mean())


def time_generation(
    ready: Mapping[str, Generate], ids: Tensor, new: int, device: torch.device, *, seconds: float, rounds: int = _ROUNDS
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, dict[str, str]]]:
    """Seconds of generating one token and 1 + `new`, providers taking turns; and the record of one that has none."""
    samples: dict[str, list[tuple[float, float]]] = {}
    failed: dict[str, dict[str, str]] = {}
    ready = dict(ready)
    deadline = time.monotonic() + max(0.0, seconds)
    gc.collect()
    # The first turn is warm-up.
    for turn in range(rounds + 1):
        if turn > 2 and time.monotonic() > deadline:
            break
        for name, generate in list(ready.items()):
            try:
                pair = tuple(_seconds(generate, ids, count, device) for count in (1, 1 + new))
            except Exception as error:
                failed[name] = entry_of(error, device)
                del ready[name]
                samples.pop(name, None)
                continue
            if turn:
                samples.setdefault(name, []).append(pair)
    return samples, failed


def _seconds(generate: Generate, ids: Tensor, count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    generate(ids, count)
    synchronize(device)
    return time.perf_counter() - start


def _timed(case: Mapping, pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Median milliseconds of one step of all rows, from generations of two lengths taken one after the other."""
    steps = [1e3 * max(long - short, 1e-6) / case["new"] for short, long in pairs]
    ms, p20, p80 = quantiles(steps)
    whole = quantiles([long for _, long in pairs])[0]
    return {
        "status": "timed", "ms": ms, "p20": p20, "p80": p80, "samples": len(steps), "method": "perf_counter",
        "tokens_per_second": 1e3 * case["B"] / ms,
        "generate_tokens_per_second": case["B"] * (1 + case["new"]) / whole,
        "first_token_ms": 1e3 * quantiles([short for short, _ in pairs])[0],
    }  # fmt: skip


def decode_work(case: DecodeCase, base: nn.Module) -> Work:
    """Operations and bytes of one step of all rows, halfway through: the prompt read once, every row's text its own."""
    sizes = sizes_of(base)
    size = 2 if case.dtype in ("bf16", "fp16") else 4
    weights = layer_weights(base) * sizes.num_layers + base.config.vocab_size * sizes.hidden_size
    text = case.N + case.new / 2
    keys = 2 * sizes.num_kv_heads * sizes.head_dim * sizes.num_layers
    attention = 4.0 * case.B * (case.P + text) * sizes.num_heads * sizes.head_dim * sizes.num_layers
    return Work(2.0 * weights * case.B + attention, size * (weights + keys * (case.P + case.B * text)))


def _line_of(cell: dict) -> str:
    shown, bad = [], []
    for name, entry in cell["peers"].items():
        if entry["status"] == "timed":
            shown.append(f"{name} {entry['ms']:.4g} ({entry['tokens_per_second']:,.0f} tokens/s)")
        elif entry["status"] != "not applicable":
            bad.append(f"\n    {name} {entry['status']}: {entry.get('reason', '')}")
    return f"{cell['id']} (ms a step): {', '.join(shown) or cell.get('reason', 'nothing timed')}" + "".join(bad)
