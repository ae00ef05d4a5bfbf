"""Runs kernels that Triton compiled for a GPU on CPU tensors, by the PTX emulator.

>>> machine = Machine()
>>> kernel = compiled("module:scale", "sm_90", {"x": "*fp32"}, {"N": 64})
>>> machine.launch(kernel, (1,), x)
>>> assert not machine.findings()
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tests.emulator.build import FOLDER, emulator_library

from fusedformer_kernels.runtime.boxes import Boxes

REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class Compiled:
    """The PTX of a kernel and what a launch of it needs; ``threads`` of a block."""

    name: str
    ptx: str
    threads: int
    shared: int

    @property
    def parameters(self) -> list[str]:
        """The types of the parameters in PTX, as ``u64`` or ``b8[128]``."""
        start = self.ptx.index(f".entry {self.name}(")
        header = self.ptx[start : self.ptx.index(")", start)] + "\n"
        found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)[^,]*?(\[\d+\])?[,\n]", header)
        return [kind + size for kind, size in found]


class TensorMap(ctypes.Structure):
    """A descriptor of boxes of a tensor, as core/tensor_map.h has it."""

    _fields_ = (
        ("magic", ctypes.c_uint64), ("dimensions", ctypes.c_uint32), ("element", ctypes.c_uint32),
        ("base", ctypes.c_uint64), ("swizzle", ctypes.c_uint32), ("box", ctypes.c_uint32 * 5),
        ("sizes", ctypes.c_int32 * 5), ("padding", ctypes.c_uint32),
        ("strides", ctypes.c_uint64 * 5), ("rest", ctypes.c_uint8 * 16),
    )  # fmt: skip

    def __init__(self, tensor: torch.Tensor, box: Sequence[int], swizzle: int) -> None:
        element = tensor.element_size()
        assert tensor.stride(-1) == 1 and not tensor.data_ptr() % 16
        super().__init__(0x70616D20726F736E, tensor.ndim, element, tensor.data_ptr(), swizzle)
        self.tensor = tensor
        for index, (extent, size, stride) in enumerate(
            zip(reversed(box), reversed(tensor.shape), reversed(tensor.stride()), strict=True)
        ):
            self.box[index], self.sizes[index] = extent, size
            self.strides[index] = stride * element
            assert not index or not stride * element % 16


@functools.cache
def library() -> ctypes.CDLL:
    """Load the emulator, which is built if it has to be."""
    loaded = ctypes.CDLL(str(emulator_library()))
    loaded.emulator_load.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p]
    loaded.emulator_allocate.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    loaded.emulator_free.argtypes = [ctypes.c_uint64]
    loaded.emulator_launch.argtypes = [
        ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32, ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_void_p),
    ]  # fmt: skip
    loaded.emulator_configure.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulator_instructions.restype = ctypes.c_uint64
    return loaded


_NUMBERS = {
    "u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "f32": ctypes.c_float, "u16": ctypes.c_uint16,
    "u8": ctypes.c_uint8, "b64": ctypes.c_uint64, "b32": ctypes.c_uint32, "b8": ctypes.c_uint8,
    "s32": ctypes.c_int32, "s64": ctypes.c_int64,
}  # fmt: skip
_handles = itertools.count(1)


class Machine:
    """A GPU whose global memory is that of the tensors that launches are given."""

    def __init__(self, **settings: int) -> None:
        self.library = library()
        defaults = {"check": 1, "order": 0, "budget": 0, "late": 1}
        defaults |= {"fenced_copies": 1, "fenced_operands": 0}
        for name, value in {**defaults, **settings}.items():
            self.library.emulator_configure(name.encode(), value)
        self.handles: dict[str, int] = {}
        self.findings()

    def load(self, ptx: str, name: str = "") -> int:
        """Parse a kernel; RuntimeError names what the emulator does not know."""
        if ptx not in self.handles:
            handle = next(_handles)
            if self.library.emulator_load(handle, ptx.encode(), name.encode()):
                raise RuntimeError(f"emulator: {self.library.emulator_error().decode()}")
            self.handles[ptx] = handle
        return self.handles[ptx]

    @contextmanager
    def allocated(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let kernels touch the memory of ``tensors``, and no other."""
        spans = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        for base, size in spans.items():
            self.library.emulator_allocate(base, size)
        try:
            yield
        finally:
            for base in spans:
                self.library.emulator_free(base)

    def launch(self, kernel: Compiled, grid: Sequence[int], *arguments: Any) -> None:
        """Run ``kernel`` on tensors and numbers, as its signature has them; constants left out.

        RuntimeError where it cannot go on; what it does wrong is for ``findings``.
        """
        handle = self.load(kernel.ptx, kernel.name)
        kinds = kernel.parameters
        values: list[Any] = [
            _parameter(kind, value) for kind, value in zip(kinds, arguments, strict=False)
        ]
        # The last two, which Triton adds, point to scratch memory that no kernel here has.
        values += [ctypes.c_uint64(0)] * (len(kinds) - len(values))
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid)))
        tensors = [a.tensor if isinstance(a, TensorMap) else a for a in arguments]
        with self.allocated([t for t in tensors if isinstance(t, torch.Tensor)]):
            if self.library.emulator_launch(handle, sizes, kernel.threads, kernel.shared, pointers):
                raise RuntimeError(f"emulator: {self.library.emulator_error().decode()}")

    def findings(self) -> list[str]:
        """Take what was found since the last call, one line each."""
        text = ctypes.create_string_buffer(REPORT_BYTES)
        self.library.emulator_report(text, REPORT_BYTES)
        return text.value.decode().splitlines()

    @contextmanager
    def taking_launches(
        self,
        target_name: str,
        changed: Callable[[Any], Any] | None = None,
        edited: Callable[[Compiled], Compiled] | None = None,
    ) -> Iterator[None]:
        """Run what the library's launchers launch inside, on CPU tensors, as on ``target_name``.

        A fault is planted by ``changed``, which gives the launch that is run in place of another,
        or by ``edited``, which does so with kernels.
        """
        from fusedformer_kernels.compiler.ahead_of_time import ast_source
        from fusedformer_kernels.runtime import launch as launches
        from fusedformer_kernels.runtime.targets import TARGETS, assume_target

        def run(launch: launches.Launch) -> None:
            launch = changed(launch) if changed else launch
            source = ast_source(launch)
            kernel = compile_source(source, target_name, launch.config.options())
            kernel = edited(kernel) if edited else kernel
            given = [launch.arguments[name] for name in source.signature]
            arguments = list(_passed(tuple(given), tuple(source.signature.values())))
            self.launch(kernel, launch.grid, *arguments)

        previous, launches._replacement = launches._replacement, run
        try:
            with assume_target(TARGETS[target_name]):
                yield
        finally:
            launches._replacement = previous

    @property
    def instructions(self) -> int:
        """Count the warp instructions that were run."""
        return int(self.library.emulator_instructions())


