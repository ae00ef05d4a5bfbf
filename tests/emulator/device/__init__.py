"""A fake "cuda" device: the host's memory, torch's kernels for the CPU, and emulated PTX.

``install`` must be called before anything imports torch or triton. From then on this process has
one GPU. Its tensors live in the host's memory between guards; operators of torch run the host's
kernels on them; Triton compiles as ever, and its own launcher calls a driver that hands each launch
to the emulator.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from tests.emulator.build import FOLDER
from tests.emulator.device import build
from tests.emulator.device.emulator import Emulator
from tests.emulator.device.launches import Launches
from tests.emulator.device.targets import TARGETS

_installed: Launches | None = None


def install(target: str, emulator: Path) -> Launches:
    """Make this process see a GPU.

    Args:
        target: ``"sm_80"`` or ``"sm_90"``.
        emulator: the emulator's library.

    Raises:
        RuntimeError: torch or triton is imported already, or a compiler fails.
    """
    global _installed
    if _installed is not None:
        return _installed
    if "torch" in sys.modules or "triton" in sys.modules:
        raise RuntimeError("install(): torch or triton is imported already")
    properties = TARGETS[target]
    folder = build.built()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Kernels are kept as PTX, which would pass for machine code in the cache of a user.
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "triton-cache")
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    # Before torch, which asks whether there is CUDA as soon as it is imported.
    device = ctypes.CDLL(str(folder / "libdevice.so"), mode=ctypes.RTLD_GLOBAL)

    from tests.emulator.device import torch_cuda

    torch_cuda.install(device, properties)
    launches = Launches(Emulator(emulator), driver, device)
    arch = properties.major * 10 + properties.minor
    launches.install(
        arch, properties.multi_processor_count, properties.shared_memory_per_block_optin
    )
    _keep_ptx(launches)
    torch_cuda.let_graphed_callables_read_unwritten(launches.reading_unwritten)
    _installed = launches
    return launches


def _keep_ptx(launches: Launches) -> None:
    """Let Triton take PTX for machine code, as the driver of CUDA does too."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    CUDABackend.make_cubin = lambda self, ptx, metadata, options, arch: ptx.encode()
    JITFunction.run = launches.by_triton(JITFunction.run)
