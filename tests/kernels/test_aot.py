"""Ahead-of-time compilation: the rules for compiled kernels, the kept table, and a small live sample."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import aot, aot_compile, launch, tiles

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "aot_table.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MEASURED = [field.name for field in dataclasses.fields(aot.Report)][-8:]


@pytest.fixture(scope="module")
def table() -> list[aot.Report]:
    """The kept reports."""
    return aot.read_table(TABLE)[1]


def test_kept_table_breaks_no_rule(table):
    assert [text for report in table for text in aot.problems(report)] == []


def test_kept_table_is_about_the_kernels_as_they_are(table):
    def key(report):
        case = (report.arch, report.dtype, report.head_dim, report.features)
        return (*case, report.kernel, report.tile, report.num_warps, report.num_stages, report.source)

    nothing = dict.fromkeys(MEASURED, 0)
    expected = [key(row.report(nothing)) for row in aot.rows_of(aot.all_cases())]
    assert [key(report) for report in table] == expected, (
        "run python -m ptv2_fast.kernels.aot --out kernels/aot_table.json"
    )


def test_table_holds_every_row_of_configurations_in_every_dtype_on_every_card(table):
    classes = {launch.config_row(head_dim) for head_dim in launch.HEAD_DIMS}
    assert classes == set(aot.HEAD_DIMS)
    held = {(r.kernel, r.arch, r.dtype, r.head_dim, r.features) for r in table}
    # The kernel of short rows is chosen on Hopper in 16 bits alone, and float8 is of newer cards: among the cells.
    kernels = {r.kernel for r in table} - {"prompt_attention_backward_rows", "quantize_rows", "transpose_bytes"}
    assert len(kernels) == 10
    # Rows are sorted where there is a bank.
    kernels -= {"rows_by_entry"}
    assert "rows_by_entry" in {r.kernel for r in table if r.features == "everything"}
    wanted = itertools.product(kernels, (80, 90, 100), ("bf16", "fp16", "fp32"), classes, ("plain", "everything"))
    assert set(wanted) <= held
    padded = {r.head_dim for r in table if r.arch == 90} - classes
    assert {launch.config_row(head_dim) for head_dim in padded} == classes
    assert {r.head_dim for r in table if r.arch == launch.GFX942} == {64, 128}


def test_readme_shows_the_kept_table(table):
    _, _, shown = (ROOT / "kernels" / "README.md").read_text().partition(aot.DIGEST_MARK)
    assert shown.strip() == aot.digest(table)


def test_hopper_uses_its_own_tensor_core_instruction(table):
    forward = [r for r in table if r.kernel == "prompt_attention_forward" and r.arch == 90 and r.dtype != "fp32"]
    assert forward and all(r.wgmma_instructions > 0 for r in forward)


@pytest.mark.parametrize("kernel", ["prompt_attention_forward", "prompt_attention_decode", "layered_matmul"])
def test_operands_are_copied_ahead_of_the_product(table, kernel):
    pipelined = [r for r in table if r.kernel == kernel and r.arch != launch.GFX942 and r.num_stages > 1]
    assert {r.arch for r in pipelined} == set(aot.ARCHITECTURES)
    assert all(r.async_copies > 0 for r in pipelined)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binary_bytes": 0}, "no binary"),
        ({"spill_bytes": 8, "spills_in_loops": aot.MOST_SPILLS_IN_LOOPS + 1}, "in a loop, 8 bytes"),
        ({"shared_bytes": launch.shared_memory_limit(90) + 1}, "shared memory"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
    ],
)
def test_rules_can_be_broken(table, change, message):
    good = next(r for r in table if r.kernel == "prompt_attention_forward" and r.arch == 90 and r.dtype == "bf16")
    assert aot.problems(good) == []
    assert [message in text for text in aot.problems(dataclasses.replace(good, **change))] == [True]


@triton.jit
def _doubled(x, FACTOR: tl.constexpr):
    return x * FACTOR


FACTOR_OF_THE_KERNEL = tl.constexpr(2)


@triton.jit
def _kernel(x_ptr, size):
    """Doubles."""
    # With a comment.
    tl.store(x_ptr + size, _doubled(tl.load(x_ptr + size), FACTOR_OF_THE_KERNEL))


@triton.jit
def _same_kernel(x_ptr, size):
    tl.store(x_ptr + size, _doubled(tl.load(x_ptr + size), FACTOR_OF_THE_KERNEL))


@pytest.fixture
def fingerprint(monkeypatch):
    """The fingerprint of a launch of `_kernel`, its sources read afresh."""

    def take(kernel=_kernel, **arguments):
        aot_compile._source.cache_clear()
        recorded = launch.Launch(kernel, {"x_ptr": torch.zeros(1), "size": 48, "num_warps": 4} | arguments)
        return aot_compile.fingerprint(recorded)

    return take


@pytest.mark.parametrize(
    "arguments",
    [{"x_ptr": torch.zeros(1, dtype=torch.float16)}, {"size": 1}, {"size": 40}, {"size": 2**40}, {"num_warps": 8}],
    ids=["dtype", "one", "odd", "long", "option"],
)
def test_fingerprint_follows_the_arguments(fingerprint, arguments):
    assert fingerprint(**arguments) != fingerprint()


def test_fingerprint_does_not_follow_what_is_not_compiled(fingerprint):
    assert fingerprint(size=96, x_ptr=torch.zeros(5)) == fingerprint()


def test_fingerprint_follows_helpers_and_constants(fingerprint, monkeypatch):
    before = fingerprint()
    monkeypatch.setitem(globals(), "FACTOR_OF_THE_KERNEL", tl.constexpr(3))
    constant = fingerprint()
    monkeypatch.setitem(globals(), "_doubled", tiles.tanh)
    assert len({before, constant, fingerprint()}) == 3


def test_fingerprint_is_blind_to_comments_and_line_breaks():
    def tokens(kernel):
        aot_compile._source.cache_clear()
        return aot_compile._source(kernel).replace(kernel.__name__, "kernel")

    assert tokens(_kernel) == tokens(_same_kernel)


def test_what_is_known_is_not_compiled_again(monkeypatch):
    rows = aot.rows_of([aot.Case(90, "bf16", 64, "plain")])
    known = {row.code: dict.fromkeys(MEASURED, 1) for row in rows[1:]}
    assert rows[0].code not in known
    monkeypatch.setattr(aot, "compile_row", _pretend)
    assert list(aot.compile_missing([*rows, rows[0]], known, jobs=1)) == rows[:1]
    assert known[rows[0].code] == dict.fromkeys(MEASURED, 2)
    assert list(aot.compile_missing(rows, known, jobs=1)) == []


def _pretend(row):
    return dict.fromkeys(MEASURED, 2)


_SIGNATURE = """
from ptv2_fast.kernels import aot, aot_compile

