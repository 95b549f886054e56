"""Launches that are repeated are those that Triton would make, and repeated calls make those of their functions; the
checks are `tests/support/repeated_launches.py` and `repeated_calls.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptv2_fast.kernels import launcher

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "support" / "repeated_launches.py"
SCRIPTS = (SCRIPT, SCRIPT.with_name("repeated_calls.py"))
CHECKS = [check for script in SCRIPTS for check in re.findall(r"^def check_(\w+)", script.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """What each check raised; only kernels that are not interpreted have a binder, so another process runs them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, SCRIPT], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_device(check, errors):
    assert errors[check] is None, errors[check]


def test_a_full_memory_is_emptied():
    memory: dict[int, int] = {}
    assert [launcher.remember(memory, key, key, 2) for key in range(3)] == [0, 1, 2]
    assert memory == {2: 2}
