"""Compile every kernel ahead of time, with no GPU: registers, spills, shared memory, tensor-core instructions.

    python -m ptv2_fast.kernels.aot --out kernels/aot_table.json

The kernels and their arguments are recorded from the host functions (`launch.record`), so what is compiled is what
would be launched. Rows of the table whose kernel, helpers and arguments are unchanged are kept, so a run that was cut
short goes on where it stopped. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from ptv2_fast.kernels import launch
from ptv2_fast.kernels.aot_compile import card_name, compile_launch, fingerprint, kernel_name, tile_of
from ptv2_fast.kernels.float8_rows import quantize_rows, transposed
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward
from ptv2_fast.kernels.prompt_projection import prompt_projection

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One head size for each row of the launch configurations, and those that are padded or smaller than a row's.
HEAD_DIMS = (64, 128, 256)
OTHER_HEAD_DIMS = (16, 80, 192)
# What models combine: encoders pad on the right and drop out, decoders are causal, share key/value heads, slide.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packed": True},
    "causal": {"causal": True, "group": 4},
    "mask+dropout": {"key_mask": True, "dropout_p": 0.1},
    "causal+window+softcap": {"causal": True, "group": 2, "window": 512, "softcap": 50.0},
    "bank+biases": {"bank": True, "bias": True, "prompt_bias": True},
    "everything": {
        "causal": True, "group": 2, "window": 512, "softcap": 50.0, "key_mask": True, "dropout_p": 0.1, "bank": True,
        "bias": True, "prompt_bias": True,
    },
}  # fmt: skip
_ROW_FORMS: dict[str, dict[str, Any]] = {
    " P20": {"prompt": 20}, " padded P8": {"bytes_mask": True, "prompt": 8}, " padded": {"bytes_mask": True},
    " packed P20": {"packed": True, "prompt": 20}, " packed": {"packed": True},
    " padded dropout P20": {"bytes_mask": True, "dropout_p": 0.1, "prompt": 20},
    " packed dropout P20": {"packed": True, "dropout_p": 0.1, "prompt": 20},
    " padded bank P20": {"bytes_mask": True, "bank": True, "full": True, "prompt": 20},
    " packed bank": {"packed": True, "bank": True, "full": True},
    " bias P20": {"bias": True, "prompt_bias": True, "frozen_bias": True, "prompt": 20},
}  # fmt: skip
# What the cells of the benchmarks launch besides, on Hopper: short prompts in smaller tiles, masks of bytes as models
# hand them over, banks of full entries, dropout of packed rows, a decoding step of many rows.
CELLS: dict[str, dict[str, Any]] = {
    **{f"{name}P{length}": {"head_dims": (64,), "prompt": length, **options}
       for name, options in {"": {}, "padded ": {"bytes_mask": True}, "packed ": {"packed": True}}.items()
       for length in (8, 20)},
    "padded": {"head_dims": (64, 128), "bytes_mask": True},
    "padded dropout": {"head_dims": (64,), "bytes_mask": True, "dropout_p": 0.1},
    "padded dropout P20": {"head_dims": (64,), "bytes_mask": True, "dropout_p": 0.1, "prompt": 20},
    "packed dropout": {"head_dims": (64,), "packed": True, "dropout_p": 0.1},
    "packed dropout P20": {"head_dims": (64,), "packed": True, "dropout_p": 0.1, "prompt": 20},
    "bank": {"head_dims": (64, 128), "bank": True, "full": True},
    "bank P20": {"head_dims": (64,), "bank": True, "full": True, "prompt": 20},
    "padded bank": {"head_dims": (64,), "bank": True, "full": True, "bytes_mask": True},
    "padded bank P20": {"head_dims": (64,), "bank": True, "full": True, "bytes_mask": True, "prompt": 20},
    **{f"causal group {group}{form}{name}": {"head_dims": (128,), "causal": True, "group": group, **own, **prompt}
       for group, (form, own), (name, prompt) in itertools.product(
           (2, 4), {"": {}, " padded": {"bytes_mask": True}, " packed": {"packed": True}}.items(),
           {"": {}, " P20": {"prompt": 20}}.items())},
    "causal group 4 bank": {"head_dims": (128,), "causal": True, "group": 4, "bank": True, "full": True},
    # Short rows, which one kernel owns: its tiles for 128 and 64 queries; prompts that it sums, and others.
    **{f"{name}{form}": {"head_dims": (64, 128), "tokens": tokens, "prompt": 20, **options}
       for name, tokens in (("rows", 128), ("short rows", 64))
       for form, options in {" padded P20": {"bytes_mask": True}, " causal P20": {"causal": True}}.items()},
    **{f"rows{form}": {"head_dims": (64,), "tokens": 128, **options} for form, options in _ROW_FORMS.items()},
    "short rows causal group 2 P20": {"head_dims": (64,), "tokens": 64, "causal": True, "group": 2, "prompt": 20},
    # The mask of a growing cache has rows of any length.
    **{f"decode group {group} B{rows} of {tokens}": {
           "head_dims": (128,), "causal": True, "group": group, "rows": rows, "tokens": tokens, "bytes_mask": True,
           "only": "decode"}
       for group, rows in ((2, 8), (2, 64), (4, 1), (4, 8), (4, 64)) for tokens in (250, 256)},
    **{f"projection P{length}{' bias' if bias else ''}": {
           "head_dims": (64,), "prompt": length, "projection_bias": bias, "only": "projection"}
       for length in (8, 20, 64) for bias in (False, True)},
    "float8": {"head_dims": (64,), "only": "float8"},
}  # fmt: skip
# Kernels that multiply no matrices.
_NO_PRODUCTS = (
    "prompt_attention_delta", "sum_slots", "merge_chunks", "rows_by_entry", "quantize_rows", "transpose_bytes",
)  # fmt: skip
DIGEST_MARK = "<!-- digest -->"
# Two dozen loads and stores of spilled registers in a loop were as fast as none on an H200 (text backward, d = 128,
# causal, Triton 3.6); what many more of them cost is not known.
MOST_SPILLS_IN_LOOPS = 28


@dataclass(frozen=True)
class Case:
    """One way of calling every kernel, on one card."""

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
    source: str
    registers: int
    spill_bytes: int
    spills_in_loops: int
    shared_bytes: int
    binary_bytes: int
    tensor_core_instructions: int
    wgmma_instructions: int
    async_copies: int


def all_cases() -> list[Case]:
    """The table's cases.

    Every row of launch configurations in every dtype on every card, with nothing and with everything. In bf16 also AMD,
    head sizes that are smaller or padded (on Hopper; they have their row's tiles), each feature set, and the cells of
    the benchmarks.
    """
    rows = itertools.product(ARCHITECTURES, DTYPES, HEAD_DIMS, ("plain", "everything"))
    feature_sets = itertools.product(ARCHITECTURES, ("bf16",), (64, 128), FEATURES)
    head_dims = itertools.product((90,), ("bf16",), OTHER_HEAD_DIMS, ("plain",))
    amd = itertools.product((launch.GFX942,), ("bf16",), (64, 128), ("plain",))
    cells = [(90, "bf16", head_dim, name) for name, options in CELLS.items() for head_dim in options["head_dims"]]
    return list(dict.fromkeys(Case(*case) for case in itertools.chain(rows, amd, head_dims, feature_sets, cells)))


def record_case(case: Case) -> list[launch.Launch]:
    """The launches of a forward, a full backward, a decoding step and a projection, on stand-in tensors.

    Of a cell of the benchmarks those that it is about: a step's, or decoding's, or a projection's, or float8's.
    """
    options = (FEATURES | CELLS)[case.features]
    only = options.get("only", "step" if case.features in CELLS else None)
    dtype = DTYPES[case.dtype]
    rows, kv_heads, tokens = options.get("rows", 4), 2, options.get("tokens", 256)
    prompt_length = options.get("prompt", 64)
    heads = kv_heads * int(options.get("group", 1))
    entries = 3 if options.get("bank") else 1
    packed = bool(options.get("packed"))

    def tensor(count: int) -> torch.Tensor:
        shape = (rows * tokens, count, case.head_dim) if packed else (rows, tokens, count, case.head_dim)
        made = torch.zeros(shape, dtype=dtype)
        return made if packed else made.transpose(1, 2)

    q, k, v = tensor(heads), tensor(kv_heads), tensor(kv_heads)
    prompt_k, prompt_v = (torch.zeros(entries, kv_heads, prompt_length, case.head_dim, dtype=dtype) for _ in range(2))
    mask = torch.bool if options.get("bytes_mask") else torch.int64 if options.get("key_mask") else None
    has_lens = entries > 1 and not options.get("full")
    arguments: dict[str, Any] = {
        "causal": bool(options.get("causal")), "window": options.get("window"), "softcap": options.get("softcap"),
        "dropout_p": options.get("dropout_p", 0.0), "seed": torch.zeros(1, dtype=torch.int64),
        "key_mask": None if mask is None else torch.ones(rows, tokens, dtype=mask),
        "cu_seqlens": torch.arange(rows + 1, dtype=torch.int32) * tokens if packed else None,
        "max_seqlen": tokens if packed else None,
        "prompt_index": torch.zeros(rows, dtype=torch.int64) if entries > 1 else None,
        "prompt_lens": torch.full((entries,), prompt_length, dtype=torch.int32) if has_lens else None,
        "prompt_bias": torch.zeros(entries, heads, prompt_length) if options.get("prompt_bias") else None,
        "bias": torch.zeros(1, heads, tokens, tokens, dtype=dtype) if options.get("bias") else None,
    }  # fmt: skip
    with launch.record(case.arch) as launches:
        if only in (None, "step"):
            output, lse = prompt_attention_forward(q, k, v, prompt_k, prompt_v, **arguments)
            needs = Needs(
                query=True,
                text=True,
                prompt=True,
                prompt_bias=bool(options.get("prompt_bias")) and not options.get("frozen_bias"),
                bias=bool(options.get("bias")) and not options.get("frozen_bias"),
            )
            given = (output, q, k, v, prompt_k, prompt_v, output, lse)
            prompt_attention_backward(*given, needs=needs, **arguments)
            # At the first prompted layer nothing upstream trains.
            of_prompt = Needs(prompt=True, prompt_bias=needs.prompt_bias)
            with launch.record(case.arch) as first_layer:
                prompt_attention_backward(*given, needs=of_prompt, **arguments)
            known = {fingerprint(recorded) for recorded in launches}
            launches += [recorded for recorded in first_layer if fingerprint(recorded) not in known]
        if only in (None, "decode") and not packed:
            one_query = {"dropout_p": 0.0, "bias": arguments["bias"] if arguments["bias"] is None
                         else arguments["bias"][:, :, :1]}  # fmt: skip
            prompt_attention_decode(q[:, :, :1], k, v, prompt_k, prompt_v, **arguments | one_query)
        if only in (None, "projection"):
            features = 2 * kv_heads * case.head_dim
            weights = [torch.zeros(features, 1024, dtype=dtype) for _ in range(2)]
            biases = [torch.zeros(features, dtype=dtype) for _ in range(2)] if options.get("projection_bias") else None
            x = torch.zeros(2, prompt_length, 1024, dtype=dtype, requires_grad=True)
            y = prompt_projection(x, weights, biases)
            y.backward(torch.zeros_like(y))
        if only == "float8":
            x = torch.zeros(rows * tokens, 1024, dtype=dtype)
            quantize_rows(x, torch.float8_e4m3fn, 1e-38)
            values, _ = quantize_rows(x, torch.float8_e4m3fn, 1e-38, torch.zeros(1024))
            transposed(values)
    return launches


@dataclass(frozen=True)
class Row:
    """A row of the table before it is compiled: the place-th launch of a case."""

    case: Case
    place: int
    kernel: str
    tile: str
    num_warps: int
    num_stages: int
    source: str

    @property
    def code(self) -> tuple[int, str]:
        """What is compiled; rows that share it share the result."""
        return self.case.arch, self.source

    def report(self, measured: dict[str, int]) -> Report:
        """The row with the compiler's results."""
        facts: dict[str, Any] = {**asdict(self.case), **measured}
        return Report(
            kernel=self.kernel,
            tile=self.tile,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            source=self.source,
            **facts,
        )


def rows_of(cases: Iterable[Case]) -> list[Row]:
    """Every launch of every case, in order."""
    return [
        Row(
            case,
            place,
            kernel_name(recorded),
            tile_of(recorded),
            recorded.arguments.get("num_warps", 4),
            recorded.arguments.get("num_stages", 3),
            fingerprint(recorded),
        )
        for case in cases
        for place, recorded in enumerate(record_case(case))
    ]


def compile_row(row: Row) -> dict[str, int]:
    """What the compiler makes of a row."""
    return compile_launch(record_case(row.case)[row.place], row.case.arch)


def problems(report: Report) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty when nothing is."""
    found = []
    name = f"{report.kernel} {card_name(report.arch)} {report.dtype} d={report.head_dim} {report.features}"
    if report.binary_bytes == 0:
        found.append(f"{name}: no binary")
    if report.spills_in_loops > MOST_SPILLS_IN_LOOPS:
        found.append(f"{name}: reads or writes spilled registers in a loop, {report.spill_bytes} bytes a thread")
    if report.shared_bytes > launch.shared_memory_limit(report.arch):
        found.append(f"{name}: {report.shared_bytes} bytes of shared memory, the card has less")
    multiplies = report.kernel not in _NO_PRODUCTS
    if multiplies and report.dtype != "fp32" and report.tensor_core_instructions == 0:
        found.append(f"{name}: no tensor-core instruction")
    return found


def read_table(path: Path) -> tuple[str, list[Report]]:
    """(the Triton that compiled the table, its reports)."""
    table = json.loads(path.read_text())
    return table["triton"], [Report(**dict(zip(table["columns"], row, strict=True))) for row in table["rows"]]


def write_table(path: Path, reports: Sequence[Report]) -> None:
    """One line a report, and their digest into the README beside the table if there is one."""
    rows = ",\n".join(json.dumps(astuple(report)) for report in reports)
    columns = json.dumps([field.name for field in fields(Report)])
    path.write_text(f'{{"triton": "{triton.__version__}",\n"columns": {columns},\n"rows": [\n{rows}\n]}}\n')
    readme = path.with_name("README.md")
    if readme.exists():
        text, mark, _ = readme.read_text().partition(DIGEST_MARK)
        readme.write_text(f"{text}{mark}\n{digest(reports)}\n")


def digest(reports: Sequence[Report]) -> str:
    """The worst of each kernel, head size and dtype over the feature sets, a column for each card, as markdown."""
    groups: dict[tuple, dict[int, list[Report]]] = {}
    for r in reports:
        groups.setdefault((r.kernel, r.head_dim, r.dtype), {}).setdefault(r.arch, []).append(r)
    archs = (*ARCHITECTURES, launch.GFX942)
    lines = [
        "| kernel | d | dtype | spilled | " + " | ".join(map(card_name, archs)) + " |",
        "|--|--|--|--|" + "--|" * len(archs),
    ]
    for (kernel, head_dim, dtype), cards in sorted(groups.items()):
        spilled = max(r.spill_bytes for group in cards.values() for r in group)
        cells = [_worst(cards[arch]) if arch in cards else "" for arch in archs]
        lines.append(f"| {kernel} | {head_dim} | {dtype} | {spilled} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _worst(group: Sequence[Report]) -> str:
    registers, shared = (max(getattr(r, name) for r in group) for name in ("registers", "shared_bytes"))
    return f"{registers} · {shared} · {min(r.tensor_core_instructions for r in group)}"


def compile_missing(rows: Sequence[Row], known: dict[tuple[int, str], dict[str, int]], jobs: int) -> Iterator[Row]:
    """Compile each code that is not known yet, once, and add it to `known`; gives the rows as they come."""
    missing = list({row.code: row for row in rows if row.code not in known}.values())
    # Recording the launches starts PyTorch's threads, which a forked process would wait for in vain.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for row, measured in zip(missing, pool.map(compile_row, missing), strict=True):
            known[row.code] = measured
            yield row


def _measured(report: Report) -> dict[str, int]:
    columns = [field.name for field in fields(Report)]
    return {name: getattr(report, name) for name in columns[columns.index("source") + 1 :]}


def main() -> int:
    """Compile what is missing, write the table, and return 1 if any kernel breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table to bring up to date, and its digest in the README beside")
    parser.add_argument("--arch", type=int, nargs="*", default=[*ARCHITECTURES, launch.GFX942])
    parser.add_argument("--head-dim", type=int, nargs="*", default=[*HEAD_DIMS, *OTHER_HEAD_DIMS])
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES))
    parser.add_argument("--features", nargs="*", default=[*FEATURES, *CELLS])
    parser.add_argument("--kernel", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    rows = rows_of(all_cases())
    known: dict[tuple[int, str], dict[str, int]] = {}
    if chosen.out and chosen.out.exists():
        version, reports = read_table(chosen.out)
        if version == triton.__version__:
            known = {(report.arch, report.source): _measured(report) for report in reports}
    wanted = [
        row for row in rows
        if row.case.arch in chosen.arch and row.case.dtype in chosen.dtype and row.case.features in chosen.features
        and row.case.head_dim in chosen.head_dim and (not chosen.kernel or row.kernel in chosen.kernel)
    ]  # fmt: skip
    for row in compile_missing(wanted, known, chosen.jobs):
        print(json.dumps(astuple(row.report(known[row.code]))), *problems(row.report(known[row.code])), flush=True)
        if chosen.out:
            write_table(chosen.out, _reports(rows, known))
    if chosen.out:
        write_table(chosen.out, _reports(rows, known))
    wrong = [text for report in _reports(wanted, known) for text in problems(report)]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def _reports(rows: Sequence[Row], known: dict[tuple[int, str], dict[str, int]]) -> list[Report]:
    return [row.report(known[row.code]) for row in rows if row.code in known]


if __name__ == "__main__":
    raise SystemExit(main())
