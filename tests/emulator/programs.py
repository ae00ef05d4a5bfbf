"""Small kernels written in PTX, for tests that a compiler would not let fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.emulator.machine import Compiled, Machine

_HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry program({parameters})
.reqntid {threads}
{{
.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<99>;
.reg .b64 %rd<20>;
"""


def program(
    body: str, parameters: Sequence[str] = ("u64",), *, threads: int = 32, shared: int = 4096
) -> Compiled:
    """Make a kernel of ``body``, whose statements stand in lines of their own, counted from 1.

    ``%r0`` is the thread, ``%rd0`` to ``%rd9`` are the parameters that are pointers.
    """
    names = [f"program_param_{index}" for index in range(len(parameters))]
    declared = ", ".join(f".param .{k} {n}" for k, n in zip(parameters, names, strict=True))
    lines = ["mov.u32 %r0, %tid.x;"]
    for index, (kind, name) in enumerate(zip(parameters, names, strict=True)):
        if kind == "u64":
            lines.append(f"ld.param.b64 %rd{index}, [{name}];")
    for number, line in enumerate(body.strip().splitlines(), 1):
        lines += [f".loc 1 {number} 0", line.strip()]
    text = _HEADER.format(parameters=declared, threads=threads) + "\n".join(lines)
    return Compiled("program", f'{text}\nret;\n}}\n.file 1 "/a/program.py"\n', threads, shared)


def run(kernel: Compiled, grid: int, *arguments: Any) -> None:
    """Launch a kernel in which nothing is found."""
    machine = Machine()
    machine.launch(kernel, (grid,), *arguments)
    assert machine.findings() == []
