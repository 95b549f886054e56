"""How the parity suite reads what other programs say, and what the tuner makes of times."""

from __future__ import annotations

import pytest

from benchmarks import audit, parity_suite, tune_suite
from benchmarks.cases import Case, case_of, tune_cases
from benchmarks.parity_suite import NotApplicable
from ptv2_fast.kernels import launch

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


def _junit(tmp_path, failures):
    path = tmp_path / "pytest.xml"
    bad = '<testcase name="test_b"><failure message="x"/></testcase>' if failures else ""
    path.write_text(
        f'<testsuites><testsuite tests="2" failures="{failures}" errors="0" skipped="1">'
        f'<testcase name="test_a"/>{bad}</testsuite></testsuites>'
    )
    return path


def test_junit_counts(tmp_path):
    counts = "2 tests, 0 failures, 0 errors, 1 skipped"
    assert parity_suite.outcome_of_junit(_junit(tmp_path, 0), 0) == ("passed", counts)
    status, reason = parity_suite.outcome_of_junit(_junit(tmp_path, 1), 1)
    assert status == "failed" and reason.endswith("first: test_b")
    assert parity_suite.outcome_of_junit(_junit(tmp_path, 0), 3)[0] == "failed"
    assert parity_suite.outcome_of_junit(tmp_path / "none.xml", 4)[0] == "failed"


def test_red_tests_make_parity_red(make_context, tmp_path):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert 1 + 1 == 3\n")
    context = make_context(tests=tmp_path / "test_red.py", only=("pytest",))
    assert parity_suite.run(context) == "red"
    assert "test_red" in context.result.cells[0]["reason"]


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
    assert 12 <= len(space) == len(set(space)) <= 30
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
