"""Make ``torch.cuda`` of a build for the CPU find the fake device.

Torch's Python stays as it is where it can: what it asks of C is answered here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from tests.emulator.device.targets import Properties


class Stream(torch.Stream):
    """Is a stream, on which everything has happened already."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        if "stream_id" in kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device="cuda", priority=0)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """Is an event, which has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_event = 0

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class Graph:
    """Is a graph: all that runs while it is captured runs again by ``replay``."""

    device: ctypes.CDLL
    _last_pool = 0

    def __init__(self, keep_graph: bool = False) -> None:
        self._number = 0
        self._pool: tuple[int, int] = (0, 0)

    @classmethod
    def new_pool(cls) -> tuple[int, int]:
        Graph._last_pool += 1
        return (0, Graph._last_pool)

    def capture_begin(
        self,
        pool: tuple[int, int] | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        if self.device.device_stream() == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._pool = self.new_pool() if pool is None else pool
        self._number = self.device.device_begin_capture(self._pool[1])
        self._check(self._number == 0)

    def capture_end(self) -> None:
        self._check(self.device.device_end_capture())

    def replay(self) -> None:
        self._check(self.device.device_replay(self._number))

    def pool(self) -> tuple[int, int]:
        return self._pool

    def reset(self) -> None:
        if self._number:
            self.device.device_end_graph(self._number)
        self._number = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        pass

    def __del__(self) -> None:
        self.reset()

    def _check(self, failed: bool) -> None:
        if failed:
            raise RuntimeError(self.device.device_error().decode())


def install(device: ctypes.CDLL, properties: Properties) -> None:
    """Replace what the CPU's build of torch lacks.

    Args:
        device: libdevice.so.
        properties: of the GPU that it shall be.
    """
    for name in ("begin_capture", "pool_bytes", "bytes_in_use", "peak_bytes", "stream"):
        getattr(device, f"device_{name}").restype = ctypes.c_int64
    for name in ("new_stream", "set_stream"):
        getattr(device, f"device_{name}").restype = ctypes.c_int64
    for name in ("begin_capture", "replay", "end_graph", "pool_bytes", "set_stream"):
        getattr(device, f"device_{name}").argtypes = [ctypes.c_int64]
    device.device_error.restype = ctypes.c_char_p
    device.device_is_capturing.restype = ctypes.c_bool
    Graph.device = device
    cuda: Any = torch.cuda
    _install_in_c(device)
    _let_storages_be_copied()
    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.CUDAGraph = cuda.graphs.CUDAGraph = Graph
    cuda.graph_pool_handle = cuda.graphs.graph_pool_handle = Graph.new_pool
    capturing = lambda: bool(device.device_is_capturing())
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = capturing
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.get_device_name = lambda device=None: properties.name
    cuda.mem_get_info = lambda device=None: (properties.total_memory, properties.total_memory)
    in_use, peak, reset = (
        device.device_bytes_in_use,
        device.device_peak_bytes,
        device.device_reset_peak,
    )
    cuda.memory_allocated = lambda device=None: int(in_use())
    cuda.max_memory_allocated = lambda device=None: int(peak())
    cuda.reset_peak_memory_stats = lambda device=None: reset()
    cuda.memory_snapshot = lambda mempool_id=None: [
        {"segment_pool_id": (0, pool), "total_size": int(device.device_pool_bytes(pool))}
        for pool in range(1, Graph._last_pool + 1)
    ]
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda._initialized = True
    cuda.default_generators = (torch.Generator("cuda"),)  # the first of all, see runtime.cpp


def let_graphed_callables_read_unwritten(context: Callable[[], Any]) -> None:
    """Let it pass that ``make_graphed_callables`` warms up with gradients that nobody wrote."""
    plain = torch.cuda.make_graphed_callables

    @functools.wraps(plain)
    def wrapped(*args: Any, **named: Any) -> Any:
        with context():
            return plain(*args, **named)

    graphs: Any = torch.cuda.graphs
    torch.cuda.make_graphed_callables = graphs.make_graphed_callables = wrapped


def _let_storages_be_copied() -> None:
    """Make the memory of copies by an operator: storages make none of CUDA in this build."""
    storages: Any = torch.UntypedStorage
    plain_clone, plain_to = storages.clone, storages.to

    def on_device(storage: Any) -> Any:
        memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda")
        return memory.untyped_storage().copy_(storage)

    def clone(self: Any) -> Any:
        return on_device(self) if self.device.type == "cuda" else plain_clone(self)

    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type == "cuda" and self.device.type == "cpu":
            return on_device(self)
        return plain_to(self, device=device, non_blocking=non_blocking)

    storages.clone, storages.to = clone, to


def _install_in_c(device: ctypes.CDLL) -> None:
    """Answer what torch's Python asks of its C."""
    c: Any = torch._C
    cuda: Any = torch.cuda

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        device.device_set_stream(stream_id)

    c._cuda_getDeviceCount = lambda: 1
    c._cuda_getDevice = lambda: 0
    c._cuda_setDevice = lambda index: None
    # Functions of their own each: torch.compile knows them by identity.
    cuda._exchange_device = c._cuda_exchangeDevice = lambda index: 0
    cuda._maybe_exchange_device = c._cuda_maybeExchangeDevice = lambda index: 0
    c._cuda_getCurrentRawStream = lambda index: device.device_stream()
    c._cuda_getCurrentStream = lambda index: (device.device_stream(), 0, 1)
    c._cuda_getDefaultStream = lambda index: (0, 0, 1)
    c._cuda_setStream = set_stream
    c._cuda_synchronize = lambda: None
    c._cuda_emptyCache = lambda: None
    c._host_emptyCache = lambda: None
    c._cuda_isInBadFork = lambda: False
