"""Compile every kernel ahead of time, with no GPU: registers, spills, shared memory, tensor-core instructions.

    python -m ptv2_fast.kernels.aot --out kernels/aot_table.json

The kernels and their arguments are recorded from the host functions (`launch.record`), so what is compiled is what
would be launched. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward
from ptv2_fast.kernels.prompt_projection import prompt_projection
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptv2_fast.kernels import launch

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What models combine: encoders pad on the right and drop out, decoders are causal, share key/value heads, slide.
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "packed": {"packed": True},
    "causal": {"causal": True, "group": 4},
    "mask+dropout": {"key_mask": True, "dropout_p": 0.1},
    "causal+window+softcap": {"causal": True, "group": 2, "window": 512, "softcap": 50.0},
    "bank+biases": {"bank": True, "bias": True, "prompt_bias": True},
}
DIGEST_MARK = "<!-- digest -->"
_OPTIONS = ("num_warps", "num_stages")
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
# Ampere's, Hopper's and Blackwell's; the older form remains right for tiles too small for the newer.
_TENSOR_CORE = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"


@dataclass(frozen=True)
class Case:
    """One kernel, one way of calling it, one card."""

    arch: int
    dtype: str
    head_dim: int
    features: str


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    features: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin_bytes: int
    tensor_core_instructions: int
    wgmma_instructions: int


def record_case(case: Case) -> list[launch.Launch]:
    """The launches of a forward and a full backward for the case, on stand-in tensors."""
    options = FEATURES[case.features]
    dtype, device = DTYPES[case.dtype], torch.device("cpu")
    rows, kv_heads, tokens, prompt_length = 4, 2, 256, 64
    heads = kv_heads * int(options.get("group", 1))
    entries = 3 if options.get("bank") else 1
    packed = bool(options.get("packed"))

    def tensor(count: int) -> torch.Tensor:
        shape = (rows * tokens, count, case.head_dim) if packed else (rows, tokens, count, case.head_dim)
        made = torch.zeros(shape, dtype=dtype, device=device)
        return made if packed else made.transpose(1, 2)

    q, k, v = tensor(heads), tensor(kv_heads), tensor(kv_heads)
    prompt_k, prompt_v = (torch.zeros(entries, kv_heads, prompt_length, case.head_dim, dtype=dtype) for _ in range(2))
    arguments = {
        "causal": bool(options.get("causal")), "window": options.get("window"), "softcap": options.get("softcap"),
        "dropout_p": options.get("dropout_p", 0.0), "seed": torch.zeros(1, dtype=torch.int64),
        "key_mask": torch.ones(rows, tokens, dtype=torch.int64) if options.get("key_mask") else None,
        "cu_seqlens": torch.arange(rows + 1, dtype=torch.int32) * tokens if packed else None,
        "max_seqlen": tokens if packed else None,
        "prompt_index": torch.zeros(rows, dtype=torch.int64) if entries > 1 else None,
        "prompt_lens": torch.full((entries,), prompt_length, dtype=torch.int32) if entries > 1 else None,
        "prompt_bias": torch.zeros(entries, heads, prompt_length) if options.get("prompt_bias") else None,
        "bias": torch.zeros(1, heads, tokens, tokens, dtype=dtype) if options.get("bias") else None,
    }  # fmt: skip
    with launch.record(case.arch) as launches:
        output, lse = prompt_attention_forward(q, k, v, prompt_k, prompt_v, **arguments)
        needs = Needs(query=True, text=True, prompt=True, prompt_bias=bool(options.get("prompt_bias")))
        prompt_attention_backward(output, q, k, v, prompt_k, prompt_v, output, lse, needs=needs, **arguments)
        if not packed and not arguments["dropout_p"]:
            prompt_attention_decode(q[:, :, :1], k, v, prompt_k, prompt_v, **arguments | {"bias": None})
        weights = [torch.zeros(2 * kv_heads * case.head_dim, 1024, dtype=dtype) for _ in range(2)]
        x = torch.zeros(2, prompt_length, 1024, dtype=dtype, requires_grad=True)
        y = prompt_projection(x, weights)
        y.backward(torch.zeros_like(y))
    return launches


def signature(kernel, arguments: dict[str, object]) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) of ASTSource for a recorded launch, specialised as a real launch would be."""
    types, constants, attributes = {}, {}, {}

    def describe(value, path: tuple[int, ...], specialize: bool):
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, place), specialize) for place, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            # The caching allocator aligns every tensor to 16 bytes and more.
            attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
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


