"""One recorded launch compiled with no GPU: what it is, whether it changed, and what the compiler made of it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import re
import subprocess
import tempfile
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.arguments import Switches
from ptv2_fast.kernels.machine_code import local_memory_in_loops

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
# Ampere's, Hopper's and Blackwell's; the older form remains right for tiles too small for the newer.
_TENSOR_CORE = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"
# Tokens that do not change what is compiled; a docstring is a string that stands alone, and ours have three quotes.
_SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)


def target_of(arch: int) -> GPUTarget:
    """The compiler's name of a card, named as `launch.choose_config` does."""
    return GPUTarget("hip", "gfx942", 64) if arch == launch.GFX942 else GPUTarget("cuda", arch, 32)


def card_name(arch: int) -> str:
    """The card's name in the tables."""
    return "gfx942" if arch == launch.GFX942 else f"sm_{arch}"


def kernel_name(recorded: launch.Launch) -> str:
    """The kernel's name in the table."""
    return recorded.kernel.__name__.strip("_").removesuffix("_kernel")


def tile_of(recorded: launch.Launch) -> str:
    """The tile sizes of a launch in words."""
    sizes = (name for name in recorded.arguments if name.startswith("BLOCK_") and name != "BLOCK_D")
    return " ".join(f"{name[6:]}{recorded.arguments[name]}" for name in sizes)


def fingerprint(recorded: launch.Launch) -> str:
    """A digest of everything of ours that decides the compiled code: kernel, helpers, and kinds of arguments.

    The same with and without the interpreter, and blind to comments, docstrings and line breaks.
    """
    sizes = _unspecialized(recorded.kernel)
    arguments = sorted((name, _kind(name, value, name not in sizes)) for name, value in recorded.arguments.items())
    text = repr((_source(recorded.kernel), arguments))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unspecialized(kernel: Any) -> set[str]:
    """The arguments that are compiled for any value; an interpreted kernel knows them by another name."""
    if hasattr(kernel, "params"):
        return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return set(kernel.kwargs["do_not_specialize"] or ())


def _kind(name: str, value: object, specialize: bool) -> str:
    """What the compiler may know of an argument; compile-time ones have upper-case names."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, Switches):
        return str(value)
    if isinstance(value, tuple):
        # Fields are specialised one by one, whatever is said of the whole.
        return repr([_kind(name, item, True) for item in value])
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and not name.isupper() and name not in OPTIONS:
        known = f" one={value == 1} even={value % 16 == 0}" if specialize else ""
        return f"int{known} long={not -(2**31) <= value < 2**31}"
    return str(value)


@functools.cache
def _source(kernel: Any) -> str:
    """The tokens of a kernel and of every helper and constant that it names, however far away."""
    found: dict[str, str] = {}

    def visit(function: Any) -> None:
        tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(function))).readline)
        kept = [token for token in tokens if token.type not in _SILENT and not token.string.startswith('"""')]
        key = f"{function.__module__}.{function.__name__}"
        found[key] = " ".join(token.string or tokenize.tok_name[token.type] for token in kept)
        for name in sorted({token.string for token in kept if token.type == tokenize.NAME}):
            value = function.__globals__.get(name)
            helper = getattr(value, "fn", None)
            if inspect.isfunction(helper):
                if f"{helper.__module__}.{helper.__name__}" not in found:
                    visit(helper)
            elif isinstance(value, (tl.constexpr, tuple)):
                found[f"{function.__module__}.{name}"] = repr(getattr(value, "value", value))

    visit(kernel.fn)
    return repr(sorted(found.items()))


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) of ASTSource for a recorded launch, specialised as a real launch would be."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def describe(value: Any, path: tuple[int, ...], specialize: bool) -> Any:
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, tuple):
            # Fields are specialised one by one, whatever is said of the whole.
            kinds = [describe(item, (*path, place), True) for place, item in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, torch.Tensor):
            # The caching allocator aligns every tensor to 16 bytes and more.
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if specialize and value == 1:
            constants[path] = 1
            return "constexpr"
        if specialize and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            types[parameter.name] = describe(value, (place,), not parameter.do_not_specialize)
    return types, constants, attributes


def compiled_launch(recorded: launch.Launch, arch: int) -> Any:
    """What Triton compiles of one recorded launch for a card."""
    arguments = dict(recorded.arguments)
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    types, constants, attributes = signature(recorded.kernel, arguments)
    source = ASTSource(recorded.kernel, types, constants, attributes)
    return triton.compile(source, target=target_of(arch), options=options)


def compile_launch(recorded: launch.Launch, arch: int) -> dict[str, int]:
    """Compile one recorded launch for a card and measure what came out; keys as the last fields of `aot.Report`."""
    compiled = compiled_launch(recorded, arch)
    measure = _measure_amd if arch == launch.GFX942 else _measure_nvidia
    return {"shared_bytes": compiled.metadata.shared, **measure(compiled.asm)}


def _measure_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    registers, stack = resource_usage(asm["cubin"])
    in_loops = local_memory_in_loops(cuobjdump(asm["cubin"], "-sass")) if stack else 0
    return {
        "registers": registers, "spill_bytes": stack, "spills_in_loops": in_loops, "binary_bytes": len(asm["cubin"]),
        "tensor_core_instructions": len(re.findall(_TENSOR_CORE, asm["ptx"])),
        "wgmma_instructions": asm["ptx"].count("wgmma.mma_async"),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", asm["ptx"])),
    }  # fmt: skip


def _measure_amd(asm: dict[str, Any]) -> dict[str, int]:
    def metadata(name: str) -> int:
        return int(_found(rf"\.{name}:\s*(\d+)", asm["amdgcn"]).group(1))

    spilled = metadata("private_segment_fixed_size")
    return {
        # Where AMD's code uses it is not looked at.
        "registers": metadata("vgpr_count"), "spill_bytes": spilled, "spills_in_loops": spilled,
        "binary_bytes": len(asm["hsaco"]), "tensor_core_instructions": asm["amdgcn"].count("v_mfma"),
        "wgmma_instructions": 0, "async_copies": 0,
    }  # fmt: skip


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread). These kernels keep no arrays, so stack means spilled registers."""
    registers, stack = _found(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "-res-usage")).groups()
    return int(registers), int(stack)


def cuobjdump(cubin: bytes, what: str) -> str:
    """What Triton's own copy of the tool says of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output holds no {pattern!r}")
    return found
