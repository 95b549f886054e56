"""The hot loops of the kernels on NVIDIA's cards, read from their machine code, and the rules that they keep.

    python -m ptv2_fast.kernels.hot_loops --out kernels/hot_loops.json

A row for each innermost loop with tensor-core instructions of what 16-bit calls launch at d = 64 and 128. On Hopper
also of attention as a textbook has it with the same tiles (`plain_loops.py`), by which they are measured; of Ampere
and Blackwell the plainest calls. Rows whose code is
unchanged are kept, as in `aot.py`. A loop that needs more instructions or has fewer blocks a multiprocessor
than the kept one has to be accepted (`--accept-worse`). Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import triton

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.aot import Case, record_case
from ptv2_fast.kernels.aot_compile import (
    card_name,
    compiled_launch,
    cuobjdump,
    fingerprint,
    kernel_name,
    resource_usage,
    tile_of,
)
from ptv2_fast.kernels.loop_rules import (
    WORK,
    Report,
    blocks_of,
    costly,
    of_plain,
    problems,
    registers_above_step,
    short_name,
    worse,
)
from ptv2_fast.kernels.machine_code import Loop, innermost_loops
from ptv2_fast.kernels.plain_loops import plain_launch

ARCH = 90
FEATURES = ("plain", "causal", "padded", "packed")
SHORT_PROMPTS = ("P20", "packed P20")
# With prompts that the kernel of short rows sums itself: another prompt has a loop of its own, with three products.
ROWS = ("rows padded P20", "rows causal P20", "short rows padded P20", "short rows causal P20")
OTHER_ARCHS = (80, 100)
OF_OTHERS = ("plain", "causal", "padded", "P20")


_ROWS_KERNEL = "prompt_attention_backward_rows"
MARK = "<!-- hot loops -->"


@dataclass(frozen=True)
class Subject:
    """A launch whose loops are looked at, by the names that a report has for it."""

    kernel: str
    dtype: str
    head_dim: int
    features: str
    recorded: launch.Launch
    arch: int = ARCH

    @property
    def names(self) -> dict[str, Any]:
        """All of what a report says of a launch that its code does not decide."""
        return {
            "kernel": self.kernel, "dtype": self.dtype, "head_dim": self.head_dim, "features": self.features,
            "tile": tile_of(self.recorded), "arch": self.arch,
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
    short = [Case(ARCH, "bf16", head_dim, features) for head_dim in (64, 128) for features in SHORT_PROMPTS]
    rows = [Case(ARCH, "bf16", head_dim, features) for head_dim in (64, 128) for features in ROWS]
    others = [
        Case(arch, "bf16", head_dim, features)
        for arch in OTHER_ARCHS for head_dim in (64, 128) for features in OF_OTHERS
    ]  # fmt: skip
    return usual + short + rows + others


def subjects() -> list[Subject]:
    """The launches of the cases that have hot loops, and the plain forms of those that have one, each once.

    Of short rows only the kernel that owns them.
    """
    ours = [
        Subject(kernel_name(recorded), case.dtype, case.head_dim, case.features, recorded, case.arch)
        for case in cases() for recorded in record_case(case)
        if kernel_name(recorded) in WORK and (case.features not in ROWS or kernel_name(recorded) == _ROWS_KERNEL)
    ]  # fmt: skip
    plain: dict[tuple[str, str], Subject] = {}
    for one in ours:
        recorded = plain_launch(one.kernel, one.recorded) if one.arch == ARCH else None
        if recorded is not None:
            features = f"{short_name(one.kernel)} {tile_of(recorded)}"
            subject = Subject(kernel_name(recorded), one.dtype, one.head_dim, features, recorded)
            plain.setdefault((subject.source, features), subject)
    return [*ours, *plain.values()]


def reports_of(subject: Subject) -> list[Report]:
    """Compile a launch and look at its loops."""
    arguments = subject.recorded.arguments
    compiled = compiled_launch(subject.recorded, subject.arch)
    cubin = compiled.asm["cubin"]
    registers, _ = resource_usage(cubin)
    loops = [
        loop for loop in innermost_loops(cuobjdump(cubin, "-sass"))
        if loop.group_products + loop.block_products + loop.warp_products
    ]  # fmt: skip
    num_warps = arguments["num_warps"]
    # Columns of tensor memory, where a card has it.
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    room = (registers, 32 * num_warps, compiled.metadata.shared, subject.arch, columns)
    blocks, above = blocks_of(*room), registers_above_step(*room)
    return [
        Report(
            **subject.names, num_warps=num_warps, num_stages=arguments["num_stages"],
            maxnreg=arguments.get("maxnreg"), source=subject.source, loop=place,
            useful_flops=_useful(subject, loop), executed_flops=loop.flops(num_warps),
            group_products=loop.group_products + loop.block_products, warp_products=loop.warp_products,
            products=WORK[subject.kernel].products, arrivals=loop.count(r"WARPGROUP\.ARRIVE|UTCBAR"),
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
    return min(asked, key=lambda useful: abs((executed or 0) / useful - 1))


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
        "card", "kernel", "d", "features", "tile", "warps, stages", "registers", "blocks", "products",
        "instructions, 100k", "of plain", "ceiling",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "--|" * len(head)]
    chosen: dict[tuple, list[Report]] = {}
    for report in reports:
        if report.dtype == "bf16" and not report.is_plain:
            call = report.arch, report.kernel, report.head_dim, report.features
            chosen.setdefault(call, []).append(report)
    for (arch, kernel, head_dim, features), group in sorted(chosen.items()):
        grouped = all(report.group_products for report in group)
        kind = ("tcgen05" if arch >= 100 else "wgmma") if grouped else "mma.sync"
        slots = f"{min(r.per_useful for r in group):.0f} – {max(r.per_useful for r in group):.0f}"
        best = min(group, key=lambda r: r.per_useful)
        plain = of_plain(best, reports)
        share = "" if plain is None else f"{plain:.2f}"
        lines.append(
            f"| {card_name(arch)} | {short_name(kernel)} | {head_dim} | {features} | {best.tile} | "
            f"{best.num_warps}, {best.num_stages} | {best.registers} | {best.blocks} | {kind} | {slots} | {share} | "
            f"{best.ceiling:.2f} |"
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
    known: dict[tuple[int, str], dict[int, Report]] = {}
    for report in kept if kept and version == triton.__version__ else ():
        known.setdefault((report.arch, report.source), {})[report.loop] = report
    found = []
    for subject in subjects():
        code = subject.arch, subject.source
        if code not in known:
            known[code] = {report.loop: report for report in reports_of(subject)}
        found += [Report(**{**asdict(report), **subject.names}) for report in known[code].values()]
    wrong = [text for report in found for text in problems(report)] + costly(found)
    declined = [] if chosen.accept_worse else worse(found, kept)
    print(*wrong, *declined, sep="\n")
    if not declined:
        write_table(chosen.out, found)
    return 1 if wrong or declined else 0


if __name__ == "__main__":
    raise SystemExit(main())
