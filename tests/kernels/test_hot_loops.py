"""The hot loops of NVIDIA's kernels: the kept table, its rules, and that each of them can be broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ptv2_fast.kernels import hot_loops, loop_rules, machine_code

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "hot_loops.json"


@pytest.fixture(scope="module")
def table() -> list[hot_loops.Report]:
    """The kept loops."""
    return hot_loops.read_table(TABLE)[1]


def test_kept_loops_break_no_rule(table):
    assert [text for report in table for text in loop_rules.problems(report)] == []


def test_kept_loops_are_those_of_the_kernels_as_they_are(table):
    kept = {(r.kernel, r.dtype, r.head_dim, r.features, r.tile, r.arch, r.source) for r in table}
    now = {(*subject.names.values(), subject.source) for subject in hot_loops.subjects()}
    assert kept == now, "run python -m ptv2_fast.kernels.hot_loops --out kernels/hot_loops.json"


def test_every_kernel_has_its_loops(table):
    loops = {}
    for report in table:
        loops.setdefault(report.key[:-1], []).append(report.loop)
    # Full and partial blocks, of prompt and text; of queries; decoding takes all blocks of either list for partial.
    count = {
        "forward": 4, "backward_query": 4, "backward_text": 2, "backward_prompt": 2, "decode": 2, "backward_rows": 1,
    }  # fmt: skip
    assert {kernel.removeprefix("prompt_attention_") for _, kernel, *_ in loops if "plain" not in kernel} == set(count)
    for (arch, kernel, *_, features), found in loops.items():
        assert found == list(range(count.get(kernel.removeprefix("prompt_attention_"), 1))), (arch, kernel, features)
    assert {arch for arch, *_ in loops} == set(loop_rules.CARDS)


def test_every_kernel_is_measured_by_a_plain_one(table):
    alone = ("prompt_attention_decode", "prompt_attention_backward_rows")
    measured = [r for r in table if not r.is_plain and r.kernel not in alone and r.arch == hot_loops.ARCH]
    assert measured and all(loop_rules.of_plain(r, table) for r in measured)
    plain = {r.kernel for r in table if r.is_plain}
    assert plain == {"plain_forward", "plain_query_gradient", "plain_key_gradients"}


def test_what_our_kernels_do_besides_costs_little(table):
    assert loop_rules.costly(table) == []
    doubled = [r if r.is_plain else dataclasses.replace(r, instructions=2 * r.instructions) for r in table]
    assert {text.split()[0] for text in loop_rules.costly(doubled)} == set(loop_rules.LEAST_OF_PLAIN)


def test_the_ceiling_is_what_the_busiest_unit_leaves(table):
    loop = next(r for r in table if r.is_plain)
    cycles = loop.useful_flops / loop.num_warps / 1024
    assert dataclasses.replace(loop, instructions=1, special=0).ceiling == 1
    assert dataclasses.replace(loop, instructions=round(2 * cycles), special=0).ceiling == pytest.approx(0.5, rel=0.01)
    assert dataclasses.replace(loop, instructions=1, special=round(cycles / 2)).ceiling == pytest.approx(0.25, rel=0.01)
    assert dataclasses.replace(loop, executed_flops=4 * loop.useful_flops, instructions=1).ceiling == 0.25


def test_readme_shows_the_kept_loops(table):
    _, shown, _ = (ROOT / "kernels" / "README.md").read_text().split(hot_loops.MARK)
    assert shown.strip() == hot_loops.digest(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"executed_flops": 1}, "1 operations are done where"),
        ({"warp_products": 48}, "48 products of single warps, though the sums have 128 rows"),
        ({"arrivals": 8}, "2 products are handed over 8 times"),
        ({"spills": 29}, "29 instructions touch spilled registers"),
        ({"wide_loads": 8}, "8 loads of a tile are waited for"),
        ({"above_step": 1, "maxnreg": None}, "1 registers fewer would make room"),
    ],
)
def test_rules_can_be_broken(table, change, message):
    good = next(r for r in table if r.kernel == "prompt_attention_forward" and r.head_dim == 64 and r.arch == 90)
    assert loop_rules.problems(good) == []
    found = loop_rules.problems(dataclasses.replace(good, **change))
    assert len(found) == 1 and message in found[0]


def test_a_tile_too_small_for_a_group_of_warps_may_do_without(table):
    small = [r for r in table if r.warp_products and r.arch == hot_loops.ARCH]
    assert {r.kernel for r in small} == {
        "prompt_attention_backward_prompt", "prompt_attention_decode", "plain_key_gradients",
    }  # fmt: skip
    assert all("P32" in r.tile or "SHARED16 OWN16" in r.tile or "N32" in r.tile for r in small)


def test_what_got_worse_is_told(table):
    longer = [dataclasses.replace(r, instructions=r.instructions * 2) for r in table[:1]]
    fewer = [dataclasses.replace(r, blocks=r.blocks - 1) for r in table[:1]]
    assert loop_rules.worse(table, table) == []
    assert "instructions for 100,000 useful operations" in loop_rules.worse(longer, table)[0]
    assert "blocks a multiprocessor" in loop_rules.worse(fewer, table)[0]
    # A loop that was not there before is compared with nothing, and a better one is welcome.
    assert loop_rules.worse(longer, []) == loop_rules.worse(table, longer) == []


def test_blocks_are_counted_as_a_multiprocessor_has_room():
    # 129 registers are given as 136, and 256 threads of them fill more than half of it.
    assert [loop_rules.blocks_of(n, 256, 65536) for n in (128, 129)] == [2, 1]
    assert [loop_rules.registers_above_step(n, 256, 65536) for n in (128, 129, 140)] == [48, 1, 12]
    assert loop_rules.blocks_of(32, 128, 100 * 1024) == 2, "shared memory"
    assert loop_rules.registers_above_step(32, 128, 100 * 1024) == 0
    assert loop_rules.blocks_of(16, 1024, 0) == 2, "threads"
    assert [loop_rules.blocks_of(32, 128, 50 * 1024, arch) for arch in (80, 90)] == [3, 4], (
        "Ampere has less shared memory"
    )
    assert [loop_rules.blocks_of(128, 128, 0, 100, columns) for columns in (0, 128, 256, 512)] == [4, 4, 2, 1]
    assert [loop_rules.registers_above_step(168, 128, 0, 100, columns) for columns in (64, 256)] == [40, 0]


LISTING = """
        /*0000*/                   LDL R3, [R1] ;                                /* 0x1 */
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/              @!P2 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR28][R4.64], P2 ;
        /*0070*/                   STL [R1+0x4], R3 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @!P0 BRA 0x10 ;
        /*00a0*/                   LDL.LU R3, [R1+0x4] ;
        /*00b0*/               @P1 BRA 0x0 ;
        /*00c0*/                   BRA 0xe0 ;
        /*00d0*/                   STL [R1], R3 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0 ;
