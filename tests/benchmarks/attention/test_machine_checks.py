"""How the parity suite reads what other programs say, and what the tuner makes of times."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import health
from benchmarks.attention import audit, native_tests, parity_suite, tune_suite
from benchmarks.attention.cases import Case, case_of, tune_cases
from benchmarks.attention.parity_suite import NotApplicable
from ptv2_fast.kernels import launch

CPU = torch.device("cpu")
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 3 errors\n"


def test_a_clean_sanitizer_run_passes():
    assert audit.outcome_of_sanitizer(0, CLEAN, NotApplicable) == ("passed", "ERROR SUMMARY: 0 errors")


def test_a_finding_is_red():
    status, reason = audit.outcome_of_sanitizer(66, FOUND, NotApplicable)
    assert status == "wrong" and "3 errors" in reason


def test_a_program_that_dies_under_the_sanitizer_is_red():
    assert audit.outcome_of_sanitizer(1, "Traceback\nValueError: x", NotApplicable)[0] == "failed"


def test_a_device_that_the_sanitizer_does_not_know_is_no_failure():
    with pytest.raises(NotApplicable, match="does not support"):
        audit.outcome_of_sanitizer(66, "========= Error: Device not supported\n", NotApplicable)


@pytest.fixture
def red_tests(tmp_path):
    """A folder of tests, two of which fail."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text("def test_green():\n    pass\n\n\ndef test_red():\n    assert 1 + 1 == 3\n")
    (folder / "test_prompt_backward.py").write_text("def test_first():\n    raise ValueError('no gradient')\n")
    return folder


def test_red_tests_make_parity_red_and_are_told_as_they_fail(make_context, red_tests, capsys):
    context = make_context(tests=red_tests, only=("pytest",))
    written = []
    put = context.result.put
    context.result.put = lambda cell: (written.append(cell["reason"]), put(cell))
    assert parity_suite.run(context) == "red"
    (cell,) = context.result.cells
    assert (cell["status"], cell["reason"]) == ("failed", "1 passed, 2 failed, 0 skipped")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed test")]
    # The backward's tests come first, whatever the alphabet says.
    assert "test_prompt_backward.py::test_first: ValueError: no gradient" in said[0] and "test_red" in said[1]
    assert len(written) == 3 and "1 failed" in written[0] and "so far" in written[0]


def test_tests_that_take_too_long_are_stopped_and_what_they_found_counts(tmp_path):
    slow = "import time\n\n\ndef test_a():\n    pass\n\n\ndef test_b():\n    time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(slow)
    start = time.monotonic()
    outcome = native_tests.run_tests(tmp_path, CPU, tmp_path, 8.0, tell=pytest.fail, workers=1)
    assert outcome == ("out of time", "1 passed, 0 failed, 0 skipped; stopped after 8 s")
    assert time.monotonic() - start < 20


def test_a_check_that_raises_is_a_row_and_the_others_go_on(make_context, monkeypatch):
    def checks(context):
        return [("one", _raise), ("two", lambda context: ("passed", ""))]

    monkeypatch.setattr(parity_suite, "_checks", checks)
    context = make_context()
    assert parity_suite.run(context) == "red"
    assert [cell["status"] for cell in context.result.cells] == ["failed", "passed"]


def test_a_broken_device_is_recorded_and_nothing_follows(make_context, monkeypatch):
    monkeypatch.setattr(parity_suite, "_checks", lambda context: [("one", _raise), ("two", pytest.fail)])
    monkeypatch.setattr(health, "answers", lambda device: False)
    context = make_context()
    with pytest.raises(health.BrokenContext, match="an illegal memory access"):
        parity_suite.run(context)
    assert [(cell["id"], cell["status"]) for cell in context.result.cells] == [("one", "failed")]


def _raise(context):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_card_is_judged_in_every_dtype_before_its_tests_run(make_context):
    context = make_context()
    context.device, context.tiny = torch.device("cuda"), False
    names = [name for name, _ in parity_suite._checks(context)]
    for dtype in ("bf16", "fp16", "fp32"):
        assert any(name.startswith("judged-") and name.endswith(dtype) for name in names[:12])
    assert names.index("offsets-past-2^31") < names.index("pytest") < names.index("sanitizer-memcheck")


