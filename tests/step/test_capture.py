"""How CUDA graphs are captured; with a device, that other threads and errors do no harm."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from ptv2_fast.step.capture import CAPTURES, CudaCapture

DEVICE = torch.device("cuda")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def calls(monkeypatch):
    """What is asked of torch.cuda, which here does nothing."""
    found = []

    class Graph:
        def __init__(self, graph=None, **options):
            found.append(("capture", options))

        def __enter__(self):
            found.append(("begin", {}))

        def __exit__(self, *error):
            # As torch: a capture that cannot end raises before the stream is the former one again.
            if error[0] is not None:
                raise RuntimeError("capture invalidated")

        def replay(self):
            found.append(("replay", {}))

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    current = SimpleNamespace(device_index=3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: found.append(("set_stream", stream is current)))

    def end_pool(*arguments):
        found.append(("end_pool", arguments))
        raise RuntimeError("the pool has ended")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
    clear = lambda: found.append(("workspaces freed", {}))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    return found


def test_cuda_alone_captures():
    assert CAPTURES == {"cuda": CudaCapture}


def test_other_threads_may_use_the_device_meanwhile(calls):
    result = torch.ones(())
    replay = CudaCapture(DEVICE)(lambda: result)
    options = {"pool": "pool", "stream": "side", "capture_error_mode": "thread_local"}
    assert ("capture", options) in calls and replay() is result and calls[-1] == ("replay", {})


@pytest.mark.parametrize("error", [ValueError("in the call"), KeyboardInterrupt()])
def test_a_failed_capture_gives_the_stream_and_the_allocator_back(calls, error):
    def fails():
        raise error

    with pytest.raises(RuntimeError, match="invalidated"):
        CudaCapture(DEVICE)(fails)
    assert calls[-3:] == [("set_stream", True), ("end_pool", (3, "pool")), ("workspaces freed", {})]


def test_products_work_in_memory_of_their_graph(calls):
    CudaCapture(DEVICE)(lambda: calls.append(("call", {})))
    names = [name for name, _ in calls]
    # The graph's context is made, then entered: the workspaces are gone before it is, and after it.
    assert names[names.index("begin") - 2 :] == ["workspaces freed", "capture", "begin", "call", "workspaces freed"]


@pytest.mark.gpu
@NEEDS_CUDA
def test_memory_is_pinned_while_a_call_is_captured():
    x, stop, failed = torch.ones(8, device="cuda"), threading.Event(), []

    def pin():
        # Kept, so that each asks the driver; a gigabyte at most.
        kept = []
        try:
            while not stop.is_set() and len(kept) < 1024:
                kept.append(torch.empty(1 << 20, dtype=torch.uint8).pin_memory())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        capture = CudaCapture(torch.device("cuda"))
        capture.warm_up(lambda: x * 2)
        for _ in range(5):
            replay = capture(lambda: x * 2)
            assert torch.equal(replay(), x * 2)
    finally:
        stop.set()
        thread.join()
    assert not failed


@pytest.mark.gpu
@NEEDS_CUDA
def test_the_device_goes_on_after_a_capture_that_failed():
    x = torch.ones(8, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="captur"):
        CudaCapture(torch.device("cuda"))(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert x.sum().item() == 8
    assert torch.equal(CudaCapture(torch.device("cuda"))(lambda: x * 3)(), x * 3)


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_replay_does_not_rely_on_memory_that_others_free():
    """Freeing the workspaces of matrix products, as other libraries do, leaves a captured step as it was."""
    # So few rows and so long sums that the product is split and needs a workspace.
    left, right = (torch.randn(64, 1 << 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    call = lambda: left @ right.T  # noqa: E731
    capture = CudaCapture(torch.device("cuda"))
    wanted = capture.warm_up(call)
    replay = capture(call)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Whatever was freed belongs to somebody else now.
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
    found = replay().clone()
    torch.cuda.synchronize()
    torch.testing.assert_close(found, wanted)
    assert all(bool((other == 7.0).all()) for other in others)
