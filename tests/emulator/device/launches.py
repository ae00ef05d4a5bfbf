"""Take what the fake driver is asked to load and to launch, and hand it to the emulator.

What is found wrong belongs to the launch that did it. It raises there, as an error of CUDA would,
and is noted, for a test that swallows errors.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.emulator.device.emulator import Emulator

_LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32,
    ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p,
)  # fmt: skip
_REPLAY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
_TOO_LONG = re.compile(r"more than \d+ warp instructions")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w(\d+)(?:[^,)\[]*\[(\d+)\])?")
# Kernels that read what nobody wrote on purpose, and drop it: the memory is NaN, so that it would
# show in results if they did not.
_DROPS_UNWRITTEN = {
    "_cross_entropy_rows",  # the padding of rows, which lets a thread load several columns at once
    "_cross_entropy_gradient",
    "_attention_delta",  # rows behind the last packed sequence
}


@dataclass
class Kernel:
    """Is a kernel that was loaded."""

    name: str
    sizes: list[int]  # bytes of each parameter
    launches: int = 0
    cached: int = 0  # of them not by Triton's own way
    instructions: int = 0
    seconds: float = 0.0


@dataclass
class Recorded:
    """Is a launch of a graph."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: list[Any]  # buffers

    def pointers(self) -> Any:
        """Return CUDA's array of pointers to parameters."""
        addresses = [ctypes.addressof(one) for one in self.parameters]
        return (ctypes.c_void_p * max(len(addresses), 1))(*addresses)


@dataclass
class Launches:
    """Runs launches, and notes what is found."""

    emulator: Emulator
    driver: ctypes.CDLL
    device: ctypes.CDLL
    findings: list[str] = field(default_factory=list)
    too_long: Counter[str] = field(default_factory=Counter)
    kernels: dict[int, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._recorded: dict[int, Recorded] = {}
        self._reads_unwritten = False
        self._local = threading.local()
        self._lock = threading.RLock()
        # Kept, for they are called as long as the process lives.
        self._hooks = (_LOAD(self._load), _LAUNCH(self._launch), _REPLAY(self._replay))

    def install(self, arch: int, multiprocessors: int, shared_memory: int) -> None:
        """Let the driver call this."""
        owns = ctypes.cast(self.device.device_owns, ctypes.c_void_p)
        load, launch, _ = self._hooks
        self.driver.driver_set(load, launch, owns, arch, multiprocessors, shared_memory)
        library = self.emulator.library
        self.device.device_announce_to(
            ctypes.cast(library.emulator_allocate, ctypes.c_void_p),
            ctypes.cast(library.emulator_free, ctypes.c_void_p),
        )

    def by_triton(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Triton's own way to a kernel, to tell its launches from cached ones."""

        def wrapped(*args: Any, **named: Any) -> Any:
            self._local.is_triton = True
            try:
                return run(*args, **named)
            finally:
                self._local.is_triton = False

        return wrapped

    @contextlib.contextmanager
    def reading_unwritten(self) -> Iterator[None]:
        """Let every kernel read what nobody wrote."""
        self._reads_unwritten = True
        try:
            yield
        finally:
            self._reads_unwritten = False

    def _is_meant(self, finding: str) -> bool:
        kind, kernel, *_ = f"{finding}  ".split(" ")
        is_unwritten = kind == "unwritten-global"
        return is_unwritten and (self._reads_unwritten or kernel in _DROPS_UNWRITTEN)

    def damage(self) -> list[str]:
        """Return what was written beside allocations, by whatever means, since the last call."""
        text = ctypes.create_string_buffer(1 << 16)
        self.device.device_damage(text, len(text))
        return text.value.decode().splitlines()

    def _load(self, function: int, ptx: bytes, name: bytes) -> int:
        head = ptx[ptx.index(b".entry") :].decode()
        head = head[: head.index("{")]
        sizes = [int(bits) // 8 * int(count or 1) for bits, count in _PARAMETER.findall(head)]
        self.kernels[function] = Kernel(name.decode(), sizes)
        error = self.emulator.load(function, ptx, name)
        return self._fail(f"{name.decode()}: {error}") if error else 0

    def _launch(
        self, function: int, grid: Any, threads: int, shared: int, stream: int, parameters: int
    ) -> int:
        try:
            current = self.device.device_stream()
            if stream != current:
                return self._fail(f"a launch goes to stream {stream} while {current} is current")
            extents = (grid[0], grid[1], grid[2])
            if self.device.device_is_capturing():
                self._record(function, extents, threads, shared, parameters)
                # Operators run in a capture, and may read what this writes. Nothing is judged.
                self.emulator.launch(function, extents, threads, shared, parameters)
                self.emulator.findings()
                return 0
            kernel = self.kernels[function]
            kernel.launches += 1
            kernel.cached += not getattr(self._local, "is_triton", False)
            return self._run(function, extents, threads, shared, parameters)
        except Exception as error:  # nothing may leave a callback of C
            return self._fail(f"the launch of a kernel failed: {error!r}")

    def _run(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, parameters: int
    ) -> int:
        kernel = self.kernels[function]
        with self._lock:
            start, before = time.perf_counter(), self.emulator.instructions
            error = self.emulator.launch(function, grid, threads, shared, parameters)
            kernel.seconds += time.perf_counter() - start
            kernel.instructions += self.emulator.instructions - before
            found = [line for line in self.emulator.findings() if not self._is_meant(line)]
        if error and _TOO_LONG.match(error):
            self.too_long[kernel.name] += 1
            self.driver.driver_set_error(b"too long to emulate")
            return _FAILED
        lines = [*found, *([error] if error else [])]
        if not lines:
            return 0
        return self._fail("\n".join(f"{kernel.name}{grid}: {line}" for line in lines))

    def _record(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, parameters: int
    ) -> None:
        addresses = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        copies = [
            ctypes.create_string_buffer(ctypes.string_at(addresses[i], size), size)
            for i, size in enumerate(self.kernels[function].sizes)
        ]
        number = len(self._recorded) + 1
        self._recorded[number] = Recorded(function, grid, threads, shared, copies)
        self.device.device_record(self._hooks[2], ctypes.c_int64(number))

    def _replay(self, number: int) -> int:
        try:
            one = self._recorded[number]
            pointers = one.pointers()  # alive until the launch is over
            self.kernels[one.function].launches += 1
            return self._run(
                one.function, one.grid, one.threads, one.shared, ctypes.addressof(pointers)
            )
        except Exception as error:
            return self._fail(f"the replay of a launch failed: {error!r}")

    def _fail(self, text: str) -> int:
        self.findings.append(text)
        self.driver.driver_set_error(text.encode())
        return _FAILED