def _parameter(kind: str, value: Any) -> Any:
    """Make what the driver would be pointed to for an argument."""
    if isinstance(value, TensorMap):
        assert kind == f"b8[{ctypes.sizeof(value)}]", kind
        return value
    return _NUMBERS[kind](value.data_ptr() if isinstance(value, torch.Tensor) else value)


def _passed(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the arguments that a compiled kernel takes: those that are no constants."""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple):
            yield from _passed(value, kind)
        elif isinstance(value, Boxes):
            yield from (_map_of(value), *value.shape, *value.strides)
        elif kind != "constexpr":
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                raise ValueError("kernels are compiled for pointers that are multiples of 16")
            yield value


def _map_of(boxes: Boxes) -> TensorMap:
    """Make what the driver would of the library's ``Boxes``; a message has one swizzled row."""
    tensor, swizzle = boxes.base, boxes.layout.swizzle_byte_width
    *outer, inner = boxes.block_shape
    box = (*outer, min(inner, swizzle // tensor.element_size()))
    return TensorMap(tensor.as_strided(boxes.shape, boxes.strides), box, swizzle)


def target(name: str) -> Any:
    """Make Triton's description of a GPU, of a name as ``sm_90``."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


@contextmanager
def without_ptxas() -> Iterator[None]:
    """Let Triton compile to PTX and no further: machine code is not needed here.

    What it keeps lies in a folder of its own: elsewhere the machine code is wanted.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    kept = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: b""
    try:
        with knobs.cache.scope():
            knobs.cache.dir = str(FOLDER / "ptx-cache")
            yield
    finally:
        CUDABackend.make_cubin = kept


def compile_source(source: Any, target_name: str, options: Mapping[str, Any]) -> Compiled:
    """Compile Triton's ``ASTSource`` to PTX."""
    import triton

    with without_ptxas():
        made = triton.compile(source, target=target(target_name), options=dict(options))
    threads = 32 * made.metadata.num_warps
    return Compiled(made.metadata.name, made.asm["ptx"], threads, made.metadata.shared)


def compiled(
    function: str,
    target_name: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    **options: Any,
) -> Compiled:
    """Compile a ``triton.jit`` function, named as ``module:name``, in a process for compilers.

    Pointers are taken to be multiples of 16. ``signature`` gives the parameters that are no
    constants, as ``{"x": "*fp32", "n": "i32"}``.
    """
    return in_compiler(_compiled, function, target_name, signature, constants or {}, options)


def _compiled(
    function: str,
    target_name: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Compiled:
    from fusedformer_kernels.compiler.ahead_of_time import source_class

    module, name = function.split(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    kinds = {name: signature.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if kinds[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = source_class(kernel)(kernel, kinds, values, attributes)
    return compile_source(source, target_name, options)


Result = TypeVar("Result")


def in_compiler(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function here, or in another process if kernels are interpreted in this one."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return function(*arguments)
    return _compilers().submit(function, *arguments).result()


@functools.cache
def _compilers() -> ProcessPoolExecutor:
    """Start a process without Triton's interpreter, which is on or off for the whole of one."""
    kept = os.environ.pop("TRITON_INTERPRET")
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        os.environ["TRITON_INTERPRET"] = kept
    return pool
