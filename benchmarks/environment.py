"""What a result was measured with: card, clocks, versions, commit. Reads only; no setting is touched."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "peft")
_ROOT = Path(__file__).resolve().parents[1]
_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def describe(device: torch.device) -> dict[str, object]:
    """Everything that identifies the machine and the code of a run."""
    facts: dict[str, object] = {
        "device": device.type,
        "card": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "commit": commit(),
        "date": now(),
        "clocks": clocks(device),
        **{name: version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "card": properties.name,
            "driver": _nvidia_smi("driver_version"),
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat()


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout, with "+changes" where files differ from it; None outside git."""
    if shutil.which("git") is None:
        return None
    head = _output(["git", "-C", str(_ROOT), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+changes" if head and changes else head


def clocks(device: torch.device) -> dict[str, float] | None:
    """Clocks in MHz, temperature in degrees Celsius and power in watts at this moment."""
    if device.type != "cuda":
        return None
    line = _nvidia_smi(_CLOCKS)
    if line is None:
        return None
    names = ("sm_mhz", "memory_mhz", "temperature", "watts")
    values = {}
    for name, text in zip(names, line.split(","), strict=False):
        try:
            values[name] = float(text)
        except ValueError:
            continue
    return values


def _nvidia_smi(fields: str) -> str | None:
    """One query about the current device, without units; None where nvidia-smi does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    index = str(torch.cuda.current_device())
    options = ["-i", index, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return _output(["nvidia-smi", *options])


def _output(command: list[str]) -> str | None:
    """What a command printed, None where it failed or took longer than 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
