"""--device: words, the one CUDA device that training sees, and devices that are not there."""

from __future__ import annotations

import os

import pytest
import torch

from ptv2_fast.training.devices import choose, device_of


@pytest.mark.parametrize(
    ("device", "visible", "then"),
    [
        ("cuda", None, "0"),
        ("cuda:1", None, "1"),
        ("cuda:1", "4,GPU-5", "GPU-5"),
        ("cpu", "4,5", "4,5"),
        ("mps", None, None),
        (None, "4,5", "4,5"),
    ],
)
def test_training_sees_the_device_that_is_named(monkeypatch, device, visible, then):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # Whatever is set is taken back at the end.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    choose(device)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == then


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu:0", "CPU", ""])
def test_what_names_no_device_is_refused(device):
    with pytest.raises(ValueError, match="--device must be cpu, cuda, cuda:<number> or mps"):
        choose(device)


def test_a_device_that_is_hidden_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ValueError, match="cuda:2 is not there: CUDA_VISIBLE_DEVICES is 4,5"):
        choose("cuda:2")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of(None) == device_of("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:3", "mps"):
        with pytest.raises(ValueError, match=f"--device {device} is not there: torch .* sees cpu$"):
            device_of(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None) == device_of("cuda:3") == torch.device("cuda", 0), "the only one that torch sees"
