"""The steps suite on tiny models: every cell has its peers, and nothing that fails stops it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import health, record
from benchmarks.report import table
from benchmarks.step import bench as step_bench
from benchmarks.step import clock as step_clock
from benchmarks.step import report as step_report
from benchmarks.step import suite as steps_suite
from benchmarks.step.cases import StepCase, step_groups, tiny_groups
from benchmarks.step.goals import STEP_GOALS
from benchmarks.step.providers import step_providers
from benchmarks.step.roofline import step_work
from benchmarks.step.stream import make_stream, streams_of

CPU = torch.device("cpu")
NAMES = (
    "ours_0_plain", "ours_1_unpad", "ours", "ours_p0", "ours_graph", "ours_tasks16", "literal_sdpa", "peft",
    "joined_flex", "floor", "floor_compiled",
)  # fmt: skip
PROVIDERS = [p for p in step_providers() if p.name in NAMES]


def _cells(data):
    return [cell for cell in data["cells"] if "peers" in cell and cell.get("kind") != "profile"]


# One test: with workers each would run the grid again.
def test_a_run_is_complete_and_whole(make_context, monkeypatch):
    """A whole run over the tiny grid."""
    context = make_context(every_peer=True)
    context.result.data["suite"] = "steps"
    written = []
    put = context.result.put
    monkeypatch.setattr(
        context.result, "put", lambda cell: (written.append((cell["id"], set(cell.get("peers", ())))), put(cell))
    )
    monkeypatch.setattr("benchmarks.step.stream._NAMES", ("ours", "peft", "floor"))
    # What is compiled is compiled for its cell.
    monkeypatch.setattr("benchmarks.step.profile.PROFILED", ("ours", "ours_graph", "peft", "floor"))
    state = steps_suite.run(context, PROVIDERS)
    context.result.finish(state)
    data = context.result.data
    record.check_schema(data)
    assert data["state"] == "complete"
    ids = {case.id for group in tiny_groups() for case in group.cases}
    assert {cell["id"] for cell in _cells(data)} > ids
    assert data["calls"]["peft"].startswith("get_peft_model(base")
    _check_that_the_judge_stands_first(data)
    _check_that_every_provider_is_timed_or_says_why_not(_cells(data))
    _check_the_compiled_peer(_cells(data)[0], written)
    _check_that_the_profiler_comes_once_and_last(data)
    _check_that_a_stream_counts_real_tokens(_cells(data))
    _check_that_tables_show_what_was_measured(_cells(data))


def _check_that_the_judge_stands_first(data):
    assert data["cells"][0]["id"] == "judge-follows-reference" and data["cells"][0]["status"] == "passed"


def _check_that_every_provider_is_timed_or_says_why_not(cells):
    for cell in cells:
        for name, entry in cell["peers"].items():
            assert entry["status"] in ("timed", "not applicable"), (cell["id"], name, entry)
            assert entry.get("ms", 0) > 0 or entry["reason"]
        assert cell["peers"]["ours"]["tokens_per_second"] > 0
    first = cells[0]["peers"]
    assert first["ours_graph"]["status"] == "timed" and first["joined_flex"]["status"] == "not applicable"


def _check_the_compiled_peer(cell, written):
    """It is one graph, and timed beside ours in a cell that stands."""
    entry = cell["peers"]["floor_compiled"]
    assert entry["compiled"]["whole"] and entry["compiled"]["graph_breaks"] == 0
    assert entry["status"] == "timed" and entry["beside"]["ours"] > 0
    names = set(cell["peers"])
    eager = names - {"floor_compiled", "joined_flex"}
    assert [peers for name, peers in written if name == cell["id"]] == [eager, names - {"joined_flex"}, names]


def _check_that_the_profiler_comes_once_and_last(data):
    profiled = [cell for cell in data["cells"] if cell.get("kind") == "profile"]
    assert profiled == data["cells"][-1:] and profiled[0]["status"] == "passed"
    assert profiled[0]["id"] == f"profile-{_cells(data)[0]['id']}"
    assert not any("device_ms" in e for c in _cells(data) for e in c["peers"].values())


def _check_that_a_stream_counts_real_tokens(cells):
    cell = next(cell for cell in cells if cell.get("kind") == "stream")
    assert cell["tokens"] == sum(map(sum, cell["lengths"]))
    assert set(cell["peers"]) == {"ours", "peft", "floor"}
    shown = step_report.stream_table([cell], table)
    assert "| ours |" in shown and cell["id"] in shown


def _check_that_tables_show_what_was_measured(cells):
    assert "(ours" in step_report.cells_table(cells, table)
    ladder = step_report.ladder_table(cells, table)
    assert "ours_1_unpad" in ladder and cells[0]["id"] in ladder
    ratios = step_report.cpu_table(cells, table)
    assert "| geomean |" in ratios and "| worst cell |" in ratios


def test_peers_that_no_goal_names_take_part_where_they_are_asked_for(make_context, monkeypatch):
    monkeypatch.setattr(steps_suite, "chosen_groups", lambda context: [])
    monkeypatch.setattr(steps_suite, "gate", lambda context: True)
    monkeypatch.setattr("benchmarks.step.stream.streams_of", lambda context: [])
    for every in (False, True):
        context = make_context(every_peer=every)
        steps_suite.run(context)
        calls = set(context.result.data["calls"])
        assert {"peft_compiled", "floor_compiled", "ours_graph_compiled"} <= calls
        assert ({"literal_compiled", "joined_flex"} <= calls) is every


def test_a_broken_device_leaves_cells_that_say_so(make_context, monkeypatch):
    monkeypatch.setattr(health, "answers", lambda device: False)
    right = [p for p in PROVIDERS if p.name == "floor"]
    with pytest.raises(health.BrokenContext, match="illegal"):
        _one_cell(make_context, monkeypatch, [_planted(RuntimeError("an illegal memory access")), *right])


def test_a_card_with_less_memory_is_judged_in_smaller_parts(monkeypatch):
    from benchmarks.step import verify as step_verify

    for memory, tokens in ((80 * 10**9, 512), (141 * 10**9, 2048)):
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert step_verify._chunk_tokens(torch.device("cuda")) == tokens


def _one_cell(make_context, monkeypatch, providers, **options):
    monkeypatch.setattr(steps_suite, "tiny_groups", lambda: tiny_groups()[:1])
    monkeypatch.setattr("benchmarks.step.stream.streams_of", lambda context: [])
    context = make_context(**options)
    return steps_suite.run(context, providers, profiled=False), _cells(context.result.data)


def _planted(error, **changes):
    right = next(p for p in PROVIDERS if p.name == "literal_sdpa")

    def build(kit):
        raise error

    return replace(right, name="planted", build=build, **changes)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no such thing\nand a trace"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_a_failed_provider_is_a_row_and_the_others_go_on(make_context, monkeypatch, error, status):
    right = [p for p in PROVIDERS if p.name in ("literal_sdpa", "floor")]
    state, cells = _one_cell(make_context, monkeypatch, [_planted(error), *right])
    assert state == "complete" and len(cells) == 2
    for cell in cells:
        assert cell["peers"]["planted"]["status"] == status
        assert str(error).splitlines()[0] in cell["peers"]["planted"]["reason"]
        assert cell["peers"]["floor"]["status"] == "timed"


def test_a_failure_of_ours_makes_the_run_red(make_context, monkeypatch):
    state, cells = _one_cell(make_context, monkeypatch, [_planted(RuntimeError("broken"), ours=True)])
    assert state == "red" and len(cells) == 2


def test_a_wrong_peer_is_recorded_and_never_timed(make_context, monkeypatch):
    right = next(p for p in PROVIDERS if p.name == "literal_sdpa")

    def build(kit):
        bound = right.build(kit)
        return replace(bound, forward=lambda *arguments: 1.01 * bound.forward(*arguments))

    wrong = replace(right, name="planted", build=build)
    state, cells = _one_cell(make_context, monkeypatch, [wrong])
    assert state == "complete"
    assert cells[0]["peers"]["planted"]["status"] == "wrong" and "ms" not in cells[0]["peers"]["planted"]


def test_a_model_that_cannot_be_built_is_a_failed_cell(make_context, monkeypatch):
    def build_base(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_bench, "build_base", build_base)
    monkeypatch.setattr(steps_suite, "tiny_groups", lambda: tiny_groups()[:1])
    monkeypatch.setattr("benchmarks.step.stream.streams_of", lambda context: [])
    context = make_context()
    assert steps_suite.run(context, PROVIDERS, profiled=False) == "red"
    assert [cell["status"] for cell in context.result.cells[1:]] == ["out of memory"] * 2


def test_a_run_without_time_measures_nothing(make_context, monkeypatch):
    monkeypatch.setattr(steps_suite, "gate", lambda context: True)
    context = make_context(seconds=1.0)
    assert steps_suite.run(context, PROVIDERS) == "out of time"
    assert context.result.cells == []


def test_a_short_run_tries_its_first_group_in_any_case(make_context, monkeypatch):
    # A phase of a few seconds on a card is there for that group alone.
    monkeypatch.setattr(steps_suite, "gate", lambda context: True)
    monkeypatch.setattr(steps_suite, "run_streams", lambda context: "complete")
    tried = []
    monkeypatch.setattr(steps_suite, "measure_group", lambda group, *_: bool(tried.append(group)))
    # One group took a minute: the next ones take less, and need no minute to be begun.
    clock = iter((0.0, 60.0, 60.0, 70.0))
    monkeypatch.setattr(steps_suite.time, "monotonic", lambda: next(clock, 70.0))
    context = make_context(seconds=28.0, small=True, only=("qwen3-0.6b-B8-N512-P64-*", "bert-base-B32-N128-P20-*"))
    context.device, context.tiny, context.deadline = torch.device("cuda"), False, 90.0
    assert steps_suite.run(context, PROVIDERS, warm=False, profiled=False) == "complete"
    assert [group.first.model for group in tried] == ["bert-base", "bert-base", "qwen3-0.6b", "bert-base"]


def test_steps_take_turns_and_a_broken_one_leaves():
    order, broken = [], []

    def breaks():
        broken.append(1)
        if len(broken) > 2:
            raise RuntimeError("worn out")

    steps = {name: step_clock.Step(lambda name=name: order.append(name), lambda: None) for name in "ab"}
    steps["c"] = step_clock.Step(breaks, lambda: None)
    effort = step_clock.StepEffort(seconds=0.0, least=4, most=4, warmups=1)
    timings, failed = step_clock.time_steps(steps, CPU, effort, seconds_left=60)
    assert order == list("abababab" + "ab")
    assert set(timings) == {"a", "b"}
    assert failed == {"c": {"status": "failed", "reason": "RuntimeError: worn out"}}
    assert timings["a"].samples == 4


def test_with_one_thread_a_neighbour_on_the_machine_costs_nothing():
    import time

    name, now = step_clock.cpu_clock()
    assert name == "process_time" and torch.get_num_threads() == 1
    start = now()
    time.sleep(0.05)
    assert now() - start < 0.03


def test_arming_is_outside_the_timing():
    step = step_clock.Step(lambda: None, lambda: sum(range(300_000)))
    timings, _ = step_clock.time_steps({"a": step}, CPU, step_clock.QUICK_STEPS, seconds_left=60)
    assert timings["a"].ms < 1


def test_a_chain_of_errors_tells_that_memory_ran_out():
    error = RuntimeError("compilation failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert health.is_out_of_memory(error) and not health.is_out_of_memory(ValueError("x"))


def test_the_first_groups_hold_a_cell_of_every_goal():
    first = [case for group in step_groups()[:8] for case in group.cases]
    for goal in STEP_GOALS:
        if goal.suite == "steps":
            assert any(goal.judged(case.as_dict()) for case in first), goal.id


def test_the_grid_is_that_of_the_plan():
    cases = {case.id for group in step_groups() for case in group.cases}
    for model in ("bert-base", "roberta-large"):
        for B, N, P in ((8, 64, 20), (32, 128, 20), (32, 128, 128), (64, 128, 8), (16, 512, 128), (8, 2048, 128)):
            for padding in (0.0, 0.4):
                assert StepCase(model, B, N, P, padding).id in cases
    for model, B, N, P in (("llama-3-8b", 4, 2048, 512), ("qwen3-0.6b", 8, 2048, 128), ("qwen3-0.6b", 8, 64, 20)):
        assert StepCase(model, B, N, P).id in cases
    assert sum("drop10" in name for name in cases) == 4


def test_no_cell_is_measured_again_with_fewer_peers():
    seen: set[str] = set()
    for group in step_groups():
        names = {case.id for case in group.cases}
        assert group.first.peers == "compiled" or not names & seen, names & seen
        seen |= names


def test_lengths_leave_out_the_share_that_is_padding():
    case = StepCase("bert-base", 32, 128, 20, padding=0.4)
    assert max(case.lengths) == 128 and sum(case.lengths) == pytest.approx(0.6 * 32 * 128, rel=0.01)


def test_work_counts_real_tokens_once_forward_and_once_backward():
    from benchmarks.step.models import build_base

    base = build_base("tiny-bert", CPU, torch.float32)
    case = StepCase("tiny-bert", 2, 10, 4, dtype="fp32")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    attention = 2 * 7 * (2 * 16 * 2) * (2 * 10 * 10 + 20 * 4)
    prompt = 4 * (2 * 2 * 32 * 32) * 4
    assert step_work(case, base).flops == 4 * weights * 20 + attention + prompt
    assert step_work(case, base, prompt=False).flops == 4 * weights * 20 + 2 * 7 * 64 * 200
    half = step_work(replace(case, padding=0.4), base).flops
    assert half < 0.7 * step_work(case, base).flops


def test_drawn_lengths_are_the_same_every_time(make_context):
    case = StepCase("bert-base", 32, 512, 20)
    one, two = make_stream(case, 30), make_stream(case, 30)
    assert one.lengths == two.lengths and len(one.lengths) == 30
    assert all(4 <= n <= 512 for lengths in one.lengths for n in lengths)
    assert one.case.N == max(map(max, one.lengths)) and one.tokens == sum(map(sum, one.lengths))
    assert len(streams_of(make_context())) == 1
