"""The suite `tune`: launch configurations of every pass over the main shapes; the winners as data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.attention import cases
from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs, make_inputs
from benchmarks.attention.precompile import Compilers, small
from benchmarks.attention.verify import make_judge
from benchmarks.context import Context
from benchmarks.health import BrokenContext, entry_of
from benchmarks.measure import Effort, cell_stream, time_interleaved
from benchmarks.record import write_json
from ptv2_fast.kernels import launch

PASSES = ("forward", "backward_query", "backward_text", "backward_prompt")
# All gradients of short rows at once, which is judged and not tuned.
ROWS = "backward_rows"
# A new configuration has to win by more than two runs of the same one differ.
_MARGIN = 0.98
_EFFORT = Effort(milliseconds=15.0, least=7, most=40, warmup=2)
_TINY_EFFORT = Effort(milliseconds=1.0, least=1, most=1, warmup=0)
_SPARE_SECONDS = 15.0


# What is likely to win on sm_90 in 16 bits, by pass and padded head size, after the machine code, two sweeps and the
# counters of a card: warps that wait for nobody outside their group of four, and registers for one block more. A short
# run tries these alone.
_LIKELY = {
    ("forward", 64): (
        (128, 64, 8, 3, 128), (64, 64, 4, 3, 128), (64, 64, 4, 2, 128), (128, 64, 8, 2, 128), (128, 64, 8, 4, 128),
    ),
    ("forward", 128): (
        (128, 32, 8, 3, 128), (64, 32, 4, 3, 168), (64, 32, 4, 2, 128), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3),
    ),
    ("backward_query", 64): ((64, 64, 4, 3, 168), (64, 64, 4, 2, 168), (64, 32, 4, 3, 128), (64, 32, 4, 3)),
    ("backward_query", 128): ((64, 32, 4, 3), (64, 32, 4, 3, 168), (64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 2)),
    ("backward_text", 64): (
        (32, 64, 4, 2, 168), (32, 64, 4, 3, 168), (64, 64, 4, 2), (16, 64, 4, 3, 128), (32, 64, 4, 2, 128),
    ),
    ("backward_text", 128): ((32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (16, 64, 4, 3)),
    ("backward_prompt", 64): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2, 168), (32, 64, 4, 3, 168)),
    ("backward_prompt", 128): ((32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One pass of one case."""

    case: Case
    kernel_pass: str

    @property
    def id(self) -> str:
        """Its name in the result file."""
        return f"{self.kernel_pass}-{self.case.id}"


def search_space(
    kernel_pass: str, head_dim: int, tiny: bool = False, *, short: bool = False
) -> list[launch.LaunchConfig]:
    """The configurations tried for a pass; those that do not fit the card are refused by the launch.

    Args:
        short: only those that are likely to win.
    """
    if tiny:
        return [launch.LaunchConfig(16, 32, 4, 1)]
    likely = [launch.LaunchConfig(*config) for config in _LIKELY.get((kernel_pass, launch.config_row(head_dim)), ())]
    if short and likely:
        return likely
    tiles = {
        "forward": ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64)),
        "backward_query": ((128, 64), (128, 32), (64, 128), (64, 64)),
        "backward_text": ((64, 128), (32, 128), (128, 64), (64, 64)),
        "backward_prompt": ((64, 64), (64, 128), (128, 64), (32, 64)),
    }[kernel_pass]
    stages = (2, 3, 4) if head_dim <= 64 else (1, 2, 3)
    options = itertools.product(tiles, (4, 8), stages)
    grid = [launch.LaunchConfig(*tile, warps, depth) for tile, warps, depth in options]
    return list(dict.fromkeys([*likely, *grid]))


def run(context: Context) -> str:
    """Sweep until the jobs or the time run out; gives the state of the run."""
    shapes = cases.tune_cases(context.tiny)
    jobs = [Job(case, name) for name in PASSES for case in shapes]
    jobs = context.chosen(sorted(jobs, key=lambda job: shapes.index(job.case)))
    red, longest, device = False, 0.0, context.device.type
    with Compilers(context.device) as compilers:
        for job in jobs:
            if context.left < max(_SPARE_SECONDS, longest):
                return "red" if red else "out of time"
            start = time.monotonic()
            cell = _sweep(job, context, compilers)
            longest = max(longest, time.monotonic() - start)
            context.result.put(cell)
            context.say(_line(cell))
            # A configuration that computes something else is left out of the winners; the run is red.
            red |= cell["status"] == "wrong"
            context.result.data["winners"] = best = winners([c for c in context.result.cells if "peers" in c])
            write_json(context.out / f"launch_configs-{device}.json", best)
    return "red" if red else "complete"


def _sweep(job: Job, context: Context, compilers: Compilers) -> dict[str, object]:
    """Every configuration of one pass of one case; the results of each are judged before it is timed."""
    case, device = job.case, context.device
    arch = launch.architecture(device)
    present = launch.choose_config(arch, case.d, case.torch_dtype, job.kernel_pass)
    space = search_space(job.kernel_pass, case.d, context.tiny, short=context.small)
    configs = list(dict.fromkeys([present, *space]))
    compilers.warm(_compile, [(job, config) for config in configs], context.left - _SPARE_SECONDS)
    tried: dict[str, dict[str, object]] = {}
    with cell_stream(device):
        inputs = make_inputs(case, device)
        judge = make_judge(case, inputs)
        calls: dict[str, Callable[[], object]] = {}
        for config in configs:
            name = _name(config)
            try:
                call, results = bind(job, inputs, config)
                verdict = judge.verdict(results())
            except Exception as error:
                # A configuration that the card has no room for is refused; one that breaks it ends the run.
                try:
                    tried[name] = {**entry_of(error, device), "status": "refused", "config": astuple(config)}
                except BrokenContext as why:
                    reason = f"{name}: {why}"
                    context.result.put({"id": job.id, "case": case.as_dict(), "status": "failed", "reason": reason})
                    raise
                continue
            tried[name] = {"status": "wrong" if verdict.wrong else "passed", "config": astuple(config)}
            if verdict.wrong:
                tried[name]["reason"] = verdict.reason
            else:
                calls[name] = call
        timings = time_interleaved(calls, device, _TINY_EFFORT if context.tiny else _EFFORT)
    for name, timing in timings.items():
        tried[name] |= {"status": "timed", **timing.as_dict()}
    return {
        "id": job.id,
        "case": case.as_dict(),
        "pass": job.kernel_pass,
        "arch": arch,
        "status": "wrong" if any(entry["status"] == "wrong" for entry in tried.values()) else "passed",
        "present": _name(present),
        "clocks": environment.clocks(device),
        "peers": tried,
    }