def compile_launch(recorded: launch.Launch, case: Case) -> Report:
    """Compile one recorded launch for the case's card and read what came out."""
    arguments = dict(recorded.arguments)
    options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
    types, constants, attributes = signature(recorded.kernel, arguments)
    source = ASTSource(recorded.kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return Report(
        kernel=kernel_name(recorded), **asdict(case), tile=tile_of(recorded),
        num_warps=options.get("num_warps", 4), num_stages=options.get("num_stages", 3), registers=registers,
        spill_bytes=stack, shared_bytes=compiled.metadata.shared, cubin_bytes=len(compiled.asm["cubin"]),
        tensor_core_instructions=len(re.findall(_TENSOR_CORE, compiled.asm["ptx"])),
        wgmma_instructions=compiled.asm["ptx"].count("wgmma.mma_async"),
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread). These kernels keep no arrays, so stack means spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def kernel_name(recorded: launch.Launch) -> str:
    """The kernel's name in the table."""
    return recorded.kernel.__name__.strip("_").removesuffix("_kernel")


def tile_of(recorded: launch.Launch) -> str:
    """The tile sizes of a launch in words."""
    sizes = (name for name in recorded.arguments if name.startswith("BLOCK_") and name != "BLOCK_D")
    return " ".join(f"{name[6:]}{recorded.arguments[name]}" for name in sizes)


def compile_case(case: Case, only: Sequence[str] = ()) -> list[Report]:
    """Reports of every kernel that the case launches, or of those named."""
    launches = [recorded for recorded in record_case(case) if not only or kernel_name(recorded) in only]
    return [compile_launch(recorded, case) for recorded in launches]


def problems(report: Report) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty when nothing is."""
    found = []
    name = f"{report.kernel} sm_{report.arch} {report.dtype} d={report.head_dim} {report.features}"
    if report.cubin_bytes == 0:
        found.append(f"{name}: no cubin")
    if report.spill_bytes:
        found.append(f"{name}: spills {report.spill_bytes} bytes a thread")
    if report.shared_bytes > launch.shared_memory_limit(report.arch):
        found.append(f"{name}: {report.shared_bytes} bytes of shared memory, the card has less")
    multiplies = report.kernel not in ("prompt_attention_delta", "sum_slots", "merge_chunks")
    if multiplies and report.dtype != "fp32" and report.tensor_core_instructions == 0:
        found.append(f"{name}: no tensor-core instruction")
    return found


def all_cases() -> list[Case]:
    """The table's cases: dtypes and head sizes plain, and each feature set in bf16. fp16 compiles as bf16 does."""
    plain = [
        Case(arch, dtype, head_dim, "plain")
        for arch in ARCHITECTURES
        for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 64), ("fp32", 64), ("fp32", 128))
    ]
    featured = [
        Case(arch, "bf16", head_dim, features)
        for arch, head_dim, features in itertools.product(ARCHITECTURES, (64, 128), FEATURES)
        if features != "plain"
    ]
    return plain + featured


def render(reports: list[Report]) -> str:
    """The reports as a markdown table."""
    lines = [
        "| kernel | sm | dtype | d | features | tile | warps | stages | registers | spilled | shared | tensor-core |",
        "|--|--|--|--|--|--|--|--|--|--|--|--|",
    ]
    for r in reports:
        lines.append(
            f"| {r.kernel} | {r.arch} | {r.dtype} | {r.head_dim} | {r.features} | {r.tile} | {r.num_warps} | "
            f"{r.num_stages} | {r.registers} | {r.spill_bytes} | {r.shared_bytes} | {r.tensor_core_instructions} |"
        )
    return "\n".join(lines)


def digest(reports: Sequence[Report]) -> str:
    """The worst of each kernel, card, dtype and head size over the feature sets, as a markdown table."""
    groups: dict[tuple, list[Report]] = {}
    for r in reports:
        groups.setdefault((r.kernel, r.head_dim, r.dtype, r.arch), []).append(r)
    lines = [
        "| kernel | d | dtype | sm | registers | spilled | shared memory | tensor-core instructions |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for (kernel, head_dim, dtype, arch), group in sorted(groups.items()):
        registers, spilled, shared = (
            max(getattr(r, name) for r in group) for name in ("registers", "spill_bytes", "shared_bytes"))
        fewest = min(r.tensor_core_instructions for r in group)
        lines.append(f"| {kernel} | {head_dim} | {dtype} | {arch} | {registers} | {spilled} | {shared} | {fewest} |")
    return "\n".join(lines)


def write_digest(reports: Sequence[Report], readme: Path) -> None:
    """Replace what follows the digest mark in the readme."""
    text, mark, _ = readme.read_text().partition(DIGEST_MARK)
    readme.write_text(f"{text}{mark}\n{digest(reports)}\n")


def main() -> int:
    """Compile all cases, write the table, and return 1 if any kernel breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the reports here, their digest into the README beside")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", type=int, nargs="*")
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES))
    parser.add_argument("--features", nargs="*", default=list(FEATURES))
    parser.add_argument("--kernel", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    cases = [
        case for case in all_cases()
        if case.arch in chosen.arch and case.dtype in chosen.dtype and case.features in chosen.features
        and (not chosen.head_dim or case.head_dim in chosen.head_dim)
    ]  # fmt: skip
    with ProcessPoolExecutor(chosen.jobs) as pool:
        compiled = pool.map(partial(compile_case, only=chosen.kernel), cases)
        reports = [report for several in compiled for report in several]
    if chosen.out:
        table = {"triton": triton.__version__, "reports": [asdict(report) for report in reports]}
        chosen.out.write_text(json.dumps(table, indent=1) + "\n")
        readme = chosen.out.with_name("README.md")
        if readme.exists():
            write_digest(reports, readme)
    print(render(reports))
    wrong = [text for report in reports for text in problems(report)]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
