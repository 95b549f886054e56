"""The hot loops of Hopper's kernels, read from their machine code, and the rules that they keep.

    python -m ptv2_fast.kernels.hot_loops --out kernels/hot_loops.json

A row for each innermost loop with tensor-core instructions of what 16-bit calls launch at d = 64 and 128, and of
attention as a textbook has it with the same tiles (`plain_loops.py`), by which they are measured. Rows whose code is
unchanged are kept, as in `aot.py`. A loop that needs more instructions or has fewer blocks a multiprocessor
than the kept one has to be accepted (`--accept-worse`). Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import triton

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.aot import MOST_SPILLS_IN_LOOPS, Case, record_case
from ptv2_fast.kernels.aot_compile import (
    compiled_launch,
    cuobjdump,
    fingerprint,
    kernel_name,
    resource_usage,
    tile_of,
)
from ptv2_fast.kernels.machine_code import Loop, innermost_loops
from ptv2_fast.kernels.plain_loops import plain_launch

ARCH = 90
FEATURES = ("plain", "causal", "padded", "packed")
SHORT_PROMPTS = ("P20", "packed P20")


class Work(NamedTuple):
    """What a round of a kernel's loops computes.

    Attributes:
        products: products of its tile.
        tiles: the sides of the tiles that its loops walk over, by their names: that of the sums' rows, and the other.
    """

    products: int
    tiles: tuple[tuple[str, str], ...]


WORK = {
    "prompt_attention_forward": Work(2, (("M", "P"), ("M", "N"))),
    "prompt_attention_backward_query": Work(3, (("M", "P"), ("M", "N"))),
    "prompt_attention_backward_text": Work(4, (("N", "M"),)),
    "prompt_attention_backward_prompt": Work(4, (("P", "M"),)),
    "prompt_attention_decode": Work(2, (("SHARED", "P"), ("OWN", "N"))),
    "plain_forward": Work(2, (("M", "N"),)),
    "plain_query_gradient": Work(3, (("M", "N"),)),
    "plain_key_gradients": Work(4, (("N", "M"),)),
}
# A group of four warps multiplies at least so many rows at once.
GROUP_ROWS = 64
# A multiprocessor of Hopper (CUDA C++ Programming Guide, compute capability 9.0): registers, given in eights to each
# thread; bytes of shared memory, of which each block's runtime takes a kilobyte; threads.
_REGISTERS, _SHARED, _RESERVED, _THREADS = 65536, 228 * 1024, 1024, 2048
# So many registers above a step that would make room for another block are an accident.
NEAR_A_STEP = 2
# How much longer a loop may get before it has to be accepted.
_TOLERANCE = 1.03
# Of the instructions that a plain loop has for the same work and ours has, the least share that the leanest loop of a
# kernel has to keep.
LEAST_OF_PLAIN = {"forward": 0.93, "backward_query": 0.9, "backward_text": 0.84, "backward_prompt": 0.79}
# What a quarter of a multiprocessor does in a cycle: one instruction of a warp; special functions (exponentials) of so
# many threads (CUDA C++ Programming Guide, throughput of arithmetic instructions); multiplications and additions of its
# tensor core in 16 bits (989 TFLOP/s of an H100 SXM, 132 multiprocessors, 1.83 GHz).
_SPECIAL_LANES, _TENSOR_FLOPS = 4, 1024
MARK = "<!-- hot loops -->"


@dataclass(frozen=True)
class Report:
    """One loop of one kernel.

    Attributes:
        kernel, dtype, head_dim, features, tile, num_warps, num_stages, maxnreg: what is launched; features of a plain
            kernel: whose tile it has.
        source: digest of what decides the code (`aot_compile.fingerprint`).
        loop: its place among the kernel's loops with tensor-core instructions.
        useful_flops, executed_flops: of one round: what the tile asks for, what the tensor cores do.
        group_products, warp_products: instructions of wgmma and of mma.sync.
        products, arrivals: products of the tile; how often a group of warps hands registers to the tensor cores.
        instructions: in a round, of one warp; `special`: those of them that are special functions.
        spills, wide_loads, barriers: instructions that touch spilled registers, that load a tile without a copy ahead,
            that join the block.
        registers, blocks: of a thread; blocks on a multiprocessor.
        above_step: registers that are too many for one block more; 0 where registers do not decide.
    """

    kernel: str
    dtype: str
    head_dim: int
    features: str
    tile: str
    num_warps: int
    num_stages: int
    maxnreg: int | None
    source: str
    loop: int
    useful_flops: int
    executed_flops: int
    group_products: int
    warp_products: int
    products: int
    arrivals: int
    instructions: int
    special: int
    spills: int
    wide_loads: int
    barriers: int
    registers: int
    blocks: int
    above_step: int

    @property
    def name(self) -> str:
        """The loop in words."""
        return f"{self.kernel} d={self.head_dim} {self.dtype} {self.features} loop {self.loop}"

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What two tables are compared by: whatever the tile is, it is the same work."""
        return self.kernel, self.dtype, self.head_dim, self.features, self.loop

    @property
    def is_plain(self) -> bool:
        """Whether it is a loop that others are measured by."""
        return self.kernel.startswith("plain_")

    @property
    def per_useful(self) -> float:
        """Instructions of all warps for 100,000 useful operations."""
        return 1e5 * self.instructions * self.num_warps / self.useful_flops

    @property
    def ceiling(self) -> float:
        """The most of its time that a tensor core can be busy with useful work, were nothing ever waited for."""
        useful = self.useful_flops / self.num_warps / _TENSOR_FLOPS
        done = self.executed_flops / self.num_warps / _TENSOR_FLOPS
        return useful / max(done, self.instructions, self.special * 32 / _SPECIAL_LANES)


