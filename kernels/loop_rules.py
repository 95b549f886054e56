"""What is told of a hot loop (`hot_loops.py`), and the rules that hold for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ptv2_fast.kernels.aot import MOST_SPILLS_IN_LOOPS


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
    "prompt_attention_backward_rows": Work(5, (("M", "N"),)),
    "prompt_attention_decode": Work(2, (("SHARED", "P"), ("OWN", "N"))),
    "plain_forward": Work(2, (("M", "N"),)),
    "plain_query_gradient": Work(3, (("M", "N"),)),
    "plain_key_gradients": Work(4, (("N", "M"),)),
}
# A group of four warps multiplies at least so many rows at once.
GROUP_ROWS = 64


class Card(NamedTuple):
    """What blocks share on a multiprocessor, and how fast it multiplies.

    Attributes:
        shared: bytes of shared memory, of which each block's runtime takes a kilobyte.
        columns: of tensor memory; 0 without any.
        tensor_flops: multiplications and additions in 16 bits of a quarter's tensor core in a cycle.
    """

    shared: int
    columns: int
    tensor_flops: int


# CUDA C++ Programming Guide, compute capabilities 8.0, 9.0 and 10.0; PTX ISA, tensor memory. Products: what NVIDIA says
# of an A100 (312 TFLOP/s, 108 multiprocessors, 1.41 GHz), an H100 SXM (989, 132, 1.83) and a B200 (2250, 148, 1.85).
CARDS = {80: Card(164 * 1024, 0, 512), 90: Card(228 * 1024, 0, 1024), 100: Card(228 * 1024, 512, 2048)}
# The same on all: registers of a multiprocessor, given in eights to each thread; threads.
_REGISTERS, _RESERVED, _THREADS = 65536, 1024, 2048
# Where products belong to more than one warp: on Ampere each warp has its own.
_GROUPS = (90, 100)
# Where a byte of a mask decides whether a key is loaded, Triton takes the key for as narrow when it lays out the
# operands of mma.sync: dQ's two products of a key then want it in two layouts, and it is not copied ahead.
_WAITS = ((80, "prompt_attention_backward_query", "padded"),)
# So many registers above a step that would make room for another block are an accident.
NEAR_A_STEP = 2
# How much longer a loop may get before it has to be accepted.
_TOLERANCE = 1.03
# Of the instructions that a plain loop has for the same work and ours has, the least share that the leanest loop of a
# kernel has to keep.
LEAST_OF_PLAIN = {"forward": 0.97, "backward_query": 0.95, "backward_text": 0.94, "backward_prompt": 0.9}
# What a quarter of a multiprocessor does in a cycle besides: one instruction of a warp; special functions
# (exponentials) of so many threads (CUDA C++ Programming Guide, throughput of arithmetic instructions).
_SPECIAL_LANES = 4


@dataclass(frozen=True)
class Report:
    """One loop of one kernel.

    Attributes:
        kernel, dtype, head_dim, features, tile, num_warps, num_stages, maxnreg: what is launched; features of a plain
            kernel: whose tile it has.
        source: digest of what decides the code (`aot_compile.fingerprint`).
        loop: its place among the kernel's loops with tensor-core instructions.
        useful_flops, executed_flops: of one round: what the tile asks for, what the tensor cores do (None where the
            code does not say it).
        group_products, warp_products: instructions of wgmma or tcgen05, and of mma.sync.
        products, arrivals: products of the tile; how often a group of warps hands registers to the tensor cores, or a
            block waits for them.
        instructions: in a round, of one warp; `special`: those of them that are special functions.
        spills, wide_loads, barriers: instructions that touch spilled registers, that load a tile without a copy ahead,
            that join the block.
        registers, blocks: of a thread; blocks on a multiprocessor.
        above_step: registers that are too many for one block more; 0 where registers do not decide.
        arch: the card, compute capability times ten.
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
    executed_flops: int | None
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
    arch: int = 90

    @property
    def name(self) -> str:
        """The loop in words."""
        return f"{self.kernel} sm_{self.arch} d={self.head_dim} {self.dtype} {self.features} loop {self.loop}"

    @property
    def key(self) -> tuple[int, str, str, int, str, int]:
        """What two tables are compared by: whatever the tile is, it is the same work."""
        return self.arch, self.kernel, self.dtype, self.head_dim, self.features, self.loop

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
        of_warp = 1 / self.num_warps / CARDS[self.arch].tensor_flops
        useful = self.useful_flops * of_warp
        done = (self.executed_flops or self.useful_flops) * of_warp
        return useful / max(done, self.instructions, self.special * 32 / _SPECIAL_LANES)


