"""The suite `quality`: the comparison of `benchmarks.quality`, in its own process, beside this run's file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import environment
from benchmarks.context import Context

_ROOT = Path(__file__).resolve().parents[2]
_SPARE_SECONDS = 2.0


def run(context: Context) -> str:
    """Go on with the comparison until it is complete or the minutes are over; gives the state of the run.

    What it has finished is in its own file, quality_minilm_<device>.json under `--out`, and the next run resumes it.
    """
    if context.data is None:
        reason = "needs --data, a folder with sst2/ and wnut17/"
        context.result.put({"id": "quality", "status": "not applicable", "reason": reason})
        context.say(f"quality: {reason}")
        return "complete"
    target = context.out / f"quality_minilm_{context.device.type}.json"
    command = [sys.executable, "-m", "benchmarks.quality", "--data", str(context.data.resolve())]
    command += ["--out", str(target.resolve()), "--resume", *(["--fast"] if context.tiny else [])]
    command += ["--tasks", *context.only] if context.only else []
    try:
        done = subprocess.run(
            command, cwd=_ROOT, text=True, capture_output=True, timeout=max(1.0, context.left - _SPARE_SECONDS)
        )
    except subprocess.TimeoutExpired:
        context.result.put({"id": "quality", "status": "out of time", "reason": f"goes on from {target.name}"})
        return "out of time"
    status = "passed" if done.returncode == 0 else "failed"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    reason = target.name if done.returncode == 0 else (lines or ["no output"])[-1][:300]
    context.result.put({"id": "quality", "status": status, "reason": reason, "date": environment.now()})
    context.say("\n".join(lines))
    return "complete" if status == "passed" else "red"