@dataclass(frozen=True)
class Subject:
    """A launch whose loops are looked at, by the names that a report has for it."""

    kernel: str
    dtype: str
    head_dim: int
    features: str
    recorded: launch.Launch

    @property
    def names(self) -> dict[str, str | int]:
        """All of what a report says of a launch that its code does not decide."""
        return {
            "kernel": self.kernel, "dtype": self.dtype, "head_dim": self.head_dim, "features": self.features,
            "tile": tile_of(self.recorded),
        }  # fmt: skip

    @property
    def source(self) -> str:
        """Digest of what decides the code."""
        return fingerprint(self.recorded)


def cases() -> list[Case]:
    """What is looked at: 16-bit calls as models make them."""
    usual = [
        Case(ARCH, dtype, head_dim, features)
        for dtype in ("bf16", "fp16") for head_dim in (64, 128) for features in FEATURES
    ]  # fmt: skip
    return usual + [Case(ARCH, "bf16", 64, features) for features in SHORT_PROMPTS]


def subjects() -> list[Subject]:
    """The launches of the cases that have hot loops, and the plain forms of those that have one, each once."""
    ours = [
        Subject(kernel_name(recorded), case.dtype, case.head_dim, case.features, recorded)
        for case in cases() for recorded in record_case(case) if kernel_name(recorded) in WORK
    ]  # fmt: skip
    plain: dict[tuple[str, str], Subject] = {}
    for one in ours:
        recorded = plain_launch(one.kernel, one.recorded)
        if recorded is not None:
            features = f"{_short(one.kernel)} {tile_of(recorded)}"
            subject = Subject(kernel_name(recorded), one.dtype, one.head_dim, features, recorded)
            plain.setdefault((subject.source, features), subject)
    return [*ours, *plain.values()]


def reports_of(subject: Subject) -> list[Report]:
    """Compile a launch and look at its loops."""
    arguments = subject.recorded.arguments
    compiled = compiled_launch(subject.recorded, ARCH)
    cubin = compiled.asm["cubin"]
    registers, _ = resource_usage(cubin)
    loops = [loop for loop in innermost_loops(cuobjdump(cubin, "-sass")) if loop.group_products + loop.warp_products]
    num_warps = arguments["num_warps"]
    blocks = blocks_of(registers, 32 * num_warps, compiled.metadata.shared)
    above = registers_above_step(registers, 32 * num_warps, compiled.metadata.shared)
    return [
        Report(
            **subject.names, num_warps=num_warps, num_stages=arguments["num_stages"],
            maxnreg=arguments.get("maxnreg"), source=subject.source, loop=place,
            useful_flops=_useful(subject, loop), executed_flops=loop.flops(num_warps),
            group_products=loop.group_products, warp_products=loop.warp_products,
            products=WORK[subject.kernel].products, arrivals=loop.count(r"WARPGROUP\.ARRIVE"),
            instructions=len(loop.instructions), special=loop.count("MUFU"), spills=loop.local_memory,
            wide_loads=loop.wide_loads, barriers=loop.count("BAR"), registers=registers, blocks=blocks,
            above_step=above,
        )
        for place, loop in enumerate(loops)
    ]  # fmt: skip


