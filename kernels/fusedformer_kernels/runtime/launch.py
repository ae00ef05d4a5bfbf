"""The one place where kernels are launched, so that launches can be counted or compiled instead."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fusedformer_kernels.runtime import steps
from fusedformer_kernels.runtime.boxes import Boxes
from fusedformer_kernels.runtime.targets import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what :func:`launch` was called with."""

    kernel: Any
    grid: tuple[int, ...]
    config: LaunchConfig
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


class Compiled(NamedTuple):
    """How to enqueue a kernel that is compiled."""

    run: Any
    function: Any
    metadata: Any
    owners: tuple[Any, ...]  # which live as long as this


_replacement: Callable[[Launch], None] | None = None
_observer: Callable[[Launch], None] | None = None


def can_be_repeated() -> bool:
    """Tell whether launches may be repeated as they were: nobody wants to see each one."""
    return _IS_KNOWN and _observer is None and _replacement is None and not _is_watched()


def is_interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter."""
    return not isinstance(kernel, triton.JITFunction)


def current_stream(device: torch.device) -> int:
    """The stream that launches on ``device`` go to."""
    stream: int = driver.active.get_current_stream(device.index or 0)
    return stream


def launch(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, *args: Any, **constants: Any
) -> None:
    """Run ``kernel`` on ``grid``: ``args`` are its parameters in order, ``constants`` the rest.

    Triton's own way to a kernel that is compiled already takes several times what it takes to
    enqueue it; what was compiled for arguments of the same kinds is launched directly here.
    """
    if _replacement is not None or _observer is not None:
        names = dict(zip(kernel.arg_names, args, strict=False))
        record = Launch(kernel, grid, config, {**names, **constants})
        if _observer is not None:
            _observer(record)
        if _replacement is not None:
            _replacement(record)
            return
    noted = steps.recorder()
    if noted is not None:
        with steps.recording(None):
            compiled = _run(kernel, grid, config, args, constants)
        noted.launched(kernel, grid, config, args, constants, compiled)
    else:
        _run(kernel, grid, config, args, constants)


def _run(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, args: tuple[Any, ...],
    constants: dict[str, Any],
) -> Compiled | None:  # fmt: skip
    """Enqueue a kernel; how it can be enqueued again, or None."""
    kinds: list[Any] = []
    device = _append_kinds(args, kinds, _counts_of(kernel))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, config, device, kinds, args, constants)
    return _launch(kernel, grid, config, device, kinds, args, constants)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: LaunchConfig,
    device: torch.device,
    kinds: list[Any],
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> Compiled | None:
    key = (id(kernel), config, device, *kinds, *constants, *constants.values())
    known = _compiled.get(key)
    if known is None or _is_watched():
        given = [value.descriptor() if type(value) is Boxes else value for value in args]
        compiled = kernel[grid](*given, **constants, **config.options())
        if _IS_KNOWN and type(compiled) is CompiledKernel and not _is_instrumented():
            run = compiled.run, compiled.function, compiled.packed_metadata
            _compiled[key] = Compiled(*run, (kernel, compiled))
            return _compiled[key]
        return None
    run, function, metadata, _ = known
    width, height, depth = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device.index or 0)
    # The order of constants does not matter: the compiled kernel has them, and looks at none.
    run(
        width, height, depth, stream, function, metadata, None, None, None, *args,
        *constants.values(),
    )  # fmt: skip
    return known


# How to enqueue a compiled kernel, by all that decides which one a launch needs.
_compiled: dict[tuple[Any, ...], Compiled] = {}
# Versions whose specialization _append_kinds follows; AMD's looks at the sizes of buffers too.
_IS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9) and (
    torch.version.hip is None
)


def _is_watched() -> bool:
    """Whether a profiler is to be told of launches, as Triton's own way to a kernel does."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


_runtime = triton.knobs.runtime


def _is_instrumented() -> bool:
    """Whether what is compiled now is for now: measured, checked or changed on the way."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return bool(
        _is_watched() or runtime.debug or runtime.add_stages_inspection_hook
        or compilation.instrumentation_mode
    )  # fmt: skip


_NUMBERS = frozenset({int, float, bool, type(None)})


@functools.cache
def _counts_of(kernel: Any) -> frozenset[int]:
    """Positions of the parameters that Triton does not specialize a kernel on."""
    parameters = getattr(kernel, "params", ())  # none under the interpreter
    return frozenset(i for i, p in enumerate(parameters) if p.do_not_specialize)


@functools.lru_cache(4096)
def _kinds_of_numbers(values: tuple[Any, ...], types: tuple[type, ...]) -> tuple[Any, ...]:
    """Kinds of a tuple without tensors; its types tell 1 from 1.0 and True, which are equal."""
    kinds: list[Any] = []
    _append_kinds(values, kinds)
    return tuple(kinds)


def _width(value: int) -> int:
    """Bits of the integer type that a number is passed as; 65 for the unsigned one of 64."""
    return 32 if -(2**31) <= value < 2**31 else 64 + (value.bit_length() > 63)


def _append_kinds(
    args: tuple[Any, ...], kinds: list[Any], counts: frozenset[int] = frozenset()
) -> Any:
    """Append what Triton compiles a kernel anew for; the device of the last tensor.

    That is a tensor's dtype and whether it is aligned, whether an integer is 1 or a multiple of
    16 and how wide it is, and a constant's value; of an integer among ``counts`` its width alone,
    but for those in tuples: Triton specializes a kernel on them whatever it is told.
    """
    device = None
    append = kinds.append
    for index, value in enumerate(args):
        kind = type(value)
        if kind is int and index in counts:
            append(_width(value))
        elif kind is int:
            if value == 1:
                append(1)
            elif -(2**31) <= value < 2**31:
                append(2 if value & 15 else 16)
            else:
                append((value & 15 == 0, value.bit_length() > 63))
        elif value is None:
            append(None)
        elif kind is float:
            append(float)
        elif isinstance(value, Tensor):
            device = value.device
            append((value.dtype,) if value.data_ptr() & 15 else value.dtype)
        elif not isinstance(value, tuple):
            append(value.kind() if kind is Boxes else (kind, value))
        elif _NUMBERS.issuperset(types := tuple(map(type, value))):
            append(_kinds_of_numbers(value, types))
        else:
            append(len(value))
            device = _append_kinds(value, kinds) or device
    return device


@contextlib.contextmanager
def recorded_launches(*, run: bool) -> Iterator[list[Launch]]:
    """Collect every launch made inside; with ``run=False`` nothing runs (meta tensors will do)."""
    global _observer, _replacement
    previous = _observer, _replacement
    launches: list[Launch] = []
    _observer = launches.append
    _replacement = None if run else (lambda launch: None)
    try:
        yield launches
    finally:
        _observer, _replacement = previous