def bind(job: Job, inputs: Inputs, config: launch.LaunchConfig, saved: tuple[Tensor, Tensor] | None = None):
    """(what to time, what gives the results to judge) of one pass with one configuration.

    The backward passes are timed with the small row-sum kernel that each of them needs first.

    Args:
        saved: output and log-sum-exp that a backward pass starts from; those of our forward pass when None.
    """
    from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
    from ptv2_fast.kernels.prompt_forward import prompt_attention_forward

    tensors = (inputs.q, inputs.k, inputs.v, inputs.prompt_k[None], inputs.prompt_v[None])
    options = {"key_mask": inputs.key_mask, "causal": job.case.causal}
    if job.kernel_pass == "forward":
        call = lambda: prompt_attention_forward(*tensors, config=config, **options)  # noqa: E731
        return call, lambda: {"out": call()[0]}
    out, lse = prompt_attention_forward(*tensors, **options) if saved is None else saved
    names, needs = {
        ROWS: (("q", "k", "v", "prompt_k", "prompt_v"), Needs(query=True, text=True, prompt=True)),
        "backward_query": (("q",), Needs(query=True)),
        "backward_text": (("k", "v"), Needs(text=True)),
        "backward_prompt": (("prompt_k", "prompt_v"), Needs(prompt=True)),
    }[job.kernel_pass]

    def backward():
        return prompt_attention_backward(
            inputs.grad_out, *tensors, out, lse, needs=needs, config=config, by_rows=job.kernel_pass == ROWS, **options
        )

    def results():
        grads = backward()
        found = {name: getattr(grads, name) for name in names}
        return {name: x[0] if name.startswith("prompt") else x for name, x in found.items()} | {"out": out}

    return backward, results


def _compile(job: Job, config: launch.LaunchConfig) -> None:
    """Launch one pass once, on a small batch; for a worker."""
    case = small(job.case)
    call, _ = bind(Job(case, job.kernel_pass), make_inputs(case, "cuda"), config)
    call()
    torch.cuda.synchronize()


def _name(config: launch.LaunchConfig) -> str:
    registers = "" if config.maxnreg is None else f"-r{config.maxnreg}"
    registers += "" if config.short_maxnreg is None else f"-short-r{config.short_maxnreg}"
    return f"{config.block_m}x{config.block_n}-w{config.num_warps}-s{config.num_stages}{registers}"


def winners(cells: list[dict]) -> dict[str, object]:
    """The best configuration of each (architecture, precision, pass, head size) over its shapes.

    A configuration's score is the geometric mean of its time over the present one's; it replaces the
    present one when that is below 0.98. The tables have the form of those in `kernels/launch.py`:
    [block_m, block_n, num_warps, num_stages, maxnreg or None, short_maxnreg or None].
    """
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        case = cell["case"]
        precision = "single" if case["dtype"] == "fp32" else "half"
        size = max(64, launch.padded_head_dim(case["d"]))
        groups.setdefault((str(cell["arch"]), precision, cell["pass"], str(size)), []).append(cell)
    tables: dict[str, dict] = {}
    for (arch, precision, kernel_pass, size), group in groups.items():
        best = _best(group)
        if best is not None:
            table = tables.setdefault(arch, {}).setdefault(precision, {}).setdefault(kernel_pass, {})
            table[size] = best
    return {"form": "[block_m, block_n, num_warps, num_stages, maxnreg, short_maxnreg]", "tables": tables}


def _best(group: list[dict]) -> dict[str, object] | None:
    """The winner of one group, its score and the present configuration; None where that was not timed."""
    present = group[0]["present"]
    if any(cell["peers"][present]["status"] != "timed" for cell in group):
        return None
    common = set.intersection(
        *({name for name, entry in cell["peers"].items() if entry["status"] == "timed"} for cell in group)
    )

    def score(name: str) -> float:
        ratios = [cell["peers"][name]["ms"] / cell["peers"][present]["ms"] for cell in group]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    name = min(sorted(common), key=score)
    chosen = name if score(name) < _MARGIN else present
    return {
        "config": list(group[0]["peers"][chosen]["config"]),
        "time_over_present": round(score(chosen), 4),
        "present": list(group[0]["peers"][present]["config"]),
        "shapes": [cell["case"]["name"] + f"-N{cell['case']['N']}" for cell in group],
    }


def _line(cell: dict[str, object]) -> str:
    timed = {name: e["ms"] for name, e in cell["peers"].items() if e["status"] == "timed"}
    best = min(timed, key=timed.get, default=None)
    if best is None:
        return f"{cell['id']}: nothing timed"
    present = timed.get(cell["present"])
    was = f"; {cell['present']} {present:.4g} ms" if present else ""
    return f"{cell['id']}: best {best} {timed[best]:.4g} ms{was} ({len(timed)} of {len(cell['peers'])} timed)"