def _useful(subject: Subject, loop: Loop) -> int:
    """Operations that a round asks for; of the tiles that a kernel walks over, of the one that explains the loop."""
    sizes, work = subject.recorded.arguments, WORK[subject.kernel]
    asked = [
        2 * work.products * sizes[f"BLOCK_{rows}"] * sizes[f"BLOCK_{others}"] * sizes["BLOCK_D"]
        for rows, others in work.tiles
    ]
    executed = loop.flops(sizes["num_warps"])
    return min(asked, key=lambda useful: abs(executed / useful - 1))


def blocks_of(registers: int, threads: int, shared: int) -> int:
    """How many blocks share a multiprocessor."""
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, _SHARED // (shared + _RESERVED), _THREADS // threads)


def registers_above_step(registers: int, threads: int, shared: int) -> int:
    """How many registers less would make room for another block; 0 where something else decides."""
    blocks = blocks_of(registers, threads, shared)
    room = min(_SHARED // (shared + _RESERVED), _THREADS // threads)
    step = _REGISTERS // (threads * (blocks + 1)) // 8 * 8
    return registers - step if blocks < room else 0


def problems(report: Report) -> list[str]:
    """Which rules a loop breaks, in words."""
    found = []
    sides = dict(re.findall(r"([A-Z]+)(\d+)", report.tile))
    size = min(int(sides[rows]) for rows, _ in WORK[report.kernel].tiles)
    if report.executed_flops != report.useful_flops:
        found.append(f"{report.executed_flops} operations are done where {report.useful_flops} are useful")
    if report.warp_products and size >= GROUP_ROWS:
        found.append(f"{report.warp_products} products of single warps, though the sums have {size} rows")
    if report.group_products and report.arrivals != report.products:
        found.append(f"{report.products} products are handed over {report.arrivals} times: they wait for each other")
    if report.spills > MOST_SPILLS_IN_LOOPS:
        found.append(f"{report.spills} instructions touch spilled registers")
    if report.wide_loads and report.num_stages > 1:
        found.append(f"{report.wide_loads} loads of a tile are waited for")
    if 0 < report.above_step <= NEAR_A_STEP and report.maxnreg is None:
        found.append(f"{report.above_step} registers fewer would make room for another block, and maxnreg is not set")
    return [f"{report.name}: {text}" for text in found]


def worse(new: Iterable[Report], kept: Iterable[Report]) -> list[str]:
    """Where loops got longer or blocks fewer than in the kept table, in words."""
    before = {report.key: report for report in kept}
    found = []
    for report in new:
        old = before.get(report.key)
        if old is None:
            continue
        if report.blocks < old.blocks:
            found.append(f"{report.name}: {report.blocks} blocks a multiprocessor, {old.blocks} before")
        if report.per_useful > _TOLERANCE * old.per_useful:
            found.append(
                f"{report.name}: {report.per_useful:.0f} instructions for 100,000 useful operations, "
                f"{old.per_useful:.0f} before"
            )
    return found


def read_table(path: Path) -> tuple[str, list[Report]]:
    """(the Triton that compiled the table, its reports)."""
    table = json.loads(path.read_text())
    return table["triton"], [Report(**dict(zip(table["columns"], row, strict=True))) for row in table["rows"]]


def write_table(path: Path, reports: Sequence[Report]) -> None:
    """One line a loop, and their digest into the README beside the table if there is one."""
    lines = ",\n".join(json.dumps(astuple(report)) for report in reports)
    columns = json.dumps([field.name for field in fields(Report)])
    path.write_text(f'{{"triton": "{triton.__version__}",\n"columns": {columns},\n"rows": [\n{lines}\n]}}\n')
    readme = path.with_name("README.md")
    if readme.exists():
        before, _, rest = readme.read_text().partition(MARK)
        _, _, after = rest.partition(MARK)
        readme.write_text(f"{before}{MARK}\n{digest(reports)}\n{MARK}{after}")


def digest(reports: Sequence[Report]) -> str:
    """The kernels in bf16 as markdown, with their shortest and their longest loop: that one checks visibility."""
    head = [
        "kernel", "d", "features", "tile", "warps, stages", "registers", "blocks", "products", "instructions, 100k",
        "of plain", "ceiling",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "--|" * len(head)]
    chosen: dict[tuple, list[Report]] = {}
    for report in reports:
        if report.dtype == "bf16" and not report.is_plain:
            chosen.setdefault((report.kernel, report.head_dim, report.features), []).append(report)
    for (kernel, head_dim, features), group in sorted(chosen.items()):
        kind = "wgmma" if all(report.group_products for report in group) else "mma.sync"
        slots = f"{min(r.per_useful for r in group):.0f} – {max(r.per_useful for r in group):.0f}"
        best = min(group, key=lambda r: r.per_useful)
        plain = of_plain(best, reports)
        lines.append(
            f"| {_short(kernel)} | {head_dim} | {features} | {best.tile} | {best.num_warps}, {best.num_stages} | "
            f"{best.registers} | {best.blocks} | {kind} | {slots} | {'' if plain is None else f'{plain:.2f}'} | "
            f"{best.ceiling:.2f} |"
        )
    return "\n".join(lines)


def of_plain(report: Report, reports: Iterable[Report]) -> float | None:
    """Instructions of a plain loop with the same tile over those of a loop of ours; None where there is none."""
    sides = dict(re.findall(r"([A-Z]+)(\d+)", report.tile))
    keys = "P" if report.kernel == "prompt_attention_backward_prompt" else "N"
    wanted = f"{_short(report.kernel)} M{sides.get('M')} N{sides.get(keys)}"
    for other in reports:
        alike = (other.dtype, other.head_dim, other.num_warps) == (report.dtype, report.head_dim, report.num_warps)
        if other.is_plain and alike and other.features == wanted:
            return other.per_useful / report.per_useful
    return None


def costly(reports: Sequence[Report]) -> list[str]:
    """Which kernels' leanest loops are further from the plain ones than `LEAST_OF_PLAIN`, in words."""
    best: dict[tuple[str, str, int, str], Report] = {}
    for report in reports:
        if _short(report.kernel) in LEAST_OF_PLAIN:
            kept = best.setdefault(report.key[:4], report)
            if report.per_useful < kept.per_useful:
                best[report.key[:4]] = report
    found = []
    for report in best.values():
        share, least = of_plain(report, reports), LEAST_OF_PLAIN[_short(report.kernel)]
        if share is not None and share < least:
            found.append(f"{_short(report.kernel)} {report.name}: {share:.2f} of the plain kernel's, not {least}")
    return found


def _short(kernel: str) -> str:
    return kernel.removeprefix("prompt_attention_")


def main(words: Sequence[str] | None = None) -> int:
    """Compile what is missing, write the table; 1 if a loop breaks a rule or got worse without being accepted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table to bring up to date")
    parser.add_argument("--accept-worse", action="store_true", help="write loops that are worse than the kept ones")
    chosen = parser.parse_args(words)
    kept: list[Report] = []
    if chosen.out.exists():
        version, kept = read_table(chosen.out)
    # Features that make no difference to a kernel share its code.
    known: dict[str, dict[int, Report]] = {}
    for report in kept if kept and version == triton.__version__ else ():
        known.setdefault(report.source, {})[report.loop] = report
    found = []
    for subject in subjects():
        if subject.source not in known:
            known[subject.source] = {report.loop: report for report in reports_of(subject)}
        found += [Report(**{**asdict(report), **subject.names}) for report in known[subject.source].values()]
    wrong = [text for report in found for text in problems(report)] + costly(found)
    declined = [] if chosen.accept_worse else worse(found, kept)
    print(*wrong, *declined, sep="\n")
    if not declined:
        write_table(chosen.out, found)
    return 1 if wrong or declined else 0


if __name__ == "__main__":
    raise SystemExit(main())