def _room(arch: int, threads: int, shared: int, columns: int) -> int:
    """How many blocks share a multiprocessor, whatever registers they have."""
    card = CARDS[arch]
    by_columns = card.columns // columns if columns else _THREADS
    return min(card.shared // (shared + _RESERVED), _THREADS // threads, by_columns)


def blocks_of(registers: int, threads: int, shared: int, arch: int = 90, columns: int = 0) -> int:
    """How many blocks share a multiprocessor; columns: of tensor memory that each takes."""
    return min(_REGISTERS // (-(-registers // 8) * 8 * threads), _room(arch, threads, shared, columns))


def registers_above_step(registers: int, threads: int, shared: int, arch: int = 90, columns: int = 0) -> int:
    """How many registers less would make room for another block; 0 where something else decides."""
    blocks = blocks_of(registers, threads, shared, arch, columns)
    room = _room(arch, threads, shared, columns)
    step = _REGISTERS // (threads * (blocks + 1)) // 8 * 8
    return registers - step if blocks < room else 0


def problems(report: Report) -> list[str]:
    """Which rules a loop breaks, in words."""
    found = []
    sides = dict(re.findall(r"([A-Z]+)(\d+)", report.tile))
    size = min(int(sides[rows]) for rows, _ in WORK[report.kernel].tiles)
    if report.executed_flops not in (None, report.useful_flops):
        found.append(f"{report.executed_flops} operations are done where {report.useful_flops} are useful")
    if report.warp_products and size >= GROUP_ROWS and report.arch in _GROUPS:
        found.append(f"{report.warp_products} products of single warps, though the sums have {size} rows")
    if report.group_products and report.arrivals != report.products:
        found.append(f"{report.products} products are handed over {report.arrivals} times: they wait for each other")
    if report.spills > MOST_SPILLS_IN_LOOPS:
        found.append(f"{report.spills} instructions touch spilled registers")
    if report.wide_loads and report.num_stages > 1 and (report.arch, report.kernel, report.features) not in _WAITS:
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


def of_plain(report: Report, reports: Iterable[Report]) -> float | None:
    """Instructions of a plain loop with the same tile over those of a loop of ours; None where there is none."""
    sides = dict(re.findall(r"([A-Z]+)(\d+)", report.tile))
    keys = "P" if report.kernel == "prompt_attention_backward_prompt" else "N"
    wanted = f"{short_name(report.kernel)} M{sides.get('M')} N{sides.get(keys)}"
    for other in reports:
        alike = all(getattr(other, x) == getattr(report, x) for x in ("arch", "dtype", "head_dim", "num_warps"))
        if other.is_plain and alike and other.features == wanted:
            return other.per_useful / report.per_useful
    return None


def costly(reports: Sequence[Report]) -> list[str]:
    """Which kernels' leanest loops are further from the plain ones than `LEAST_OF_PLAIN`, in words."""
    best: dict[tuple[int, str, str, int, str], Report] = {}
    for report in reports:
        if short_name(report.kernel) in LEAST_OF_PLAIN:
            kept = best.setdefault(report.key[:-1], report)
            if report.per_useful < kept.per_useful:
                best[report.key[:-1]] = report
    found = []
    for report in best.values():
        share, least = of_plain(report, reports), LEAST_OF_PLAIN[short_name(report.kernel)]
        if share is not None and share < least:
            found.append(f"{short_name(report.kernel)} {report.name}: {share:.2f} of the plain kernel's, not {least}")
    return found


def short_name(kernel: str) -> str:
    """A kernel's name without what all have."""
    return kernel.removeprefix("prompt_attention_")
