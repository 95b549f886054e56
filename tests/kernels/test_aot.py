"""Ahead-of-time compilation: the rules for compiled kernels, the kept table, and a small live sample."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptv2_fast.kernels import aot, launch

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "aot_table.json"


@pytest.fixture(scope="module")
def table() -> list[aot.Report]:
    """The kept reports."""
    return [aot.Report(**report) for report in json.loads(TABLE.read_text())["reports"]]


def test_kept_table_breaks_no_rule(table):
    assert [text for report in table for text in aot.problems(report)] == []


def test_kept_table_is_about_the_kernels_as_they_are(table):
    def key(case, kernel, tile, warps, stages):
        return (*dataclasses.astuple(case), kernel, tile, warps, stages)

    kept = {
        key(aot.Case(r.arch, r.dtype, r.head_dim, r.features), r.kernel, r.tile, r.num_warps,
            r.num_stages) for r in table}
    expected = {
        key(case, aot.kernel_name(recorded), aot.tile_of(recorded),
            recorded.arguments.get("num_warps", 4), recorded.arguments.get("num_stages", 3))
        for case in aot.all_cases() for recorded in aot.record_case(case)}
    assert kept == expected, "run python -m ptv2_fast.kernels.aot --out kernels/aot_table.json"


def test_readme_shows_the_kept_table(table):
    _, _, shown = (ROOT / "kernels" / "README.md").read_text().partition(aot.DIGEST_MARK)
    assert shown.strip() == aot.digest(table)


def test_hopper_uses_its_own_tensor_core_instruction(table):
    forward = [r for r in table if r.kernel == "prompt_attention_forward" and r.arch == 90 and r.dtype != "fp32"]
    assert forward and all(r.wgmma_instructions > 0 for r in forward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cubin_bytes": 0}, "no cubin"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": launch.shared_memory_limit(90) + 1}, "shared memory"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
    ],
)
def test_rules_can_be_broken(table, change, message):
    good = next(r for r in table if r.kernel == "prompt_attention_forward" and r.arch == 90 and r.dtype == "bf16")
    assert aot.problems(good) == []
    assert [message in text for text in aot.problems(dataclasses.replace(good, **change))] == [True]


_SIGNATURE = """
from ptv2_fast.kernels import aot

recorded = aot.record_case(aot.Case(90, "bf16", 64, "plain"))[0]
types, constants, attributes = aot.signature(recorded.kernel, recorded.arguments)
names = list(types)
assert types["q_ptr"] == "*bf16"
assert types["key_mask_ptr"] == "constexpr" and constants[(names.index("key_mask_ptr"),)] is None
# The innermost stride is the constant 1; sizes are not specialised.
assert types["q_strides"][3] == "constexpr" and constants[(names.index("q_strides"), 3)] == 1
assert types["num_queries"] == "i32" and (names.index("num_queries"),) not in attributes
"""


def test_signature_is_specialised_as_a_launch_is():
    # Interpreted kernels have no signature: this runs in a process without the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _SIGNATURE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_compiles_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable, "-m", "ptv2_fast.kernels.aot", "--arch", "90", "--dtype", "bf16",
        "--head-dim", "64", "--features", "plain", "--kernel", "prompt_attention_forward",
        "prompt_attention_backward_prompt", "--jobs", "1", "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "table.json").read_text())["reports"]
    assert [report["kernel"] for report in reports] == ["prompt_attention_forward",
                                                        "prompt_attention_backward_prompt"]
    assert all(report["cubin_bytes"] for report in reports)
    assert reports[0]["wgmma_instructions"] > 0


def test_refuses_to_compile_interpreted_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ptv2_fast.kernels.aot"], cwd=ROOT, env=environment,
        capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_every_dtype_has_a_pointer_type():
    assert all(dtype in aot._POINTERS for dtype in (*launch.DTYPES, torch.int64, torch.int32,
                                                    torch.uint8))
