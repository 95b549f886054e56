"""The clock, the roofline and the result file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ceilings, measure
from benchmarks.attention import roofline
from benchmarks.attention.cases import case_of
from benchmarks.record import ResultFile, check_schema, write_json

CPU = torch.device("cpu")


def test_providers_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    effort = measure.Effort(milliseconds=0.0, least=4, most=4, warmup=1)
    timings = measure.time_interleaved(calls, CPU, effort)
    assert order[-12:] == list("abc" * 4)
    assert all(timing.samples == 4 and timing.method == "perf_counter" for timing in timings.values())


def test_the_median_is_no_mean_and_the_quantiles_frame_it():
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 900.0, 4.0]) == (3.5, 2.0, 5.0)


def test_a_refused_capture_is_over_for_the_allocator_too(monkeypatch):
    told, stream = [], SimpleNamespace(device_index=0)

    class Refused:
        def __init__(self, graph, pool, stream, capture_error_mode):
            told.append(("begun", pool))

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "CUDAGraph": object, "graph_pool_handle": lambda: (0, 1), "current_stream": lambda: stream, "graph": Refused,
        "set_stream": lambda stream: told.append(("stream", stream)),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    ended = lambda device, pool: told.append(("ended", pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        measure.capture(lambda: None)
    assert told == [("begun", (0, 1)), ("stream", stream), ("ended", (0, 1))]


def test_a_slow_call_is_slower():
    calls = {"short": lambda: sum(range(1000)), "long": lambda: sum(range(30000))}
    timings = measure.time_interleaved(calls, CPU, measure.QUICK)
    assert timings["long"].ms > 3 * timings["short"].ms
    assert timings["long"].p20 <= timings["long"].ms <= timings["long"].p80


def test_nothing_to_time_is_no_error():
    assert measure.time_interleaved({}, CPU) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_short_calls_are_replayed():
    device = torch.device("cuda")
    with measure.cell_stream(device):
        x = torch.randn(64, 64, device=device, requires_grad=True)
        step = lambda: torch.autograd.grad((x @ x).sum(), x)  # noqa: E731
        timing = measure.time_interleaved({"step": step}, device)["step"]
    assert timing.method == "graph", timing.note
    assert 0 < timing.ms <= timing.eager_ms


def test_operations_count_real_tokens_only():
    full = case_of("roberta-large", 4, 100, 20, direction="forward")
    assert roofline.work(full).flops == 4 * 16 * 64 * (4 * 100 * 120)
    causal = case_of("roberta-large", 4, 100, 20, causal=True, direction="forward")
    assert roofline.work(causal).flops == 4 * 16 * 64 * 4 * (100 * 20 + 5050)
    half = case_of("roberta-large", 2, 100, 0, padding=0.4, direction="forward")
    assert half.lengths == (100, 20)
    assert roofline.work(half).flops == 4 * 16 * 64 * (100**2 + 20**2)


def test_training_is_forward_and_backward():
    def work(direction, **options):
        return roofline.work(case_of("llama-3-8b", 4, 100, 20, direction=direction), **options)

    assert work("training").flops == work("forward").flops + work("backward").flops
    assert work("training").bytes == work("forward").bytes + work("backward").bytes
    assert work("backward").flops == 2.5 * work("forward").flops
    prompt_only = work("backward", prompt_only=True)
    assert prompt_only.flops == 8 * 32 * 128 * (4 * 100 * 20)
    assert prompt_only.bytes < work("backward").bytes


def test_the_floor_is_the_larger_of_two_times():
    ceiling = ceilings.Ceiling(tflops=1.0, terabytes_per_second=1.0)
    assert roofline.Work(flops=2e12, bytes=1e12).speed_of_light(ceiling) == 2000.0
    assert roofline.Work(flops=1e9, bytes=3e12).speed_of_light(ceiling) == 3000.0
    assert roofline.Work(flops=1e12, bytes=0).tflops(500.0) == pytest.approx(2.0)


def test_ceilings_are_measured_on_the_device_itself():
    ceiling = ceilings.measure_ceiling(CPU, tiny=True)
    assert ceiling.tflops > 0 and ceiling.terabytes_per_second > 0
    assert set(ceiling.as_dict()) == {"tflops", "terabytes_per_second"}


@pytest.mark.parametrize("error", [RuntimeError("cuDNN says no\nand why"), ValueError("no such graph")])
def test_a_call_that_refuses_to_be_captured_is_a_note(monkeypatch, error):
    def refuse(call, repeats):
        raise error

    monkeypatch.setattr(measure, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    events = {"peer": measure.Timing(0.05, 0.05, 0.05, 3, "events")}
    timings = measure._time_by_graphs({"peer": None}, events, measure.QUICK)
    assert timings == {"peer": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def test_a_run_that_breaks_off_keeps_its_cells(tmp_path):
    result = ResultFile(tmp_path / "run.json", "kernels", ["x"], {"device": "cpu"})
    result.put({"id": "one", "peers": {"ours": {"status": "timed", "ms": 1.0}}})
    data = json.loads((tmp_path / "run.json").read_text())
    check_schema(data)
    assert data["state"] == "running"
    assert [cell["id"] for cell in data["cells"]] == ["one"]


def test_a_cell_that_grows_takes_the_place_of_what_it_was(tmp_path):
    result = ResultFile(tmp_path / "run.json", "kernels", ["x"], {"device": "cpu"})
    for name, ms in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        result.put({"id": name, "peers": {"ours": {"status": "timed", "ms": ms}}})
    cells = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert [(cell["id"], cell["peers"]["ours"]["ms"]) for cell in cells] == [("one", 3.0), ("two", 2.0)]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"fine": 1})
    with pytest.raises(ValueError):
        write_json(path, {"broken": float("nan")})
    assert json.loads(path.read_text()) == {"fine": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        {"schema": 0},
        {"state": "fine"},
        {"cells": None},
        {"cells": [{"peers": {}}]},
        {"cells": [{"id": "a", "peers": {"x": {"status": "quick"}}}]},
        {"cells": [{"id": "a", "peers": {"x": {"status": "timed"}}}]},
        {"cells": [{"id": "a", "status": "good"}]},
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, spoil):
    result = ResultFile(tmp_path / "run.json", "kernels", ["x"], {"device": "cpu"})
    check_schema(result.data)
    with pytest.raises(ValueError, match="must be"):
        check_schema(result.data | spoil)


def test_an_unknown_state_is_refused(tmp_path):
    result = ResultFile(tmp_path / "run.json", "kernels", ["x"], {"device": "cpu"})
    with pytest.raises(ValueError, match="state must be one of"):
        result.finish("done")
