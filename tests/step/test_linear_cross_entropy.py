"""The chunked loss against the whole one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.step.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("trained", ["hidden", "head"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "chunk"), [(0, 4), (1, 4), (4, 4), (13, 4), (13, 100)])
def test_loss_and_gradients_are_those_of_the_full_logits(rows, chunk, with_bias, trained):
    tensors = [torch.randn(rows, 8), torch.randn(11, 8), torch.randn(11) if with_bias else None]
    labels = torch.randint(0, 11, (rows,))
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            tensor.requires_grad_(i == 0 or trained == "head")
    expected = F.cross_entropy(F.linear(*tensors), labels, reduction="sum")
    got = linear_cross_entropy(*tensors, labels, chunk_rows=chunk)
    torch.testing.assert_close(got, expected)
    asked = [t for t in tensors if t is not None and t.requires_grad]
    wanted = torch.autograd.grad(expected * 3, asked)
    found = torch.autograd.grad(got * 3, asked)
    torch.testing.assert_close(found, wanted)


def test_rows_without_a_label_count_nothing():
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([1, -100, 5, 0, -100, -100, 2, 3, -100])
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    got = linear_cross_entropy(hidden, weight, None, labels, chunk_rows=4)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight])
    )


def test_no_tensor_of_all_logits_exists():
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[-1] == 37:
                self.rows = max(self.rows, out.shape[0])
            return out

    hidden, weight = torch.randn(23, 3, requires_grad=True), torch.randn(37, 3)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, None, torch.randint(0, 37, (23,)), chunk_rows=5).backward()
    assert largest.rows == 5
