"""Checks that only a CUDA machine can make: the allocator's trace, memory checkers, huge tensors.

python -m benchmarks.attention.audit     runs the small cases once: what the memory checkers look at
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.attention.cases import Case, case_of, gate_cases
from benchmarks.attention.inputs import make_inputs
from benchmarks.attention.verify import make_judge

_ROOT = Path(__file__).resolve().parents[2]
# The allocator hands out multiples of this.
_BLOCK = 512
# Exit status that the checkers are told to use for their own findings.
_FOUND = 66


def joint_sizes(case: Case) -> set[int]:
    """Bytes of every tensor that a copy over prompt and text, or of the prompt for each row, would take.

    [B, h, P + N, x] for h in {1, Hkv, H} and x in {1, d, N} in 1, 2, 4 or 8 bytes an element, and
    [B, h, P, d] in 2 or 4, as the allocator rounds them.
    """
    heads = {1, case.Hkv, case.H}
    joint = {case.B * h * (case.P + case.N) * width for h in heads for width in (1, case.d, case.N)}
    copies = {case.B * h * case.P * case.d for h in heads}
    sizes = [count * size for count in joint for size in (1, 2, 4, 8)]
    return rounded(sizes + [count * size for count in copies for size in (2, 4)])


def audited_case() -> Case:
    """Sizes at which nothing that training must allocate is as large as a copy over P + N.

    P + N = 1103 is prime, and so is B = 11: partial sums of the prompt's gradients, a few per card,
    are no multiple of it.
    """
    return case_of("roberta-large", 11, 1000, 103, padding=0.4)


def traced_sizes(step) -> list[int]:
    """Bytes of every block that the CUDA allocator gave out during a step."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
    try:
        step()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    events = [event for trace in snapshot["device_traces"] for event in trace]
    return [event["size"] for event in events if event["action"] == "alloc"]


def rounded(sizes: list[int]) -> set[int]:
    """Sizes as the allocator rounds them."""
    return {-(-size // _BLOCK) * _BLOCK for size in sizes}


def allocator_trace(context, not_applicable: type[Exception]) -> tuple[str, str]:
    """No block of the size of a copy over P + N in our forward and backward; the literal form has some."""
    if context.device.type != "cuda":
        raise not_applicable("traces the CUDA allocator; on the CPU every operation's output is looked at in the tests")
    from benchmarks.attention.provider import gradients
    from benchmarks.attention.providers import all_providers

    case = audited_case()
    forbidden = joint_sizes(case)
    inputs = make_inputs(case, context.device)
    hits: dict[str, set[int]] = {}
    for provider in all_providers():
        if provider.name not in ("ours", "ours_packed", "sdpa_user"):
            continue
        call = provider.build(case, inputs)
        sizes = traced_sizes(lambda call=call: gradients(call, call.forward()))
        if not sizes:
            return "failed", f"the trace of {provider.name} is empty: nothing was looked at"
        hits[provider.name] = rounded(sizes) & forbidden
    literal = hits.pop("sdpa_user")
    if not literal:
        return "failed", "the trace of the literal form shows no copy: this check sees nothing"
    ours = {name: sorted(found) for name, found in hits.items() if found}
    if ours:
        return "wrong", f"blocks of the size of a copy over P + N: {ours}"
    return "passed", f"none of ours; the literal form has blocks of {len(literal)} such sizes"


def judge_huge(case: Case, device: torch.device, *, packed: bool) -> tuple[str, str]:
    """Judge the first and the last row of a batch whose tensors pass 2^31 elements."""
    from benchmarks.attention.provider import gradients, poison
    from benchmarks.attention.providers import all_providers

    rows = (0, case.B - 1)
    if packed:
        # Rows of one length would do, but then nothing would be packed: leave a little padding.
        case = replace(case, padding=0.001)
        rows = (0, case.B // 2, case.B - 1)
    elements = case.tokens * case.H * case.d
    if elements <= 2**31:
        return "failed", f"only {elements} elements"
    inputs = make_inputs(case, device)
    silent = torch.ones(case.B, dtype=torch.bool, device=device)
    silent[list(rows)] = False
    # Only judged rows send gradients: the prompt's sums are then theirs alone.
    inputs.grad_out.masked_fill_(silent[:, None, None, None], 0.0)
    name = "ours_packed" if packed else "ours"
    call = next(p for p in all_providers() if p.name == name).build(case, inputs)
    if not packed:
        poison(inputs)
    out = call.forward()
    grads = gradients(call, out)
    verdict = make_judge(case, inputs, rows=rows).verdict(call.common(out.detach(), grads))
    if verdict.wrong:
        return "wrong", verdict.reason
    return "passed", f"{elements} elements; largest relative error {max(verdict.errors.values()):.1e}"


def sanitizer(context, tool: str, not_applicable: type[Exception], seconds: float) -> tuple[str, str]:
    """One tool of compute-sanitizer over the small cases, in a process of its own."""
    if context.device.type != "cuda":
        raise not_applicable("compute-sanitizer looks at CUDA kernels")
    path = shutil.which("compute-sanitizer")
    if path is None:
        raise not_applicable("compute-sanitizer is not on PATH")
    command = [path, "--tool", tool, f"--error-exitcode={_FOUND}", "--print-limit=20"]
    command += [sys.executable, "-m", "benchmarks.attention.audit"]
    # Every tensor its own allocation, so that a read past its end is seen.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environ.pop("TRITON_INTERPRET", None)
    try:
        done = subprocess.run(command, cwd=_ROOT, env=environ, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "out of time", f"{tool} was still running after {seconds:.0f} s"
    log = done.stdout + done.stderr
    (context.out / f"sanitizer-{tool}.log").write_text(log)
    return outcome_of_sanitizer(done.returncode, log, not_applicable)


def outcome_of_sanitizer(returncode: int, log: str, not_applicable: type[Exception]) -> tuple[str, str]:
    """What an exit status and a log of compute-sanitizer mean."""
    lines = [line for line in log.splitlines() if line.startswith("=========")]
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "")
    if "Device not supported" in log:
        raise not_applicable("compute-sanitizer does not support this machine's device")
    if returncode == _FOUND:
        first = next((line.strip("= ") for line in lines if line.strip("= ")[:1].isupper()), "")
        return "wrong", f"{summary}; {first}"
    if returncode != 0:
        return "failed", f"ended with status {returncode}: {log.strip().splitlines()[-1:]}"
    return "passed", summary


def main() -> int:
    """Forward and backward of the small cases, dense, packed and from a bank."""
    from benchmarks.attention.provider import gradients
    from benchmarks.attention.providers import all_providers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in gate_cases("fp16"):
        inputs = make_inputs(case, device)
        for provider in all_providers():
            if provider.triton and provider.refuses(case, device) is None:
                call = provider.build(case, inputs)
                gradients(call, call.forward())
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
