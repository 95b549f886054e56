"""The suite `host`: what eager steps, generated tokens and launches cost the processor, without any device.

A process of its own measures: its driver launches nothing, and kernels are not interpreted there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

from benchmarks import environment
from benchmarks.context import Context
from benchmarks.host.cases import HostCase, host_cases

_CALLS = {
    "ours": "get_ptv2_model(base, PTuningV2Config(backend='triton'), step_options=what CUDA has by default); forward, "
    "loss, backward; in a launch what eager attention launches; of a token generate(); of cpu-eval and cpu-step "
    "backend='torch' and StepOptions(), of cpu-eval a forward in eval mode without gradients",
    "ours_tasks16": "the same with 16 adapters and adapter_names= naming another one in each row",
    "peft": "get_peft_model(base, PrefixTuningConfig()), attn_implementation='sdpa'",
    "bare": "base(inputs_embeds=embeddings.detach().requires_grad_(), attention_mask=, labels=), sdpa, nothing "
    "trained; of cpu-eval base(input_ids=, attention_mask=) in eval mode without gradients",
    "plain": "kernel[(1,)](x, y, 64): a kernel of three arguments",
    "ours_unrepeated": "prompt_attention_forward(...) or _backward(...), which `ours` calls the first time",
}


def run(context: Context) -> str:
    """Measure until the cells or the time run out; gives the state of the run."""
    context.result.data["calls"] = _CALLS
    chosen = {case.id: case for case in context.chosen(host_cases(context.tiny))}
    if not chosen:
        return "complete"
    words = [*(["--tiny"] if context.tiny else []), *chosen]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.host.process", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    over = threading.Event()

    def stop() -> None:
        over.set()
        process.kill()

    timer = threading.Timer(max(0.0, context.left), stop)
    timer.start()
    errors: list[str] = []
    # Whoever fills a pipe that nobody reads waits for ever.
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    for line in process.stdout:
        if line.startswith("{"):
            found = json.loads(line)
            _put(context, chosen.pop(found["id"]), found["peers"])
    process.wait()
    reader.join()
    timer.cancel()
    if chosen and not over.is_set():
        case = next(iter(chosen.values()))
        reason = (errors[0].strip().splitlines() or ["it ended early"])[-1]
        cell = {"id": case.id, "case": case.as_dict(), "status": "failed", "reason": reason, "peers": {}}
        context.result.put(cell)
        context.say(f"{case.id}: {reason}")
        return "red"
    return "out of time" if chosen else "complete"


def _environment() -> dict[str, str]:
    """One thread, and kernels that have a launch."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}


def _put(context: Context, case: HostCase, peers: dict[str, dict]) -> None:
    cell = {"id": case.id, "case": case.as_dict(), "date": environment.now(), "peers": peers}
    context.result.put(cell)
    shown = (f"{name} {entry['ms']:.4g} ms, {entry['operations']:.0f} operations" for name, entry in peers.items())
    context.say(f"{case.id}: {'; '.join(shown)}")
