"""Gradients of queries, keys and values lie as these do: in columns of one buffer, or each in memory of its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptv2_fast.kernels.gradient_layout import allocate_gradients, column_order

B, N, D = 2, 5, 16
COUNTS = (4, 2, 2)  # heads of queries, keys and values


def _cut(order, batch=B, counts=COUNTS, gap=0):
    """Queries, keys and values whose columns come in this order in a (B, N, W) buffer."""
    widths = [counts[place] * D for place in order]
    parts = torch.zeros(batch, N, sum(widths) + gap).split_with_sizes([*widths, gap], -1)
    views = {place: part.view(batch, N, -1, D).transpose(1, 2) for place, part in zip(order, parts, strict=False)}
    return [views[place] for place in range(3)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("sizes", [{}, {"batch": 1}, {"counts": (4, 1, 1)}, {"counts": (1, 1, 1)}])
def test_columns_are_found_in_their_order(order, sizes):
    assert column_order(*_cut(order, **sizes)) == order


def test_other_tensors_have_no_order():
    q, k, v = _cut((0, 1, 2))
    for others in (
        _cut((0, 1, 2), gap=D),  # more columns than theirs
        (q.contiguous(), k, v),  # rotated, for instance
        (q, v, v),
        (q, k, _cut((0, 1, 2))[2]),
        (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]),  # columns of a part of the rows
        (q, k[:, :, :-1], v[:, :, :-1]),
        (q, k.as_strided(k.shape, (k.stride(0), 1, k.stride(2), 2)), v),
    ):
        assert column_order(*others) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_columns_of_one_buffer(order, packed):
    tensors = _cut(order)
    given = [x.transpose(1, 2).flatten(0, 1) for x in tensors] if packed else tensors
    grads = allocate_gradients(*given, True, True, order)
    for grad, like in zip(grads, given, strict=True):
        assert (grad.shape, grad.stride(), grad.dtype) == (like.shape, like.stride(), like.dtype)
        assert grad.storage_offset() == like.storage_offset()
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
    # No byte more than each in memory of its own.
    assert grads[0].untyped_storage().nbytes() == sum(grad.nbytes for grad in grads)


@pytest.mark.parametrize(
    ("of_query", "of_text", "order"), [(True, True, None), (True, False, (0, 1, 2)), (False, True, (0, 1, 2))]
)
def test_others_have_memory_of_their_own(of_query, of_text, order):
    tensors = _cut((0, 1, 2))
    asked = (of_query, of_text, of_text)
    grads = allocate_gradients(*tensors, of_query, of_text, order)
    for grad, like, is_asked in zip(grads, tensors, asked, strict=True):
        assert (grad is not None) == is_asked
        if grad is not None:
            assert grad.shape == like.shape and grad.transpose(1, 2).is_contiguous()
            assert grad.untyped_storage().nbytes() == grad.nbytes
