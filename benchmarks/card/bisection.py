"""A kernel is wrong: which pass of it, in which dtype, on what kind of batch, and whether another launch heals it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.attention import cases
from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs, make_inputs
from benchmarks.attention.parity_suite import GATE_DTYPES
from benchmarks.attention.tune_suite import PASSES, ROWS, Job, bind
from benchmarks.attention.verify import make_judge
from benchmarks.context import Context
from benchmarks.health import BrokenContext, entry_of
from benchmarks.measure import cell_stream
from ptv2_fast.kernels import launch, row_backward
from ptv2_fast.kernels.gradients import Needs
from ptv2_fast.kernels.problem import Problem
from ptv2_fast.reference.attention import prompt_attention as literal

_SPARE_SECONDS = 3.0
_RED = ("wrong", "failed")
_JUDGED = (*PASSES, ROWS)
# Cells are named by pass, dtype, kind of batch and launch.
_PREFIX = "bisect"


def run(context: Context) -> str:
    """Judge every pass alone; where one is wrong, also with other launches. The last cell says it in words.

    Raises:
        BrokenContext: the device is unusable; the launch that did it is recorded as failed.
    """
    rows: list[dict[str, object]] = []
    for case in _cases(context):
        for kernel_pass in _JUDGED:
            if kernel_pass == "backward_prompt" and not case.P or kernel_pass == ROWS and not _by_rows(case, context):
                continue
            for label, config in launches(case, kernel_pass, context):
                if context.left < _SPARE_SECONDS:
                    return _conclude(context, rows, "out of time")
                row = _judge(case, kernel_pass, label, config, context)
                rows.append(row)
                if label == "present" and row["status"] not in _RED:
                    break
    return _conclude(context, rows, "complete")


def _cases(context: Context) -> list[Case]:
    """Small shapes: plain, padded, causal with grouped heads, both; the dtypes of a shape side by side."""
    if context.device.type == "cpu":
        return [replace(case, direction="training") for case in cases.tiny_cases()]
    by_dtype = [cases.gate_cases(dtype) for dtype in GATE_DTYPES]
    return [case for same_shape in zip(*by_dtype, strict=False) for case in same_shape]


def launches(case: Case, kernel_pass: str, context: Context) -> list[tuple[str, launch.LaunchConfig]]:
    """The present launch, then without pipelining, with four warps, and with both."""
    arch = launch.architecture(context.device)
    pass_of_table = row_backward.pass_for(case.N) if kernel_pass == ROWS else kernel_pass
    present = launch.choose_config(arch, case.d, case.torch_dtype, pass_of_table)
    plain, few = replace(present, num_stages=1), replace(present, num_warps=4)
    tried = {"present": present, "one stage": plain, "4 warps": few, "one stage, 4 warps": replace(plain, num_warps=4)}
    return list(tried.items())


def _by_rows(case: Case, context: Context) -> bool:
    """Whether one kernel can compute all gradients of the case."""
    inputs = make_inputs(case, context.device)
    form = Problem.of(inputs.q, inputs.k, inputs.v, inputs.prompt_k[None], inputs.prompt_v[None]).form
    return row_backward.refusal(form, Needs(query=True, text=True, prompt=True)) is None


def _judge(case: Case, kernel_pass: str, label: str, config, context: Context) -> dict[str, object]:
    name = f"{_PREFIX}-{kernel_pass}-{case.id}-{label.replace(', ', '-').replace(' ', '-')}"
    row: dict[str, object] = {
        "id": name, "case": case.as_dict(), "pass": kernel_pass, "launch": label, "date": environment.now(),
    }  # fmt: skip
    try:
        with cell_stream(context.device):
            inputs = make_inputs(case, context.device)
            # Each pass alone: a backward pass starts from the right output, whatever our forward pass gives.
            _, results = bind(Job(case, kernel_pass), inputs, config, saved=_right_output(case, inputs))
            verdict = make_judge(case, inputs).verdict(results())
        row |= {"status": "wrong" if verdict.wrong else "passed", "reason": verdict.reason}
    except Exception as error:
        try:
            row |= entry_of(error, context.device)
        except BrokenContext as why:
            context.result.put({**row, "status": "failed", "reason": str(why)})
            raise
    context.result.put(row)
    context.say(f"{name}: {row['status']} {row['reason']}")
    return row


def _right_output(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output, laid out as our forward pass lays it out, and log-sum-exp of the literal form in float64."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.prompt_k[None], inputs.prompt_v[None])
    with torch.no_grad():
        out, lse = literal(
            *(x.double() for x in tensors), key_mask=inputs.key_mask, causal=case.causal, scale=case.d**-0.5,
            return_lse=True,
        )  # fmt: skip
    laid_out = out.to(case.torch_dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return laid_out, lse.float().contiguous()


def _conclude(context: Context, rows: list[dict[str, object]], state: str) -> str:
    words = verdict_of(rows)
    red = any(row["status"] in _RED for row in rows)
    cell = {"id": "bisection", "status": "wrong" if red else "passed", "reason": words, "date": environment.now()}
    context.result.put(cell)
    context.say(f"bisection: {words}")
    return "red" if red else state


def verdict_of(rows: Iterable[Mapping]) -> str:
    """Rows in words: for each pass where it is wrong, where it is right, and which launches heal it everywhere."""
    found = []
    rows = list(rows)
    for kernel_pass in _JUDGED:
        present = [row for row in rows if row["pass"] == kernel_pass and row["launch"] == "present"]
        wrong = [row for row in present if row["status"] in _RED]
        if not wrong:
            continue
        right = [row for row in present if row["status"] not in _RED]
        words = f"{kernel_pass} is wrong {_where(wrong)}"
        words += f" and right {_where(right)}" if right else " everywhere"
        others = [row for row in rows if row["pass"] == kernel_pass and row["launch"] != "present"]
        heals = [
            label for label in dict.fromkeys(row["launch"] for row in others)
            if all(row["status"] not in _RED for row in others if row["launch"] == label)
        ]  # fmt: skip
        found.append(f"{words}; {'right with ' + ' or with '.join(heals) if heals else 'no other launch heals it'}")
    return ". ".join(found) or "every pass alone is right: look at how they are put together (packed, bank, autograd)"


def _where(rows: list[Mapping]) -> str:
    kinds = (f"{row['case']['dtype']} d {row['case']['d']} {_kind(row['case'])}" for row in rows)
    return "in " + ", ".join(dict.fromkeys(kinds))


def _kind(case: Mapping) -> str:
    traits = [name for name, has in (("causal", case["causal"]), ("padded", case["padding"])) if has]
    return " ".join([*traits, f"P {case['P']}"])
