"""Triton's interpreter without what it does over and over; results are the same."""

from __future__ import annotations

import dataclasses
import functools
import inspect

_NEEDED = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "GridExecutor")


def install() -> None:
    """Let the interpreter replace the functions of triton.language once a launch, not once a call.

    It does so for each @jit function that a kernel calls, which takes half of its time: it looks at all members of the
    language again and finds them replaced. It also makes a table of all dtypes to look one up, and describes the shape
    of every tensor anew. A version of Triton that does this otherwise is left alone.

    And it computes whether integers overflow, in 64 bits, to assert that they do not: without debugging, which the
    interpreter does not switch on, `device_assert` forgets what was computed.
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

    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    _describe_shapes_once(tl.core)
    interpreter._get_np_dtype = numpy_dtype_once
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def _describe_shapes_once(core) -> None:
    """A tensor's shape is told in tuples of constants, made anew for every tensor of a few shapes."""
    block = core.block_type(core.float32, [2])
    if (vars(block).keys(), vars(core.tensor(None, block)).keys()) != (
        {"element_ty", "shape", "numel", "name"},
        {"handle", "shape", "numel", "type", "dtype"},
    ):
        return
    describe_block, describe_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple, dict] = {}
    tensors: dict[tuple, dict] = {}

    def block_once(self, element_ty, shape):
        numbers = tuple(getattr(size, "value", size) for size in shape)
        key = (numbers, str(element_ty))
        if key not in blocks:
            describe_block(self, element_ty, shape)
            blocks[key] = {"shape": self.shape, "numel": self.numel, "name": self.name}
        self.__dict__.update(blocks[key], element_ty=element_ty)

    def tensor_once(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            describe_tensor(self, handle, type)
            tensors[key] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = block_once, tensor_once
