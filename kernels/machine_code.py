"""A disassembled kernel of NVIDIA's: its instructions, its loops, and what the tensor cores do in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\S+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;/]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
# M x N x K of one instruction: of a group of four warps, of a block, and of one warp.
_GROUP_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
_BLOCK_PRODUCT = re.compile(r"UTCHMMA\.(\d+)x(\d+)x(\d+)$")
_WARP_PRODUCT = re.compile(r"HMMA\.(\d+)\.")
_WARP_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8)}
# A product of a block (tcgen05.mma) says its shape in a register that was given a number before: N / 8 in the six bits
# from 17 on, M / 16 in the five from 24 on; of 16-bit operands K is 16 (PTX ISA, instruction descriptor of tcgen05).
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
_WRITTEN = re.compile(r"(UR\d+)(?:, (0x[0-9a-f]+)\s*$)?")
_BLOCK_DEPTH = 16


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it stands, its name with modifiers, its operands."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop, from where its jump goes to the jump."""

    instructions: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        """How many instructions have a name that a regular expression matches from its start."""
        return sum(re.match(pattern, instruction.name) is not None for instruction in self.instructions)

    @property
    def group_products(self) -> int:
        """Instructions that a group of four warps gives to its tensor cores together (wgmma)."""
        return self.count("HGMMA")

    @property
    def warp_products(self) -> int:
        """Those that a warp gives alone (mma.sync)."""
        return self.count("HMMA")

    @property
    def block_products(self) -> int:
        """Those that one thread gives for its whole block (tcgen05)."""
        return self.count("UTCHMMA")

    def flops(self, num_warps: int) -> int | None:
        """Multiplications and additions of the tensor cores in one round of a block of so many warps.

        None where an instruction does not say how many.
        """
        total = 0
        for instruction in self.instructions:
            if found := _BLOCK_PRODUCT.match(instruction.name):
                rows, columns, depth = map(int, found.groups())
                total += 2 * rows * columns * depth
            elif instruction.name.startswith("UTCHMMA"):
                return None
            elif found := _GROUP_PRODUCT.match(instruction.name):
                rows, columns, depth = map(int, found.groups())
                total += 2 * rows * columns * depth * (num_warps // 4)
            elif found := _WARP_PRODUCT.match(instruction.name):
                rows, columns, depth = _WARP_SHAPES[found.group(1)]
                total += 2 * rows * columns * depth * num_warps
        return total

    @cached_property
    def wide_loads(self) -> int:
        """Loads of eight bytes and more that a thread waits for itself: a tile that no copy brings ahead."""
        return self.count(r"LDG\.(?:.*\.)?(?:64|128)\b")

    @cached_property
    def local_memory(self) -> int:
        """Loads and stores of spilled registers."""
        return self.count(r"(?:LDL|STL)\b")


def instructions_of(listing: str) -> list[Instruction]:
    """What `cuobjdump -sass` lists, in order; a product of a block is named with its shape, as others are."""
    found = []
    numbers: dict[str, int | None] = {}
    for address, name, operands in (match.groups() for match in _LINE.finditer(listing)):
        descriptor = _DESCRIPTOR.search(operands) if name == "UTCHMMA" else None
        number = None if descriptor is None else numbers.get(descriptor.group(1))
        if number is not None:
            name = f"UTCHMMA.{(number >> 24 & 31) * 16}x{(number >> 17 & 63) * 8}x{_BLOCK_DEPTH}"
        elif written := _WRITTEN.match(operands.strip()):
            numbers[written.group(1)] = int(written.group(2), 16) if name == "UMOV" and written.group(2) else None
        found.append(Instruction(int(address, 16), name, operands))
    return found


def innermost_loops(listing: str) -> list[Loop]:
    """The loops of a kernel that hold no other loop, in order; a loop ends with a jump back to its start."""
    instructions = instructions_of(listing)
    back = []
    for instruction in instructions:
        target = _TARGET.search(instruction.operands) if instruction.name.startswith("BRA") else None
        # A jump to itself is where a kernel ends.
        if target is not None and int(target.group(1), 16) < instruction.address:
            back.append((int(target.group(1), 16), instruction.address))
    inner = [
        (start, end) for start, end in back
        if not any((start, end) != (s, e) and start <= s and e <= end for s, e in back)
    ]  # fmt: skip
    return [Loop(tuple(i for i in instructions if start <= i.address <= end)) for start, end in sorted(inner)]


def local_memory_in_loops(listing: str) -> int:
    """How many loads and stores of spilled registers stand in the innermost loops.

    Those before and after a loop cost a program some tens of cycles once; those within cost each round.
    """
    return sum(loop.local_memory for loop in innermost_loops(listing))
