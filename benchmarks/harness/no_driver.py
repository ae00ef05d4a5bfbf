"""Triton's runtime on a machine without a GPU: kernels are compiled, launches go nowhere.

Everything that the host does for a call is done and can be timed, up to the driver's own launch;
and every launch can be looked at. Results of calls are what was in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedformer._internal import backend as backends
from fusedformer_kernels.runtime import targets

Launched = Callable[[Any, tuple[Any, ...]], None]


class _Utilities:
    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class NoDriver:
    """What Triton asks of a driver, for sm_90."""

    utils = _Utilities()

    def __init__(self, launched: Launched) -> None:
        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source = source

            def __call__(self, *arguments: Any) -> None:
                launched(self.source, arguments)

        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels_go_nowhere(launched: Launched = lambda source, arguments: None) -> None:
    """Let CPU tensors take the kernels of sm_90, which do not run, in this process.

    ``launched`` is called with each compiled kernel's source and the launcher's arguments.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if backends.INTERPRETER_IS_ON:
        raise RuntimeError("kernels_go_nowhere(): unset TRITON_INTERPRET")
    driver.set_active(NoDriver(launched))
    backends.INTERPRETER_IS_ON = True  # CPU tensors have kernels
    targets.assume_target(targets.TARGETS["sm_90"]).__enter__()
