"""Compile recorded launches for a target that need not be present, and read what came out.

Works with triton's own compiler and the disassemblers in its wheel; no GPU or driver is touched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedformer_kernels.compiler.descriptors import wrong_descriptors
from fusedformer_kernels.compiler.machine_code import main_loop, programs_per_multiprocessor
from fusedformer_kernels.compiler.waits import Work, work_of
from fusedformer_kernels.runtime.boxes import Boxes
from fusedformer_kernels.runtime.launch import Launch
from fusedformer_kernels.runtime.targets import Target

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """Facts read from the machine code of one kernel."""

    registers: int
    shared_bytes: int
    spills: int  # instructions that store to or load from spilled registers
    tensor_core: str  # name of the widest tensor-core instruction, "" if none
    tensor_core_count: int
    waits: int  # WARPGROUP.DEPBAR on Hopper
    tma_loads: int
    exp2: int  # MUFU.EX2
    compile_seconds: float
    programs: int = 0  # that an SM holds at once; of sm_90 alone, as is what follows
    loop: Mapping[str, int] = field(default_factory=dict)  # warp instructions of the main loop
    cycles: Mapping[str, float] = field(default_factory=dict)  # of an SM's units for one pass of it
    loops: bool = False  # whether there is one; if not, the above are of all the code
    a_pass: Work = field(default_factory=Work)  # what a program does and waits for in the loop,
    once: Work = field(default_factory=Work)  # and what besides
    wrong_descriptors: tuple[str, ...] = ()  # products of sm_90 that may read the wrong memory

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ast_source(launch: Launch) -> ASTSource:
    """Build the specialization that triton's own launcher would compile for these arguments."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def describe(value: Any, path: tuple[int, ...], is_constant: bool, is_count: bool) -> Any:
        if isinstance(value, tuple) and not is_constant:
            # Triton leaves numbers alone that it is told not to specialize on, but not in tuples.
            parts = [describe(part, (*path, i), False, False) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        is_one = isinstance(value, int) and value == 1 and not is_count
        if is_constant or value is None or is_one:
            constants[path] = value
            if len(path) == 1:
                attributes[path] = []
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPE_NAMES[value.dtype]
        if isinstance(value, Boxes):
            box = ",".join(map(str, value.block_shape))
            return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}[{box}],{value.layout!r}>"
        if isinstance(value, int):
            if not is_count:
                attributes[path] = [["tt.divisibility", 16]] if value % 16 == 0 else []
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = describe(
            value, (index,), parameter.is_constexpr, parameter.do_not_specialize
        )
    return source_class(launch.kernel)(launch.kernel, signature, constants, attributes)


def source_class(kernel: Any) -> type[ASTSource]:
    """Return the class that holds the source of a kernel, written in Triton or in Gluon."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource  # costs all imports of Gluon

    return GluonASTSource


# Cases share kernels, and a disassembler takes a quarter of a second to begin.
_compiled: dict[tuple[str, GPUTarget, tuple[tuple[str, int], ...]], Compiled] = {}


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile one launch for ``target``; raises what the compiler raises."""
    source, options = ast_source(launch), launch.config.options()
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    key = source.hash(), gpu, tuple(options.items())
    if key not in _compiled:
        _compiled[key] = _compile(source, gpu, options)
    return _compiled[key]


def _compile(source: ASTSource, gpu: GPUTarget, options: dict[str, int]) -> Compiled:
    start = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options=options)
    seconds = time.perf_counter() - start
    shared = int(compiled.metadata.shared)
    if gpu.backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], shared, seconds)
    if gpu.arch != 90:
        return _read_cubin(compiled.asm["cubin"], shared, seconds)
    warps = int(compiled.metadata.num_warps)
    # Where warps are specialized there are more: four that copy, and the others have the main loop.
    looping = warps if warps == options["num_warps"] else warps - 4
    return _read_cubin(compiled.asm["cubin"], shared, seconds, warps, looping)


def _read_cubin(
    cubin: bytes, shared: int, seconds: float, hopper_warps: int = 0, looping: int = 0
) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output_of(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], str(path)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip

        usage = output_of("cuobjdump", "-res-usage")
        # No dataflow: labels are there without. In hex are the bits that waits.py reads.
        code = output_of("nvdisasm", "-c", "-ndf", "-hex")
    found = re.search(r"REG:(\d+)", usage)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    name, number = "", 0
    for instruction in (r"UTC\w*MMA", "HGMMA", "HMMA"):
        number = count(rf"\b{instruction}\b")
        if number:
            name = instruction.replace(r"\w*", "*")
            break
    registers = int(found.group(1)) if found else -1
    of_hopper: dict[str, Any] = {}
    if hopper_warps:
        mix = main_loop(code)
        a_pass, once = work_of(code, looping)
        of_hopper = {
            "programs": programs_per_multiprocessor(registers, shared, hopper_warps),
            "loop": mix.counts, "cycles": mix.cycles(looping), "loops": mix.in_loop,
            "a_pass": a_pass, "once": once,
            "wrong_descriptors": tuple(wrong_descriptors(code)),
        }  # fmt: skip
    return Compiled(
        registers=registers,
        shared_bytes=shared,
        spills=count(r"\b(?:STL|LDL)\b"),
        tensor_core=name,
        tensor_core_count=number,
        waits=count(r"WARPGROUP\.DEPBAR"),
        tma_loads=count(r"\bUTMALDG\b"),
        exp2=count(r"MUFU\.EX2"),
        compile_seconds=seconds,
        **of_hopper,
    )


def _read_amdgcn(code: str, shared: int, seconds: float) -> Compiled:
    def number(pattern: str) -> int:
        found = re.search(pattern, code)
        return int(found.group(1)) if found else 0

    matrix = len(re.findall(r"\bv_mfma_", code))
    return Compiled(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        shared_bytes=shared,
        spills=number(r"\.vgpr_spill_count:\s+(\d+)"),
        tensor_core="MFMA" if matrix else "",
        tensor_core_count=matrix,
        waits=0,
        tma_loads=0,
        exp2=len(re.findall(r"\bv_exp_f32", code)),
        compile_seconds=seconds,
    )
