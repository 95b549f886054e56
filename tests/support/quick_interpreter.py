"""Triton's interpreter without what it does over and over; results are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect

import pytest

_NEEDED = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "GridExecutor")


def install() -> None:
    """Let the interpreter replace the functions of triton.language once a launch, not once a call.

    It does so for each @jit function that a kernel calls, which takes half of its time: it looks at all members of the
    language again and finds them replaced. It also makes a table of all dtypes to look one up. A version of Triton that
    does this otherwise is left alone.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in _NEEDED):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()

    @functools.cache
    def languages_of(fn) -> frozenset[str]:
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def patch_once(fn):
        languages = languages_of(fn)
        if languages in replaced:
            return interpreter._LangPatchScope()
        replaced.add(languages)
        return patch(fn)

    def launch_anew(*args, **kwargs):
        replaced.clear()  # the end of a launch puts everything back
        return launch(*args, **kwargs)

    numpy_dtype, known = interpreter._get_np_dtype, {}

    def numpy_dtype_once(kind):
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):
            return numpy_dtype(kind)
        if element not in known:
            known[element] = numpy_dtype(element)
        return known[element]

    interpreter._get_np_dtype = numpy_dtype_once
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


@contextlib.contextmanager
def without_overflow_checks():
    """Within this context integers are not computed a second time in 64 bits to see whether they overflow.

    That is a third of an interpreted kernel's time; the kernels' own tests do without this.
    """
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    if builder is None or not getattr(builder.options, "sanitize_overflow", False):
        yield
        return
    usual = builder.options
    builder.options = dataclasses.replace(usual, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = usual


@pytest.fixture(scope="module")
def kernels_without_overflow_checks():
    """For tests of whole models, whose kernels tests/kernels runs with every check."""
    with without_overflow_checks():
        yield
