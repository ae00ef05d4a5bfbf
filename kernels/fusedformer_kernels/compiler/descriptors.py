"""Check that the wgmma instructions of a disassembled sm_90 kernel get the right descriptors.

HGMMA reads its tiles from shared memory through 64-bit descriptors in uniform registers. The high
half of each (swizzle and strides) follows from the tile's layout alone, so machine code that is
right loads a constant. ptxas of CUDA 12 and 13.0 (Triton 3.6 and 3.7) does not always: where two
tiles of one loop lie at the same address with different swizzles, it can add the offsets of the
later steps to registers that nobody wrote, or that another loop left behind. On an H200 attention
was then 40 to 100% off, or ended in an illegal access. So constants are followed here through the
code, over all paths, to every HGMMA.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

# What a register holds: atoms that are xored together. An int is a constant; anything else names
# a value that is not known. Xor, because ptxas swaps registers by three of them.
Value = frozenset[Hashable]
State = dict[str, Value]

_INSTRUCTION = re.compile(
    r"\s+/\*(?P<at>[0-9a-f]+)\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<rest>.*?)\s*;"
)
_REGISTER = re.compile(r"(U?R)(\d+)")
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Instruction:
    """One line of nvdisasm's output."""

    at: str
    predicated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclass
class Block:
    """Instructions that run one after the other, and the indices of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    followers: list[int] = field(default_factory=list)


def wrong_descriptors(code: str) -> list[str]:
    """List the HGMMA instructions of ``code`` whose descriptors are not constants."""
    if "HGMMA" not in code:
        return []
    blocks = _blocks(code)
    entries: dict[int, State] = {0: {}}
    pending = [0]
    while pending:
        index = pending.pop(0)
        state = dict(entries[index])
        for instruction in blocks[index].instructions:
            _execute(instruction, state)
        for follower in blocks[index].followers:
            merged = _merge(entries.get(follower), state, follower)
            if merged != entries.get(follower):
                entries[follower] = merged
                pending.append(follower)
    found = []
    for index, entry in entries.items():
        state = dict(entry)
        for instruction in blocks[index].instructions:
            if instruction.opcode.startswith("HGMMA"):
                unknown = [r for r in _high_halves(instruction) if _constant(state, r) is None]
                if unknown:
                    text = f"{instruction.opcode} {', '.join(instruction.operands)}"
                    found.append(f"{text} at {instruction.at}: {', '.join(unknown)}")
            _execute(instruction, state)
    return found


def _blocks(code: str) -> list[Block]:
    """Split ``code`` in blocks and find which may follow which."""
    blocks, labels, jumps = [Block()], dict[str, int](), dict[int, str]()
    for line in code.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label.group(1)] = len(blocks) - 1
        parsed = _INSTRUCTION.match(line)
        if not parsed:
            continue
        rest = re.split(r",\s*(?![^\[]*\])", parsed["rest"])
        operands = tuple(operand.strip() for operand in rest if operand.strip())
        instruction = Instruction(
            parsed["at"], bool(parsed["predicate"]), parsed["opcode"], operands
        )
        blocks[-1].instructions.append(instruction)
        if re.match(r"BRA|EXIT|RET", instruction.opcode):
            target = re.search(r"`\((\.L_\w+)\)", parsed["rest"])
            if target:
                jumps[len(blocks) - 1] = target.group(1)
            blocks.append(Block())
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        ends = last is not None and re.match(r"BRA|EXIT|RET", last.opcode)
        # A branch may have its condition as an operand.
        conditional = last is not None and (
            last.predicated or any(re.fullmatch(r"!?U?P\d", o) for o in last.operands)
        )
        if (not ends or conditional) and index + 1 < len(blocks):
            block.followers.append(index + 1)
        if jumps.get(index) in labels:
            block.followers.append(labels[jumps[index]])
    return blocks


def _merge(known: State | None, other: State, block: int) -> State:
    """Keep the values that hold whichever way ``block`` is reached."""
    if known is None:
        return dict(other)
    return {
        register: value
        if other.get(register) == value
        else frozenset([("merge", block, register)])
        for register, value in known.items()
    }


def _execute(instruction: Instruction, state: State) -> None:
    """Change ``state`` as ``instruction`` does."""
    written = _results(instruction, state)
    for register, value in written.items():
        if instruction.predicated and state.get(register) != value:
            value = frozenset([(instruction.at, register)])
        state[register] = value


def _results(instruction: Instruction, state: State) -> State:
    """Find the registers that ``instruction`` writes, with their values."""
    operands = instruction.operands
    if not operands or not _REGISTER.fullmatch(operands[0]):
        return {}
    opcode, first = instruction.opcode, operands[0]
    sources = [o.replace(".reuse", "") for o in operands[1:] if not re.fullmatch(r"!?U?P\w+", o)]

    def fresh(count: int) -> State:
        registers = [_next(first, i) for i in range(count)]
        return {r: frozenset([(instruction.at, r)]) for r in registers}

    result = fresh(_width(opcode))
    if opcode.startswith("CS2R") and sources == ["SRZ"]:
        return dict.fromkeys(result, frozenset([0]))
    if opcode == "UIADD3.64":
        for half, register in enumerate(result):
            total = _sum(state, [_half(source, half) for source in sources])
            result[register] = result[register] if total is None else frozenset([total])
        return result
    if re.fullmatch(r"U?MOV|R2UR(\.BROADCAST)?", opcode):
        return result | {first: _value(state, sources[0])}
    if re.fullmatch(r"IMAD(\.X|\.U32|\.MOV|\.MOV\.U32)?", opcode) and sources[:2] == ["RZ", "RZ"]:
        return result | {first: _value(state, sources[2])}
    total = None
    if re.fullmatch(r"U?IADD3(\.X)?|VIADD", opcode):  # a carry never reaches the high half
        total = _sum(state, sources)
    elif re.fullmatch(r"U?LOP3\.LUT", opcode) and sources[3] == "0xfc":  # or
        total = 0
        for source in sources[:3]:
            constant = _constant(state, source)
            total = None if total is None or constant is None else total | constant
    elif re.fullmatch(r"U?LOP3\.LUT", opcode) and sources[2:4] in (["URZ", "0x3c"], ["RZ", "0x3c"]):
        return result | {first: _xor(_value(state, sources[0]), _value(state, sources[1]))}
    return result if total is None else result | {first: frozenset([total])}


def _width(opcode: str) -> int:
    """Count the registers that an instruction writes."""
    accumulator = re.match(r"HGMMA\.64x(\d+)x", opcode)
    if accumulator:
        return int(accumulator.group(1)) // 2
    if ".128" in opcode or opcode.startswith(("HMMA", "LDSM")):
        return 4
    return 2 if re.search(r"\.64\b|WIDE|CS2R", opcode) else 1


def _high_halves(instruction: Instruction) -> list[str]:
    """Find the registers with the high halves of an HGMMA's descriptors, of A and B or B alone."""
    text = " ".join(instruction.operands)
    found = re.search(r"gdesc\[UR(\d+)\]", text)
    if not found:
        return []
    first = int(found.group(1))
    from_registers = _REGISTER.fullmatch(instruction.operands[1].replace(".reuse", ""))
    return [f"UR{first + 3}"] if from_registers else [f"UR{first + 1}", f"UR{first + 3}"]