def test_the_trace_of_the_allocator_is_light(monkeypatch):
    asked = []
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(memory, "_record_memory_history", lambda *_, **options: asked.append(options))
    snapshot = {"device_traces": [[{"action": "alloc", "size": 512}, {"action": "free_completed", "size": 512}]]}
    monkeypatch.setattr(memory, "_snapshot", lambda: snapshot)
    assert audit.traced_sizes(lambda: None) == [512]
    # Stacks of the C++ side take longer than what is traced.
    assert asked[0]["stacks"] == "python"


def test_the_audit_knows_a_copy_from_what_training_needs():
    case = audit.audited_case()
    forbidden = audit.joint_sizes(case)
    text = case.B * case.H * case.N * case.d
    packed = case.tokens * case.H * case.d
    prompt = case.H * case.P * case.d
    needed = [2 * text, 2 * packed, 2 * prompt, 4 * text // case.d, 4 * packed // case.d, 4 * case.B + 4]
    # Partial sums over up to 64 splits, but for the splits that are multiples of B.
    needed += [4 * prompt * splits for splits in range(1, 65) if splits % case.B]
    assert not audit.rounded(needed) & forbidden
    literal = [2 * case.B * case.H * (case.P + case.N) * case.d, case.B * (case.P + case.N)]
    assert audit.rounded(literal) <= forbidden


@pytest.mark.parametrize("kernel_pass", tune_suite.PASSES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_search_space_is_modest_and_without_doubles(kernel_pass, head_dim):
    space = tune_suite.search_space(kernel_pass, head_dim)
    assert 12 <= len(space) == len(set(space)) <= 36
    likely = tune_suite.search_space(kernel_pass, head_dim, short=True)
    assert 3 <= len(likely) <= 6 and likely == space[: len(likely)]
    assert kernel_pass in launch.PASSES


def test_tuning_covers_both_head_sizes_and_both_sights():
    assert {(case.d, case.causal) for case in tune_cases()} == {(d, c) for d in (64, 128) for c in (False, True)}


def _tuned(case: Case, present: str, **milliseconds):
    peers = {
        name: {"status": "timed", "ms": ms, "config": [int(name[1:]), 64, 4, 2]} for name, ms in milliseconds.items()
    }
    return {"case": case.as_dict(), "pass": "forward", "arch": 90, "present": present, "peers": peers}


def _winner(cells):
    return tune_suite.winners(cells)["tables"]["90"]["half"]["forward"]["64"]


def test_the_winner_is_best_over_all_shapes():
    one, two = (case_of("roberta-large", 32, n, 128) for n in (512, 2048))
    cells = [_tuned(one, "c32", c32=1.0, c64=0.5, c128=0.8), _tuned(two, "c32", c32=1.0, c64=1.4, c128=0.8)]
    best = _winner(cells)
    assert best["config"][0] == 128 and best["present"][0] == 32
    assert best["time_over_present"] == pytest.approx(0.8)


def test_a_win_within_the_noise_changes_nothing():
    best = _winner([_tuned(case_of("roberta-large", 32, 512, 128), "c32", c32=1.0, c64=0.99)])
    assert best["config"] == best["present"]


def test_a_configuration_must_run_on_every_shape():
    one, two = (case_of("roberta-large", 32, n, 128) for n in (512, 2048))
    cells = [_tuned(one, "c32", c32=1.0, c64=0.1), _tuned(two, "c32", c32=1.0)]
    cells[1]["peers"]["c64"] = {"status": "refused", "config": [64, 64, 4, 2]}
    assert _winner(cells)["config"][0] == 32


def test_a_configuration_that_breaks_the_card_is_known_by_name(make_context, monkeypatch):
    def bind(job, inputs, config):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune_suite, "bind", bind)
    monkeypatch.setattr(health, "answers", lambda device: False)
    context = make_context()
    with pytest.raises(health.BrokenContext):
        tune_suite.run(context)
    (cell,) = context.result.cells
    assert cell["status"] == "failed" and cell["reason"].startswith("32x32-w4-s1: RuntimeError: CUDA error")