recorded = aot.record_case(aot.Case(90, "bf16", 64, "plain"))[0]
types, constants, attributes = aot_compile.signature(recorded.kernel, recorded.arguments)
names = list(types)
inputs, strides, switches = (names.index(name) for name in ("inputs", "strides", "switches"))
fields = types["inputs"]._fields
assert types["inputs"].q == "*bf16" and attributes[(inputs, fields.index("q"))]
assert types["inputs"].key_mask == "constexpr" and constants[(inputs, fields.index("key_mask"))] is None
assert types["switches"] == "constexpr" and constants[(switches,)].HEAD_DIM == 64
# The innermost stride is the constant 1; sizes are not specialised.
assert types["strides"].q[3] == "constexpr" and constants[(strides, 0, 3)] == 1
assert types["num_queries"] == "i32" and (names.index("num_queries"),) not in attributes
print(aot.rows_of(aot.all_cases()[:1]))
"""


def test_signature_is_specialised_as_a_launch_is_and_fingerprints_need_no_interpreter():
    # Interpreted kernels have no signature: this runs in a process without the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _SIGNATURE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(aot.rows_of(aot.all_cases()[:1]))


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton comes without cuobjdump, which counts registers")
@pytest.mark.timeout(300)
def test_compiles_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kernels = ["prompt_attention_forward", "prompt_attention_backward_prompt"]
    command = [
        sys.executable,
        "-m",
        "ptv2_fast.kernels.aot",
        "--arch",
        "90",
        "--dtype",
        "bf16",
        "--head-dim",
        "64",
        "--features",
        "plain",
        "--kernel",
        *kernels,
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "table.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    version, reports = aot.read_table(tmp_path / "table.json")
    assert version == triton.__version__
    # Cases that share a code share what became of it.
    assert {report.kernel for report in reports} == set(kernels)
    assert all(report.binary_bytes for report in reports)
    assert reports[0].wgmma_instructions > 0


def test_refuses_to_compile_interpreted_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ptv2_fast.kernels.aot"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_every_dtype_has_a_pointer_type():
    assert all(dtype in aot_compile.POINTERS for dtype in (*launch.DTYPES, torch.int64, torch.int32, torch.uint8))