"""


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        (80, {"executed_flops": 3 << 20}, "3145728 operations are done where"),
        (80, {"spills": 29}, "29 instructions touch spilled registers"),
        (80, {"wide_loads": 8}, "8 loads of a tile are waited for"),
        (100, {"executed_flops": 1}, "1 operations are done where"),
        (100, {"warp_products": 48}, "48 products of single warps, though the sums have 128 rows"),
        (100, {"arrivals": 8}, "2 products are handed over 8 times"),
    ],
)
def test_rules_hold_on_other_cards(arch, change, message):
    """A forward of 128 x 64 with d = 64: on Ampere by single warps, on Blackwell by the block."""
    blackwell = arch == 100
    good = loop_rules.Report(
        "prompt_attention_forward", "bf16", 64, "plain", "M128 N64 P64", 8, 3, None, "source", 0, 1 << 21, 1 << 21,
        8 if blackwell else 0, 0 if blackwell else 64, 2, 2 if blackwell else 0, 299, 33, 0, 0, 7, 179, 1, 51, arch,
    )  # fmt: skip
    assert loop_rules.problems(good) == []
    found = loop_rules.problems(dataclasses.replace(good, **change))
    assert len(found) == 1 and message in found[0] and f"sm_{arch}" in found[0]
    # What the code does not say is judged by nobody.
    assert loop_rules.problems(dataclasses.replace(good, executed_flops=None)) == []
    assert dataclasses.replace(good, executed_flops=None).ceiling == good.ceiling


BLOCK_LISTING = """
        /*0000*/                   UMOV UR23, 0x8100490 ;
        /*0010*/                   UTCHMMA gdesc[UR4], gdesc[UR10], tmem[UR9], tmem[UR22], idesc[UR23], !UPT ;
        /*0020*/                   UTCBAR [UR15], URZ ;
        /*0030*/                   UMOV UR23, 0x4210490 ;
        /*0040*/                   UTCHMMA tmem[UR11], gdesc[UR4], tmem[UR8], tmem[UR22], idesc[UR23], UPT ;
        /*0050*/                   UTCBAR [UR16], URZ ;
        /*0060*/              @!P0 BRA 0x0 ;
        /*0070*/                   EXIT ;
"""


def test_a_product_of_a_block_says_its_shape_in_a_register():
    (loop,) = machine_code.innermost_loops(BLOCK_LISTING)
    assert (loop.block_products, loop.group_products, loop.count("UTCBAR")) == (2, 0, 2)
    # 128 x 64 and 64 x 128, 16 deep, however many warps there are.
    assert loop.flops(4) == loop.flops(8) == 2 * (2 * 128 * 64 * 16)
    for hidden in ("UMOV UR23, UR7", "UIADD3 UR23, UPT, UPT, UR30, 0x10, URZ", "R2UR UR23, R5"):
        (loop,) = machine_code.innermost_loops(BLOCK_LISTING.replace("UMOV UR23, 0x4210490", hidden))
        assert loop.block_products == 2 and loop.flops(8) is None


def test_a_listing_is_read():
    (loop,) = machine_code.innermost_loops(LISTING)
    assert len(loop.instructions) == 9 and len(machine_code.instructions_of(LISTING)) == 16
    assert (loop.group_products, loop.warp_products) == (1, 1)
    # A group of four warps: 64 x 32 x 16; each of the eight warps: 16 x 8 x 16.
    assert loop.flops(8) == 2 * (2 * 64 * 32 * 16) + 8 * (2 * 16 * 8 * 16)
    # One word is no tile, and a copy ahead is no load; what is spilled around the loop does not count.
    assert (loop.wide_loads, loop.local_memory, loop.count("BAR")) == (1, 1, 1)
    assert machine_code.local_memory_in_loops(LISTING) == 1
    assert machine_code.innermost_loops("") == []
