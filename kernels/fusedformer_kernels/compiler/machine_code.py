"""Count what a disassembled kernel of sm_90 does in its main loop, and how many an SM holds.

The counts are warp instructions of one pass of that loop; :class:`Mix` turns them into clock cycles
of the units that they occupy. Source of the rates: NVIDIA, CUDA C++ Programming Guide, table of
arithmetic throughput (compute capability 9.0), and of the limits: the table of technical
specifications. Tensor cores: 989 TFLOP/s of dense bfloat16 over 132 SMs at 1.83 GHz.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Classes of instructions by what they occupy; an opcode belongs to the first that matches it.
CLASSES: Mapping[str, str] = {
    "product": r"HGMMA|HMMA|IGMMA|QGMMA",
    "exp2": r"MUFU\.EX2",
    "mufu": r"MUFU",
    "convert": r"F2F|I2F|F2I|FRND",
    "fma": r"FFMA|FMUL|FADD|HFMA|HADD|HMUL|IMAD",
    "tma": r"UTMA|UBLKCP",
    "wait": r"WARPGROUP|WARPSYNC|BAR|DEPBAR|SYNCS|LDGDEPBAR|LDGSTSDEPBAR|MEMBAR|FENCE",
    "load": r"LDG",
    "store": r"STG|RED|ATOM",
    "shared": r"LDS|STS|STSM|LDSM",
    "shuffle": r"SHFL",
    "control": r"BRA|BSSY|BSYNC|EXIT|NOP|BREAK|CALL|RET",
    # Uniform instructions run once a warp on a unit of their own, but take an issue slot.
    "uniform": r"U[A-Z0-9]|R2UR|S2UR|S2R",
    "alu": r"",
}
# Lanes of an SM that work on a class in a clock.
LANES = {"exp2": 16, "mufu": 16, "convert": 64, "fma": 128, "alu": 64, "shuffle": 32}
ISSUE_LANES = 128  # four schedulers, a warp instruction each
PRODUCT_FLOPS = 4096  # of bfloat16 in a clock and SM
REGISTERS, SHARED_BYTES, WARPS = 65536, 227 * 1024, 64  # of an SM
SHARED_RESERVED = 1024  # for each program
_ORDERED_LOAD = re.compile(r"\bLDG\.E\.STRONG")  # of what another program writes


@dataclass(frozen=True)
class Mix:
    """Warp instructions of one pass of the main loop, or of all the code where there is none."""

    counts: Mapping[str, int]
    product_flops: int  # of one warp group's, so 64 rows
    loaded_bytes: int  # from global memory, by a warp
    in_loop: bool

    def cycles(self, num_warps: int) -> dict[str, float]:
        """Compute the clocks of an SM for which one program's pass occupies each unit."""
        found = {
            name: count * num_warps * 32 / LANES[name]
            for name, count in self.counts.items()
            if name in LANES
        }
        found["issue"] = sum(self.counts.values()) * num_warps * 32 / ISSUE_LANES
        found["product"] = self.product_flops * num_warps / 4 / PRODUCT_FLOPS
        return found


def programs_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Count the programs that an SM of compute capability 9.0 holds at once."""
    by_warp = -(-registers * 32 // 256) * 256  # handed out to warps in such pieces
    limits = [REGISTERS // (by_warp * num_warps), WARPS // num_warps, 32]
    limits.append(SHARED_BYTES // (shared_bytes + SHARED_RESERVED))
    return min(limits)


def main_loop(code: str) -> Mix:
    """Count the mix of the innermost loop with most products, then most instructions.

    ``code`` is what nvdisasm writes. Of loops with as many products the shortest counts: the others
    are the same with tests of bounds.
    """
    lines = code.splitlines()
    mixes = [count_mix(lines[first : last + 1], True) for first, last in inner_loops(lines)]
    return pick_main(mixes) if mixes else count_mix(lines, False)


def inner_loops(lines: list[str]) -> list[tuple[int, int]]:
    """Find the first and the last line of each loop that has no loop in it.

    A loop that waits for another program is none: it ends at once if that one is done.
    """
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.L_\w+:", line)}
    loops: list[tuple[int, int]] = []
    for at, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        if found and labels.get(found.group(1), at) < at - 1:  # one that jumps to itself is padding
            first = labels[found.group(1)]
            inside = "\n".join(lines[first:at])
            if "MMA." in inside or not _ORDERED_LOAD.search(inside):
                loops.append((first, at))
    return [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def pick_main(mixes: list[Mix]) -> Mix:
    """Pick the main loop of several."""
    if any(mix.product_flops for mix in mixes):
        return min(mixes, key=lambda m: (-m.product_flops, sum(m.counts.values())))
    return max(mixes, key=lambda m: sum(m.counts.values()))


def count_mix(lines: list[str], in_loop: bool) -> Mix:
    """Count the instructions of ``lines``."""
    counts = dict.fromkeys(CLASSES, 0)
    flops = loaded = 0
    for line in lines:
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if not found:
            continue
        opcode = found.group(1)
        counts[next(name for name, pattern in CLASSES.items() if re.match(pattern, opcode))] += 1
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
        width = re.match(r"LDG(?:STS)?\.E(?:\.\w+)*?\.(64|128|U8|U16)\b|LDG", opcode)
        if width and not opcode.startswith(("LDGDEPBAR", "LDGSTSDEPBAR")):
            bits = {"U8": 8, "U16": 16, None: 32}.get(width.group(1)) or int(width.group(1))
            loaded += bits // 8 * 32
        if shape:
            m, n, k = map(int, shape.groups())
            flops += 2 * m * n * k
        elif opcode.startswith("HMMA.16816"):
            flops += 4 * 2 * 16 * 8 * 16  # four warps, one of these each
    return Mix({name: n for name, n in counts.items() if n}, flops, loaded, in_loop)