def _next(register: str, by: int) -> str:
    found = _REGISTER.fullmatch(register)
    assert found is not None
    return f"{found.group(1)}{int(found.group(2)) + by}"


def _half(operand: str, half: int) -> str:
    """Name one of the two words of an operand of 64 bits."""
    if not half or not _REGISTER.fullmatch(operand):
        return "RZ" if half else operand
    return _next(operand, 1)


def _value(state: State, operand: str) -> Value:
    """Look up the value of an operand of 32 bits."""
    text = operand.lstrip("-~")
    if text in ("RZ", "URZ"):
        value: Value = frozenset([0])
    elif text.startswith("0x"):
        value = frozenset([int(text, 16)])
    else:
        value = state.get(text, frozenset([("entry", text)]))
    if text == operand:
        return value
    constant = _as_constant(value)
    if constant is None:
        return frozenset([(operand[0], value)])
    return frozenset([(-constant if operand[0] == "-" else ~constant) & _WORD])


def _as_constant(value: Value) -> int | None:
    (atom, *more) = value or (0,)
    return atom if isinstance(atom, int) and not more else None


def _constant(state: State, operand: str) -> int | None:
    return _as_constant(_value(state, operand))


def _sum(state: State, operands: list[str]) -> int | None:
    constants = [_constant(state, operand) for operand in operands]
    known = [c for c in constants if c is not None]
    return sum(known) & _WORD if len(known) == len(constants) else None


def _xor(a: Value, b: Value) -> Value:
    constant = 0
    for atom in (*a, *b):
        constant ^= atom if isinstance(atom, int) else 0
    atoms = {atom for atom in a ^ b if not isinstance(atom, int)}
    return frozenset(atoms | ({constant} if constant or not atoms else set()))
