"""The hot loops of Hopper's kernels, read from their machine code, and the rules that they keep.

    python -m ptv2_fast.kernels.hot_loops --out kernels/hot_loops.json

A row for each innermost loop with tensor-core instructions of what 16-bit calls launch at d = 64 and 128. Rows whose
code is unchanged are kept, as in `aot.py`. A loop that needs more instructions or has fewer blocks a multiprocessor
than the kept one has to be accepted (`--accept-worse`). Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import triton

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.aot import MOST_SPILLS_IN_LOOPS, Case, Row, record_case, rows_of
from ptv2_fast.kernels.aot_compile import compiled_launch, cuobjdump, resource_usage
from ptv2_fast.kernels.machine_code import Loop, innermost_loops

ARCH = 90
FEATURES = ("plain", "causal", "padded", "packed")
SHORT_PROMPTS = ("P20", "packed P20")
# With prompts that the kernel of short rows sums itself: another prompt has a loop of its own, with three products.
ROWS = ("rows padded P20", "rows causal P20", "short rows padded P20", "short rows causal P20")
# Kernel -> how many products of its tile a round of its loop holds, and which side of the tile the sums' rows are.
PRODUCTS = {
    "prompt_attention_forward": (2, "M"), "prompt_attention_backward_query": (3, "M"),
    "prompt_attention_backward_text": (4, "N"), "prompt_attention_backward_prompt": (4, "P"),
    "prompt_attention_backward_rows": (5, "M"),
}  # fmt: skip
# A group of four warps multiplies at least so many rows at once.
GROUP_ROWS = 64
# A multiprocessor of Hopper (CUDA C++ Programming Guide, compute capability 9.0): registers, given in eights to each
# thread; bytes of shared memory, of which each block's runtime takes a kilobyte; threads.
_REGISTERS, _SHARED, _RESERVED, _THREADS = 65536, 228 * 1024, 1024, 2048
# So many registers above a step that would make room for another block are an accident.
NEAR_A_STEP = 2
# How much longer a loop may get before it has to be accepted.
_TOLERANCE = 1.03
MARK = "<!-- hot loops -->"


@dataclass(frozen=True)
class Report:
    """One loop of one kernel.

    Attributes:
        kernel, dtype, head_dim, features, tile, num_warps, num_stages, maxnreg: what is launched.
        source: digest of what decides the code (`aot_compile.fingerprint`).
        loop: its place among the kernel's loops with tensor-core instructions.
        useful_flops, executed_flops: of one round: what the tile asks for, what the tensor cores do.
        group_products, warp_products: instructions of wgmma and of mma.sync.
        products, arrivals: products of the tile; how often a group of warps hands registers to the tensor cores.
        instructions: in a round, of one warp.
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
    def per_useful(self) -> float:
        """Instructions of all warps for 100,000 useful operations."""
        return 1e5 * self.instructions * self.num_warps / self.useful_flops


def cases() -> list[Case]:
    """What is looked at: 16-bit calls as models make them."""
    usual = [
        Case(ARCH, dtype, head_dim, features)
        for dtype in ("bf16", "fp16") for head_dim in (64, 128) for features in FEATURES
    ]  # fmt: skip
    short = [Case(ARCH, "bf16", 64, features) for features in SHORT_PROMPTS]
    return usual + short + [Case(ARCH, "bf16", head_dim, features) for head_dim in (64, 128) for features in ROWS]


def rows() -> list[Row]:
    """The launches of the cases that have hot loops; of short rows those of the kernel that owns them."""
    return [
        row for row in rows_of(cases())
        if row.kernel in PRODUCTS and (row.case.features not in ROWS or row.kernel == "prompt_attention_backward_rows")
    ]  # fmt: skip


def reports_of(row: Row) -> list[Report]:
    """Compile a launch and look at its loops."""
    recorded = record_case(row.case)[row.place]
    compiled = compiled_launch(recorded, ARCH)
    cubin = compiled.asm["cubin"]
    registers, _ = resource_usage(cubin)
    loops = [loop for loop in innermost_loops(cuobjdump(cubin, "-sass")) if loop.group_products + loop.warp_products]
    threads = 32 * row.num_warps
    blocks = blocks_of(registers, threads, compiled.metadata.shared)
    above = registers_above_step(registers, threads, compiled.metadata.shared)
    products, _ = PRODUCTS[row.kernel]
    return [
        Report(
            row.kernel, row.case.dtype, row.case.head_dim, row.case.features, row.tile, row.num_warps, row.num_stages,
            recorded.arguments.get("maxnreg"), row.source, place,
            useful_flops=_useful(row, recorded, loop), executed_flops=loop.flops(row.num_warps),
            group_products=loop.group_products, warp_products=loop.warp_products, products=products,
            arrivals=loop.count(r"WARPGROUP\.ARRIVE"), instructions=len(loop.instructions), spills=loop.local_memory,
            wide_loads=loop.wide_loads, barriers=loop.count("BAR"), registers=registers, blocks=blocks,
            above_step=above,
        )
        for place, loop in enumerate(loops)
    ]  # fmt: skip


def _useful(row: Row, recorded: launch.Launch, loop: Loop) -> int:
    """Operations that a round asks for; of the two key lists of a kernel the one whose tile explains the loop."""
    sizes, (products, _) = recorded.arguments, PRODUCTS[row.kernel]
    keys = {sizes[name] for name in ("BLOCK_N", "BLOCK_P") if name in sizes}
    asked = [2 * products * sizes["BLOCK_M"] * count * sizes["BLOCK_D"] for count in keys]
    executed = loop.flops(row.num_warps)
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
    axis = PRODUCTS[report.kernel][1]
    size = next(int(word[1:]) for word in report.tile.split() if word[0] == axis)
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
    head = ["kernel", "d", "features", "tile", "warps, stages", "registers", "blocks", "products", "instructions, 100k"]
    lines = [f"| {' | '.join(head)} |", "|" + "--|" * len(head)]
    chosen: dict[tuple, list[Report]] = {}
    for report in reports:
        if report.dtype == "bf16":
            chosen.setdefault((report.kernel, report.head_dim, report.features), []).append(report)
    for (kernel, head_dim, features), group in sorted(chosen.items()):
        one = group[0]
        kind = "wgmma" if all(report.group_products for report in group) else "mma.sync"
        slots = f"{min(r.per_useful for r in group):.0f} – {max(r.per_useful for r in group):.0f}"
        lines.append(
            f"| {kernel.removeprefix('prompt_attention_')} | {head_dim} | {features} | {one.tile} | "
            f"{one.num_warps}, {one.num_stages} | {one.registers} | {one.blocks} | {kind} | {slots} |"
        )
    return "\n".join(lines)


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
    for row in rows():
        if row.source not in known:
            known[row.source] = {report.loop: report for report in reports_of(row)}
        named = {"kernel": row.kernel, "dtype": row.case.dtype, "head_dim": row.case.head_dim,
                 "features": row.case.features, "tile": row.tile}  # fmt: skip
        found += [Report(**{**asdict(report), **named}) for report in known[row.source].values()]
    wrong = [text for report in found for text in problems(report)]
    declined = [] if chosen.accept_worse else worse(found, kept)
    print(*wrong, *declined, sep="\n")
    if not declined:
        write_table(chosen.out, found)
    return 1 if wrong or declined else 0


if __name__ == "__main__":
    raise SystemExit(main())
