"""Launch configurations and the helpers around a launch, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ptv2_fast.kernels import launch, problem

ARCHITECTURES = (80, 86, 90, 100, 120, launch.GFX942)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
def test_tiles_are_what_the_hardware_multiplies(dtype, crowded):
    for arch, head_dim, kernel_pass in itertools.product(ARCHITECTURES, launch.HEAD_DIMS, launch.PASSES):
        config = launch.choose_config(arch, head_dim, dtype, kernel_pass, crowded)
        for size in (config.block_m, config.block_n):
            assert size >= 16 and size & (size - 1) == 0
        # One operand tile in 16 bits, double buffered, is the least a card must hold.
        operands = (config.block_m + config.block_n) * launch.padded_head_dim(head_dim) * dtype.itemsize
        assert operands <= launch.shared_memory_limit(arch)


def test_rocm_is_told_from_cuda_by_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch._cuda_architecture.__wrapped__(0) == launch.GFX942


def test_crowded_kernels_get_smaller_tiles():
    plain, crowded = (launch.choose_config(90, 64, torch.bfloat16, "forward", crowded) for crowded in (False, True))
    assert crowded.block_n < plain.block_n


def test_short_prompts_have_their_bound_or_the_usual_one():
    usual = launch.LaunchConfig(64, 64, 4, 3)
    assert usual.shortened.options == usual.options and "maxnreg" not in usual.options
    bounded = dataclasses.replace(usual, maxnreg=128)
    assert bounded.shortened.options["maxnreg"] == 128
    short = dataclasses.replace(bounded, short_maxnreg=168)
    assert (short.options["maxnreg"], short.shortened.options["maxnreg"]) == (128, 168)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "head_dim must be one of"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"kernel_pass": "sideways"}, "kernel_pass must be one of"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        launch.choose_config(**{"arch": 90, "head_dim": 64, "dtype": torch.float32, "kernel_pass": "forward"} | change)


@pytest.mark.parametrize(("head_dim", "padded"), [(16, 16), (80, 128), (96, 128), (128, 128), (192, 256)])
def test_padded_head_dim(head_dim, padded):
    assert launch.padded_head_dim(head_dim) == padded


def test_tile_safe_copies_only_strides_that_overflow():
    tensor = torch.zeros(1, 1, 3, 4)
    assert launch.tile_safe(tensor) is tensor
    wide = torch.zeros(2**24 + 1, dtype=torch.int8).as_strided((1, 1, 2, 1), (1, 1, 2**24, 1))
    assert launch.tile_safe(wide).stride(2) == 1
    assert launch.tile_safe(wide.transpose(0, 2), 0).stride(0) == 1


@pytest.mark.parametrize("form", [{}, {"packed": (20, 0, 33)}], ids=["dense", "packed"])
def test_strides_that_overflow_change_no_result(make_call, monkeypatch, form):
    call = make_call(layout="columns", kv_heads=2, **form)
    if call.packed:
        call.tensors[:3] = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in call.tensors[:3])

    def results():
        output, lse = call.kernel()
        return output, lse, *call.kernel_gradients(output.flip(0), output, lse)[:5]

    expected = results()
    copied = []
    monkeypatch.setattr(launch, "_LARGEST_TILE_STRIDE", 8)
    monkeypatch.setattr(problem, "_forms", {})
    usual = launch.tile_safe

    def counting(tensor, *rows):
        copied.append(usual(tensor, *rows) is not tensor)
        return usual(tensor, *rows)

    monkeypatch.setattr(launch, "tile_safe", counting)
    for result, other in zip(results(), expected, strict=True):
        assert torch.equal(result, other)
    assert sum(copied) > 5


def test_split_fills_the_device_but_not_more():
    assert launch.split(100, programs=8, most=50) == 13
    assert launch.split(100, programs=8, most=5) == 5
    assert launch.split(100, programs=500, most=5) == 1


def test_recording_launches_nothing_and_ends(make_call):
    call = make_call(queries=3)
    with launch.record(90) as launches:
        output, _ = call.kernel()
    assert len(launches) == 1
    assert output.isnan().all()
    output, _ = call.kernel()
    assert len(launches) == 1
    assert output.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_on_the_tensors_device(make_call):
    call = make_call()
    expected, _ = call.kernel()
    call.tensors = [tensor.to("cuda:1") for tensor in call.tensors]
    output, _ = call.kernel()
    assert torch.equal(output.cpu(), expected.cpu())
