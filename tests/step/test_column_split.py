"""Gradients of a product's columns: the buffer that they lie in, where they do, and the same bits as ever."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.attention import triton_layers
from ptv2_fast.step.column_split import ColumnSplit, joined_columns
from tolerances import assert_same_bits

SIZES = [32, 16, 16]


class _Copies(TorchDispatchMode):
    """How many bytes concatenations read and write meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.bytes += 2 * made.nbytes
        return made


class _Given(torch.autograd.Function):
    """Sums its inputs, to which it gives fixed gradients."""

    @staticmethod
    def forward(ctx, grads, *parts):
        ctx.grads = grads
        return sum(part.sum() for part in parts)

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.grads


def _product(rows=(2, 5)):
    return torch.randn(*rows, sum(SIZES), requires_grad=True) * 1.0


def _columns(rows=(2, 5), sizes=SIZES):
    return list(torch.randn(*rows, sum(sizes)).split_with_sizes(sizes, -1))


def _gradient(cut, grads, hook=None):
    """(the gradient of a product, bytes that were concatenated) for these gradients of its parts."""
    x = _product(grads[0].shape[:-1] if grads[0] is not None else (2, 5))
    parts = cut(x)
    if hook is not None:
        parts[1].register_hook(hook)
    with _Copies() as copies:
        (found,) = torch.autograd.grad(_Given.apply(grads, *parts), x)
    return found, copies.bytes


def _natively(x):
    return x.split_with_sizes(SIZES, -1)


@pytest.mark.parametrize("rows", [(2, 5), (1, 5), (7,)])
def test_columns_of_one_buffer_are_the_gradient(rows):
    grads = _columns(rows)
    expected, copied = _gradient(_natively, grads)
    assert copied == 2 * expected.nbytes
    found, copied = _gradient(ColumnSplit(SIZES), grads)
    assert_same_bits(found, expected)
    assert copied == 0 and found.data_ptr() == grads[0].data_ptr() and found.is_contiguous()


def _swapped():
    first, second, third = _columns()
    return [first, third, second]


def _transposed():
    return [grad.transpose(0, 1) for grad in _columns((5, 2))]


def _laid_out(*strides):
    """Gradients that begin where columns do, with these strides each, in no more memory than they reach."""
    buffer, starts = torch.randn(1000), (0, SIZES[0], SIZES[0] + SIZES[1])
    reach = 1 + max(s + a + 4 * b + (n - 1) * c for s, n, (a, b, c) in zip(starts, SIZES, strides, strict=True))
    buffer = buffer[:reach].clone()
    parts = zip(SIZES, strides, starts, strict=True)
    return [buffer.as_strided((2, 5, size), stride, start) for size, stride, start in parts]


