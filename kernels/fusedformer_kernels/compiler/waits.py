"""Follow one program of sm_90 through its machine code: where its warps wait, clock by clock.

ptxas writes into each instruction how long its warp stalls, which counter its result lowers, and
which counters it waits for (nvdisasm prints the bits with ``-hex``). Loads, shuffles, exponentials
and products take no fixed time: they get a nominal one here, and each wait is put down to what was
waited for. The warps of a program run abreast, alone on their SM; :mod:`prediction` says what other
programs do meanwhile. Layout of the bits: Jia et al., arXiv:1804.06826, section 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusedformer_kernels.compiler.machine_code import Mix, count_mix, inner_loops, pick_main

# Nominal clocks until a result is there, on an idle GPU. Sources: Jia et al., arXiv:1804.06826, and
# Luo et al., arXiv:2402.13499; for memory a number between those of an L2 hit and of DRAM.
LATENCY: Mapping[str, float] = {"memory": 600, "shared": 30, "special": 24, "product": 32}
BARRIER = 30.0  # clocks until all warps go on
# What a program waits for. "cache" is memory that a loop of products asks for, most of it in L2.
CAUSES = ("issue", "product", "memory", "cache", "shared", "special", "barrier")
UNITS = ("product", "issue", "special", "shared")  # of an SM

_KINDS = {
    # An ordered load, which looks at what another program has done, is as fast as that one.
    "memory": r"LDG(?!\S*STRONG)|ATOM|RED|LDL|LD\b|UTMALDG|SYNCS|MEMBAR",
    "shared": r"LDS|STS|LDC|ULDC|FENCE",
    "special": r"MUFU|SHFL|F2I|I2F|F2F|FRND|S2R|S2UR|REDUX|VOTE|R2UR|POPC|FLO|BREV",
    "product": r"HGMMA|HMMA",
}
_LINE = re.compile(
    r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*?);\s+/\* 0x"
)
_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_NO_COUNTER = 7
_PASSES = 6  # of a loop, until they are alike: more than it has stages


@dataclass(frozen=True)
class Step:
    """One instruction, and what ptxas says of its timing."""

    opcode: str
    kind: str  # what its result takes the time of, "" if that time is fixed
    rest: str
    stall: int
    result: int  # counter that says when its result is there, or 7
    read: int  # counter that says when its operands were read, or 7
    waits: int  # mask of counters

    @property
    def wavefronts(self) -> int:
        """Count the clocks of shared memory for a warp, without bank conflicts."""
        if self.opcode.startswith(("LDSM", "STSM")):
            return int(self.opcode[-1]) if self.opcode[-1] in "24" else 1
        width = re.search(r"\.(64|128)\b", self.opcode)
        return int(width.group(1)) // 32 if width else 1


@dataclass
class Work:
    """What a program does in one pass of its loop, or once.

    Attributes:
        clocks: of the program alone, by what it waits for.
        units: clocks of an SM for which it occupies each unit.
        loaded_bytes: from global memory, by all its warps.
    """

    clocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    units: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    loaded_bytes: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """Add ``other`` some times."""
        return Work(
            {name: self.clocks[name] + times * other.clocks[name] for name in CAUSES},
            {name: self.units[name] + times * other.units[name] for name in UNITS},
            self.loaded_bytes + times * other.loaded_bytes,
        )


def work_of(code: str, num_warps: int) -> tuple[Work, Work]:
    """Follow a program through ``code``: a pass of its loop, and all that runs once.

    Of a kernel with products the loop is the main one: the others are the same with tests of bounds
    and have few passes. In other kernels each inner loop is a part of one pass.
    """
    lines = code.splitlines()
    inner = inner_loops(lines)
    mixes = [count_mix(lines[first : last + 1], True) for first, last in inner]
    chosen = list(zip(inner, mixes, strict=True))
    if any(mix.product_flops for mix in mixes):
        main = pick_main(mixes)
        chosen = [pair for pair in chosen if pair[1] is main]
    a_pass = Work()
    for (first, last), mix in chosen:
        # The bits of the last instruction are in the line after it.
        steps = steps_of(lines[first : last + 2])
        a_pass = a_pass.plus(_work(steps, mix, num_warps, _PASSES))
    inside = {at for first, last in inner for at in range(first, last + 1)}
    rest = [line for at, line in enumerate(lines) if at not in inside]
    return a_pass, _work(steps_of(rest), count_mix(rest, False), num_warps, 1)


def steps_of(lines: list[str]) -> list[Step]:
    """Parse what nvdisasm writes with ``-hex``."""
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


def _work(steps: list[Step], mix: Mix, num_warps: int, passes: int) -> Work:
    """Follow a program through a loop of ``steps``, and give one of its later passes."""
    program = _Program(num_warps)
    for _ in range(passes - 1):
        program.run(steps)
    program.clocks, program.wavefronts = dict.fromkeys(CAUSES, 0.0), 0
    for _ in range(passes):
        program.run(steps)
    clocks = {name: spent / passes for name, spent in program.clocks.items()}
    if mix.in_loop and mix.product_flops:
        clocks["cache"], clocks["memory"] = clocks["memory"], 0.0
    busy = mix.cycles(num_warps)
    units = {
        "product": busy["product"],
        "issue": busy["issue"],
        "special": busy.get("exp2", 0.0) + busy.get("mufu", 0.0),
        "shared": program.wavefronts / passes,
    }
    return Work(clocks, units, mix.loaded_bytes * num_warps)


class _Program:
    """The state of a program whose warps run abreast."""

    def __init__(self, num_warps: int) -> None:
        self.warps = num_warps
        self.abreast = max(1.0, num_warps / 4)  # warps of one scheduler
        self.now = 0.0
        self.ready = dict.fromkeys(range(6), (0.0, "issue"))  # of each counter: when, and why
        self.free = dict.fromkeys(("shared", "special", "product"), 0.0)
        self.copies: list[float] = []  # of each group of asynchronous copies: when it is there
        self.products: list[float] = []  # of each group of HGMMA: when it is done
        self.clocks = dict.fromkeys(CAUSES, 0.0)
        self.wavefronts = 0

    def run(self, steps: list[Step]) -> None:
        """Take all instructions, one after the other, with every branch as if not taken."""
        for step in steps:
            self._wait(step)
            if step.kind:
                self._start(step)
            passed = max(step.stall, self.abreast)
            self.clocks["issue"] += passed
            self.now += passed

    def _until(self, when: float, why: str) -> None:
        if when > self.now:
            self.clocks[why] += when - self.now
            self.now = when

    def _wait(self, step: Step) -> None:
        counters = [self.ready[i] for i in range(6) if step.waits >> i & 1]
        if counters:
            self._until(*max(counters))
        if step.opcode.startswith("BAR"):
            self._until(self.now + BARRIER, "barrier")
        elif step.opcode.startswith("WARPGROUP.DEPBAR"):
            self._until(_all_but_newest(self.products, step), "product")
        elif step.opcode.startswith("DEPBAR"):
            self._until(_all_but_newest(self.copies, step), "memory")
        elif step.opcode == "LDGDEPBAR":
            self.copies.append(self.now + LATENCY["memory"])

    def _start(self, step: Step) -> None:
        begun = max(self.now, self.free.get(step.kind, 0.0))
        done = begun + self._occupied(step)
        if done > begun:
            self.free[step.kind] = done
        if step.kind == "product" and "gsb0" in step.rest:
            self.products.append(done + LATENCY["product"])
        if step.result != _NO_COUNTER:
            self.ready[step.result] = (done + LATENCY[step.kind], step.kind)
        if step.read != _NO_COUNTER:
            self.ready[step.read] = (done, step.kind)

    def _occupied(self, step: Step) -> float:
        """Count the clocks for which all warps' instruction occupies its unit."""
        if step.kind == "product":
            return _product_clocks(step) * self.abreast
        if step.opcode.startswith("MUFU"):
            return 8 * self.abreast  # 4 of 32 lanes a clock
        if step.kind == "shared" and not step.opcode.startswith(("LDC", "ULDC", "FENCE")):
            clocks = step.wavefronts * self.warps
            self.wavefronts += clocks
            return clocks
        return 0.0


def _all_but_newest(groups: list[float], step: Step) -> float:
    """When all groups are done but the newest few, whose number is the instruction's operand."""
    newest = re.search(r"0x([0-9a-f]+)", step.rest)
    pending = len(groups) - (int(newest.group(1), 16) if newest else 0)
    return max(groups[: max(pending, 0)], default=0.0)


def _product_clocks(step: Step) -> float:
    """Count a warp group's clocks of the tensor cores, or of shared memory if that takes longer."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", step.opcode)
    if not shape:
        return 16.0  # HMMA.16816: half the rate
    m, n, k = map(int, shape.groups())
    in_registers = "gdesc" not in step.rest.split(",")[1]  # the first operand
    read = 2 * k * (n + (0 if in_registers else m)) / 128
    return max(n * k / 32, read)
