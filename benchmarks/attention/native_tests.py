"""The kernels' own tests in a process of their own, each failure known when it happens.

As a pytest plugin (`-p benchmarks.attention.native_tests`) this file appends one JSON line for every finished test to
the file that PTV2_TEST_LINES names; `run_tests` starts pytest with it and follows the lines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]
_LINES = "PTV2_TEST_LINES"
# What is most likely to be wrong natively comes first.
_FIRST = ("test_prompt_backward.py", "test_prompt_forward.py", "test_bias_gradient.py", "test_prompt_decode.py")
_POLL_SECONDS = 0.2
_MOST_WORKERS = 8
# pytest's own status where nothing was collected.
_NO_TESTS = 5

Outcome = tuple[str, str]


def pytest_runtest_logreport(report) -> None:
    """Append the outcome of a finished test, and where it failed why; pytest calls this."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # The process that started the workers hears of every test.
        return
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line["reason"] = (crash.message if crash is not None else str(report.longrepr))[:500]
    with open(os.environ[_LINES], "a") as file:
        file.write(json.dumps(line) + "\n")


def run_tests(
    tests: Path,
    device: torch.device,
    out: Path,
    seconds: float,
    *,
    tell: Callable[[str, Outcome], None],
    workers: int | None = None,
    first: Sequence[str] = (),
) -> Outcome | None:
    """Run tests natively on CUDA, interpreted on the CPU; gives ("passed" | "failed" | "out of time", what was seen).

    Args:
        tests: a folder or a file.
        out: folder for pytest's own log.
        seconds: pytest is stopped after these; what it has found until then counts.
        tell: (name and reason of a failed test, the outcome so far), at once.
        first: names of tests that are run before the others.
        workers: processes; as many as the machine serves when None, where pytest-xdist is installed.

    Returns:
        None where there are no tests.
    """
    lines = out.resolve() / "pytest.lines"
    lines.write_text("")
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 2) // 2)) if workers is None else workers
    command = [sys.executable, "-m", "pytest", *first, *map(str, in_order(tests)), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.attention.native_tests"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    # A pytest that runs around this one has told its own children what they are.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ[_LINES] = str(lines)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environ.get("PYTHONPATH")]))
    if device.type == "cuda":
        environ.pop("TRITON_INTERPRET", None)
    else:
        environ["TRITON_INTERPRET"] = "1"
    deadline = time.monotonic() + seconds
    with open(out / "pytest.log", "w") as log, open(lines) as heard:
        process = subprocess.Popen(command, cwd=_ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        counts: Counter[str] = Counter()
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                _follow(heard, counts, tell)
        finally:
            cut = process.poll() is None
            if cut:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
            status = process.wait()
        _follow(heard, counts, tell)
    if status == _NO_TESTS and not counts:
        return None
    if cut:
        return ("failed" if counts["failed"] else "out of time"), f"{_words(counts)}; stopped after {seconds:.0f} s"
    if counts["failed"] or status:
        return "failed", _words(counts) if counts["failed"] else f"{_words(counts)}; pytest ended with status {status}"
    return "passed", _words(counts)


def _follow(heard, counts: Counter[str], tell: Callable[[str, Outcome], None]) -> None:
    """Read the lines that have come; tell of each failure."""
    for text in heard:
        line = json.loads(text)
        counts[line["outcome"]] += 1
        if line["outcome"] == "failed":
            tell(f"{line['test']}: {line['reason']}", ("failed", f"{_words(counts)} so far; last: {line['test']}"))


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def in_order(tests: Path) -> list[Path]:
    """The files of a folder of tests, the most telling ones first; a file is itself."""
    if not tests.is_dir():
        return [tests]
    files = sorted(tests.glob("test_*.py"))
    return sorted(files, key=lambda file: _FIRST.index(file.name) if file.name in _FIRST else len(_FIRST)) or [tests]
