"""Follow one program of sm_90 through its machine code: where its warps wait, clock by clock.

ptxas writes into each instruction how long its warp stalls, which counter its result raises, and
which counters it waits for (nvdisasm prints them with ``-hex``). Loads, shuffles, exponentials and
products have no fixed time: here they have a nominal one, and each wait is put down to its cause.
All warps of a program are taken to run abreast, alone on their SM; what other programs do in these
waits is left to :mod:`prediction`. Layout of the bits: Jia et al., arXiv:1804.06826, section 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Nominal clocks until a result is there, without load. Sources: Jia et al., arXiv:1804.06826 (as
# measured on Volta), and Luo et al., arXiv:2402.13499 (Hopper); memory is between an L2 hit and
# DRAM. The causes, to which prediction.py has a factor each, are the names.
LATENCY: Mapping[str, float] = {"memory": 600, "shared": 30, "special": 24, "product": 32}
BARRIER = 30.0  # clocks from the last warp's arrival until all go on
CAUSES = ("issue", "product", "memory", "shared", "special", "barrier")

_KINDS = {
    "memory": r"LDG|ATOM|RED|LDL|LD\b|UTMALDG|SYNCS|MEMBAR",
    "shared": r"LDS|STS|LDC|ULDC|FENCE",
    "special": r"MUFU|SHFL|F2I|I2F|F2F|FRND|S2R|S2UR|REDUX|VOTE|R2UR|POPC|FLO|BREV",
    "product": r"HGMMA|HMMA",
}
_LINE = re.compile(
    r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*?);\s+/\* 0x"
)
_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_NONE = 7  # no counter


@dataclass(frozen=True)
class Step:
    """One instruction, and what ptxas says of its timing."""

    opcode: str
    kind: str  # what its result takes the time of, "" if its time is fixed
    rest: str
    stall: int
    raised: int  # counter that its result lowers again, or 7
    read: int  # counter that is lowered when its operands were read, or 7
    waits: int  # mask of counters

    @property
    def wavefronts(self) -> int:
        """Count the clocks of shared memory for a warp, without bank conflicts."""
        if self.opcode.startswith(("LDSM", "STSM")):
            return int(self.opcode[-1]) if self.opcode[-1] in "24" else 1
        width = re.search(r"\.(64|128)\b", self.opcode)
        return int(width.group(1)) // 32 if width else 1


def steps_of(lines: list[str]) -> list[Step]:
    """Parse what nvdisasm writes with ``-hex``; none of it without."""
    steps = []
    for at, line in enumerate(lines[:-1]):
        found = _LINE.match(line)
        word = _WORD.search(lines[at + 1]) if found else None
        if found and word:
            bits, opcode = int(word.group(1), 16) >> 41, found["opcode"]
            kind = next((k for k, pattern in _KINDS.items() if re.match(pattern, opcode)), "")
            fields = (bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            steps.append(Step(opcode, kind, found["rest"], *fields))
    return steps


@dataclass
class Waits:
    """Clocks of a program by cause, and of an SM's shared memory."""

    clocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    wavefronts: int = 0

    def plus(self, other: Waits, times: float) -> Waits:
        """Add ``other`` some times."""
        clocks = {c: self.clocks[c] + times * other.clocks[c] for c in CAUSES}
        return Waits(clocks, self.wavefronts + round(times * other.wavefronts))


class Program:
    """The state of a program whose warps run abreast."""

    def __init__(self, num_warps: int) -> None:
        self.warps = num_warps
        self.abreast = max(1.0, num_warps / 4)  # warps of one scheduler
        self.now = 0.0
        self.ready = dict.fromkeys(range(6), (0.0, "issue"))  # of each counter: when, and why
        self.free = dict.fromkeys(("shared", "special", "product"), 0.0)  # of each unit: when
        self.copies: list[float] = []  # groups of asynchronous copies: when each has arrived
        self.products: list[float] = []  # groups of HGMMA
        self.waits = Waits()

    def run(self, steps: list[Step]) -> None:
        """Take all instructions, one after the other, every branch as not taken."""
        for step in steps:
            self._wait(step)
            if step.kind:
                self._start(step)
            passed = max(step.stall, self.abreast)
            self.waits.clocks["issue"] += passed
            self.now += passed

    def _until(self, when: float, why: str) -> None:
        if when > self.now:
            self.waits.clocks[why] += when - self.now
            self.now = when

    def _wait(self, step: Step) -> None:
        raised = [self.ready[i] for i in range(6) if step.waits >> i & 1]
        if raised:
            self._until(*max(raised))
        if step.opcode.startswith("BAR"):
            self._until(self.now + BARRIER, "barrier")
        elif step.opcode.startswith("WARPGROUP.DEPBAR"):
            self._until(self._all_but(self.products, step), "product")
        elif step.opcode.startswith("DEPBAR"):
            self._until(self._all_but(self.copies, step), "memory")
        elif step.opcode == "LDGDEPBAR":
            self.copies.append(self.now + LATENCY["memory"])

    @staticmethod
    def _all_but(groups: list[float], step: Step) -> float:
        """When all groups but the newest few, whose number is the instruction's, are done."""
        left = re.search(r"0x([0-9a-f]+)", step.rest)
        pending = len(groups) - (int(left.group(1), 16) if left else 0)
        return max(groups[:pending], default=0.0)

    def _start(self, step: Step) -> None:
        unit = step.kind
        begun = max(self.now, self.free.get(unit, 0.0))
        if unit == "product":
            done = begun + self._product_clocks(step)
            self.free[unit] = done
            if "gsb0" in step.rest:
                self.products.append(done + LATENCY[unit])
        elif unit == "shared" and not step.opcode.startswith(("LDC", "ULDC", "FENCE")):
            clocks = step.wavefronts * self.warps
            self.waits.wavefronts += clocks
            done = self.free[unit] = begun + clocks
        elif unit == "special" and step.opcode.startswith("MUFU"):
            done = self.free[unit] = begun + 8 * self.abreast  # 4 of 32 lanes a clock
        else:
            done = begun
        if step.raised != _NONE:
            self.ready[step.raised] = (done + LATENCY[unit], unit)
        if step.read != _NONE:
            self.ready[step.read] = (done, unit)

    def _product_clocks(self, step: Step) -> float:
        """Clocks of the tensor cores, or of shared memory for the operands that lie there."""
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", step.opcode)
        if not shape:
            return 16.0 * self.abreast  # HMMA: half the rate
        m, n, k = map(int, shape.groups())
        held = "gdesc" not in step.rest.split(",")[1]  # the first operand is in registers
        read = 2 * k * (n + (0 if held else m)) / 128
        return max(n * k / 32, read) * self.abreast


def waits_of(steps: list[Step], num_warps: int) -> Waits:
    """Follow a program through ``steps``, once."""
    program = Program(num_warps)
    program.run(steps)
    return program.waits


def waits_of_a_pass(steps: list[Step], num_warps: int) -> Waits:
    """Follow a program through a loop, until its passes are alike; return one."""
    program = Program(num_warps)
    for _ in range(_PASSES):
        program.run(steps)
    first, program.waits = program.waits, Waits()
    for _ in range(_PASSES):
        program.run(steps)
    del first
    return Waits().plus(program.waits, 1 / _PASSES)


_PASSES = 6  # more than a loop has stages