OTHERS = {
    "memory of their own": lambda: [grad.clone() for grad in _columns()],
    "one of another buffer": lambda: [*_columns()[:2], _columns()[2]],
    "another order": _swapped,
    "more columns": lambda: _columns(sizes=[*SIZES, 8])[:3],
    "columns from the second on": lambda: _columns(sizes=[8, *SIZES])[1:],
    "rows in another order": _transposed,
    "columns apart": lambda: [torch.randn(2, 5, 2 * size)[..., ::2] for size in SIZES],
    "every other column": lambda: _laid_out(*[(400, 80, 2)] * 3),
    "rows of one in another order": lambda: _laid_out((320, 64, 1), (320, 64, 1), (64, 128, 1)),
    "one for all": lambda: [torch.randn(1).expand(2, 5, size) for size in SIZES],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_gradients_are_concatenated(kind):
    grads, cut = OTHERS[kind](), ColumnSplit(SIZES)
    expected, copied = _gradient(_natively, grads)
    assert_same_bits(_gradient(cut, grads)[0], expected)
    assert _gradient(cut, grads)[1] == copied > 0
    # From now on by PyTorch itself.
    assert "SplitWithSizes" in type(cut(_product())[0].grad_fn).__name__


def test_columns_of_two_dtypes_are_no_buffer():
    first, second, third = _columns()
    assert joined_columns([first, second, third]) is not None
    assert joined_columns([first, second.view(torch.int32), third]) is None


def test_a_gradient_that_is_missing_is_zeros():
    grads, cut = [None, *_columns()[1:]], ColumnSplit(SIZES)
    assert_same_bits(_gradient(cut, grads)[0], _gradient(_natively, grads)[0])
    assert _gradient(cut, _columns())[1] == 0
    x = _product()
    assert torch.autograd.grad(_Given.apply([None] * 3, *cut(x)), x, allow_unused=True) == (None,)


def _trebled(grad):
    grad.mul_(3.0)


def test_hooks_may_change_a_gradient_in_place_or_replace_it():
    for hook, copies in ((_trebled, False), (lambda grad: 3.0 * grad, True)):
        found, copied = _gradient(ColumnSplit(SIZES), grads := _columns(), hook)
        wanted = [grad.clone() for grad in grads]
        if copies:
            wanted[1] *= 3.0
        assert_same_bits(found, torch.cat(wanted, -1))
        assert bool(copied) == copies


def test_parts_that_are_used_twice_have_sums():
    grads, cut = _columns(), ColumnSplit(SIZES)
    kept = [grad.clone() for grad in grads]
    x = _product()
    first, *others = cut(x)
    (found,) = torch.autograd.grad(_Given.apply(grads, first, *others) + 2.0 * first.sum(), x)
    assert_same_bits(found, torch.cat([kept[0] + 2.0, *kept[1:]], -1))
    for grad, before in zip(grads, kept, strict=True):
        assert_same_bits(grad, before)


def test_gradients_that_are_kept_are_copies():
    grads, cut = _columns(), ColumnSplit(SIZES)
    x = _product()
    parts = cut(x)
    for part in parts:
        part.retain_grad()
    (found,) = torch.autograd.grad(_Given.apply(grads, *parts), x)
    found.zero_()
    assert all(part.grad.count_nonzero() for part in parts)


def _of_columns(cut):
    """The gradient of what the gradients of the parts are made of."""
    x, made_of = _product(), torch.randn(2, 5, sum(SIZES), requires_grad=True)
    (first,) = torch.autograd.grad(cut(x), x, _natively(made_of * 1.0), create_graph=True)
    return torch.autograd.grad(first, made_of, torch.randn(2, 5, sum(SIZES)))[0]


def _twice(cut):
    x = torch.randn(2, 5, sum(SIZES), requires_grad=True)
    parts = cut(x * x)
    (first,) = torch.autograd.grad(sum((part**3).sum() for part in parts), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


def _batched(cut):
    x = _product()
    return torch.autograd.grad(cut(x), x, _columns((7, 2, 5)), is_grads_batched=True)[0]


def _batched_in_part(cut):
    x = _product()
    parts, own = cut(x), _columns()[0]
    parts[0].register_hook(lambda grad: own)
    return torch.autograd.grad(parts, x, _columns((7, 2, 5)), is_grads_batched=True)[0]


def _forward_mode(cut):
    x = torch.randn(2, 5, sum(SIZES), requires_grad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(cut(dual * dual)[1]).tangent.detach()


def _functional(cut):
    x = torch.randn(2, 5, sum(SIZES))
    return torch.func.grad(lambda y: sum((part**2).sum() for part in cut(y)))(x)


def _compiled(cut):
    x = torch.randn(2, 5, sum(SIZES), requires_grad=True)
    run = torch.compile(lambda y: sum((part**2).sum() for part in cut(y * y)), backend="eager", fullgraph=True)
    return torch.autograd.grad(run(x), x)[0]


@pytest.mark.parametrize(
    "derived", [_of_columns, _twice, _batched, _batched_in_part, _forward_mode, _functional, _compiled]
)
def test_derivatives_of_other_kinds(derived):
    found = []
    for cut in (ColumnSplit(SIZES), _natively):
        torch.manual_seed(3)
        found.append(derived(cut))
    assert_same_bits(*found)


NUMBERS = (None, True, None, None, 0.25, 0.0)


def _attended(cut, order, dtype, packed, between=lambda q: q, bias=None):
    """(gradients of states and of a prompt, bytes that were concatenated) of attention over one product's columns."""
    torch.manual_seed(5)
    heads, head_dim = {"q": 2, "k": 1, "v": 1}, 16
    rows = (1, 9) if packed else (2, 5)
    states = torch.randn(*rows, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(sum(SIZES), 8, dtype=dtype)
    prompt = torch.randn(2, 1, 3, head_dim, dtype=dtype, requires_grad=True)
    sizes = [heads[name] * head_dim for name in order]
    parts = zip(order, cut(sizes)(torch.nn.functional.linear(states, weight)), strict=True)
    views = {name: part.view(*rows, -1, head_dim).transpose(1, 2) for name, part in parts}
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    out = triton_layers.layer_attention(
        between(views["q"]),
        views["k"],
        views["v"],
        *prompt,
        None,
        bias and bias(views),
        (None, cu_seqlens, None, None),
        NUMBERS,
    )
    with _Copies() as copies:
        grads = torch.autograd.grad(out, (states, prompt), torch.randn_like(out))
    return grads, copies.bytes


def _plain(sizes):
    return lambda x: x.split_with_sizes(sizes, -1)


@pytest.mark.parametrize(
    ("order", "dtype", "packed"),
    [("qkv", torch.float32, False), ("vkq", torch.float16, False), ("qkv", torch.float16, True)],
)
def test_attention_gives_the_columns_of_one_buffer(order, dtype, packed):
    expected, copied = _attended(_plain, order, dtype, packed)
    found, none = _attended(ColumnSplit, order, dtype, packed)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    rows = 9 if packed else 10
    assert copied == 2 * rows * sum(SIZES) * dtype.itemsize and none == 0


def _bias(views):
    """Scores that a model makes of its queries."""
    return views["q"].sum(-1, keepdim=True).expand(-1, -1, -1, 5)


@pytest.mark.parametrize("changes", [{"between": lambda q: 2.0 * q}, {"bias": _bias}], ids=["rotated", "biased"])
def test_what_models_do_between_takes_the_usual_way(changes):
    buffers = []

    def recording(sizes):
        cut = ColumnSplit(sizes)

        def run(x):
            parts = cut(x)
            parts[2].register_hook(lambda grad: buffers.append((grad.untyped_storage().nbytes(), grad.nbytes)))
            return parts

        return run

    expected, copied = _attended(_plain, "qkv", torch.float32, False, **changes)
    found, same = _attended(recording, "qkv", torch.float32, False, **changes)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    assert copied == same > 0
    # A gradient does not keep the memory of two others alive.
    assert all(whole == own for whole, own in buffers) and buffers
