"""Bytes are counted as they come and go, the audits see what they must, and the suite runs on tiny models."""

from __future__ import annotations

import torch

from benchmarks import record
from benchmarks.report import table
from benchmarks.step import memory_suite
from benchmarks.step import report as step_report
from benchmarks.step.audit import JoinedShapes, forbidden_blocks
from benchmarks.step.cases import StepCase, audited_case
from benchmarks.step.live_bytes import LiveBytes, measure_memory
from benchmarks.step.models import build_base
from benchmarks.step.providers import step_providers

CPU = torch.device("cpu")
NAMES = ("ours", "ours_0_plain", "ours_1_unpad", "literal_sdpa", "peft", "floor")
PROVIDERS = [provider for provider in step_providers() if provider.name in NAMES]


def test_bytes_live_as_long_as_their_tensor():
    given = torch.ones(1000)
    with LiveBytes() as memory:
        one = given + 1
        assert memory.live == 4000
        view, two = one.view(10, 100), one * 2
        assert memory.live == 8000
        del two
        assert memory.live == 4000
        one.mul_(2)
        assert memory.live == 4000 and memory.peak == 8000
        del one
        assert memory.live == 4000, "a view keeps its memory"
        del view
        assert memory.live == 0
    assert memory.peak == 8000


def test_what_autograd_saves_is_kept_until_backward():
    x = torch.ones(1000, requires_grad=True)
    found = measure_memory(lambda: x.exp().sum(), lambda loss: loss.backward(), CPU)
    # exp keeps its result; its gradient comes in backward.
    assert 4000 <= found["kept_bytes"] < 4100 < 8000 <= found["peak_bytes"] < 13000


def _hits(make):
    with JoinedShapes(StepCase("tiny-bert", 3, 13, 10)) as shapes:
        make()
    return [shape for _, shape in shapes.hits]


def test_joined_rows_and_copied_prompts_are_noticed():
    prompt, text = torch.zeros(10, 32), torch.zeros(3, 13, 32)
    assert _hits(lambda: prompt.expand(3, -1, -1)) == []
    assert _hits(lambda: prompt.expand(3, -1, -1).contiguous()) == [(3, 10, 32)]
    assert (3, 23, 32) in _hits(lambda: torch.cat([prompt.expand(3, -1, -1), text], dim=1))
    assert (69, 32) in _hits(lambda: torch.zeros(69, 32))
    assert _hits(lambda: text + 1) == []


def test_blocks_of_the_literal_form_are_forbidden_and_those_of_the_text_are_not():
    base = build_base("tiny-bert", CPU, torch.float32)
    case = StepCase("tiny-bert", 11, 1000, 103, padding=0.4)
    found = forbidden_blocks(case, base)

    def block(elements, size):
        return -(-elements * size // 512) * 512

    assert block(11 * 1103 * 32, 4) in found and block(11 * 1103 * 48, 2) in found
    allowed = {block(rows * width, 4) for rows in (11 * 1000, sum(case.lengths)) for width in (32, 48, 96)}
    assert not found & allowed


def test_a_cards_minutes_are_not_spent_on_the_cpu(make_context):
    context = make_context()
    context.device = torch.device("cuda")
    assert memory_suite._audit_operations(context, PROVIDERS)[0] == "not applicable"


def test_audited_sizes_are_prime():
    for device in (CPU, torch.device("cuda")):
        case = audited_case(device)
        for number in (case.B, case.P + case.N):
            assert all(number % divisor for divisor in range(2, int(number**0.5) + 1)), number


def test_the_suite_audits_and_measures(make_context, monkeypatch):
    # Through our torch backend: the interpreter takes its time, and the package's own tests look at it.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    context = make_context()
    context.result.data["suite"] = "memory"
    assert memory_suite.run(context, PROVIDERS) == "complete"
    record.check_schema(context.result.data)
    operations, allocator, padded, whole = context.result.cells
    assert operations["status"] == "passed" and "in the literal form" in operations["reason"]
    assert allocator["status"] == "not applicable"
    for cell in (padded, whole):
        literal, ours, floor = (cell["peers"][name] for name in ("literal_sdpa", "ours", "floor"))
        assert 0 < ours["kept_bytes"] <= ours["peak_bytes"] < literal["peak_bytes"]
        assert floor["peak_bytes"] > 0
    assert padded["peers"]["ours_1_unpad"]["peak_bytes"] < 0.9 * padded["peers"]["ours_0_plain"]["peak_bytes"]
    shown = step_report.memory_table([padded], table)
    assert padded["id"] in shown and "(ours" in shown


def test_an_audit_that_sees_nothing_fails():
    assert memory_suite._verdict({"literal_sdpa": [], "ours": []}, "x")[0] == "failed"
    assert memory_suite._verdict({"literal_sdpa": [1], "ours": [2]}, "x")[0] == "wrong"
    assert memory_suite._verdict({"literal_sdpa": [1], "ours": []}, "x")[0] == "passed"
