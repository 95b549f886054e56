"""What a layer costs the host does not grow: launches, operations and Python calls, which no clock has to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
STEPS = [f"step-{model}-{injection}" for model in ("bert", "llama") for injection in ("deep", "prefix")]
# Calls of Python functions in a layer beyond the bare model's, and in a step beside its layers. Other versions of
# Python and PyTorch enter a few more or fewer.
CPU = ["cpu-eval-bert-deep", "cpu-eval-llama-prefix", "cpu-step-bert-prefix", "cpu-step-llama-deep"]
MOST_CALLS = {"step": (80, 1040), "token": (20, 600)}


@pytest.fixture(scope="module")
def counts() -> dict:
    """What each case costs; kernels that are interpreted have no launch, so another process counts."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    program = REPOSITORY / "tests" / "support" / "host_counts.py"
    done = subprocess.run([sys.executable, program], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", STEPS)
def test_launches_of_a_step(counts, case):
    """Forward, dQ, dK and dV, the prompt's, their sum; a projection of keys and one of values, and back."""
    launches = counts[case]["ours"]["launches"]
    # Nothing in front of the first layer asks for a gradient: no queries, keys and values of it do, but delta is made.
    assert launches == {"layer": 5, "besides": 3 if case.endswith("deep") else -1}


def test_launches_of_a_token(counts):
    assert counts["token-llama-deep"]["ours"]["launches"] == {"layer": 2, "besides": 0}


@pytest.mark.parametrize("case", STEPS)
def test_operations_of_a_step(counts, case):
    ours, peft, bare = (counts[case][name]["operations"] for name in ("ours", "peft", "bare"))
    assert ours["layer"] < bare["layer"] < peft["layer"]
    assert ours["besides"] <= 160


def test_operations_of_a_token(counts):
    ours, bare = (counts["token-llama-deep"][name]["operations"] for name in ("ours", "bare"))
    assert ours["layer"] <= bare["layer"]
    assert ours["besides"] <= bare["besides"]


@pytest.mark.parametrize("case", ["tasks-bert-deep", "tasks-llama-prefix"])
def test_sixteen_tasks_cost_no_layer_more_than_one(counts, case):
    one, many = (counts[case][name] for name in ("ours", "ours_tasks16"))
    assert many["operations"]["layer"] <= one["operations"]["layer"]
    assert many["operations"]["besides"] <= one["operations"]["besides"] + 64
    assert many["launches"]["layer"] <= one["launches"]["layer"] + 1


@pytest.mark.parametrize("case", CPU)
def test_layers_on_a_cpu(counts, case):
    """What all layers have in common, none of them makes: a mask alone is twelve operations."""
    ours, bare = counts[case]["ours"], counts[case]["bare"]
    assert ours["operations"]["layer"] <= bare["operations"]["layer"] + 24
    assert ours["calls"]["layer"] <= bare["calls"]["layer"] + 45
    assert ours["operations"]["besides"] <= 130 and ours["calls"]["besides"] <= 1200


@pytest.mark.parametrize("case", [*STEPS, "token-llama-deep"])
def test_python_calls(counts, case):
    ours, bare = (counts[case][name]["calls"] for name in ("ours", "bare"))
    of_layer, besides = MOST_CALLS[case.split("-")[0]]
    assert ours["layer"] <= bare["layer"] + of_layer
    assert ours["besides"] <= besides
