"""GPUs that kernels are compiled for, and what every launch of them says to the compiler.

A config is a pure function of shape, dtype and target: ``rows/configs.py`` and
``attention/configs.py`` choose them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedformer_kernels.runtime.tuned import clear_caches


@dataclass(frozen=True, eq=False)  # one object each: hashed by every launch
class Target:
    """What a config depends on, of a device."""

    backend: str  # "cuda" or "hip"
    arch: int | str  # compute capability * 10, or the gfx name
    warp_size: int
    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    device_name: str = ""  # of a device that is here: a user may have tuned for it
    interpreted: bool = False
    overlaps: bool = False  # a launch may begin while the one before it ends


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 132, 227 * 1024, overlaps=True),
    "sm_100": Target("cuda", 100, 32, 148, 227 * 1024, overlaps=True),
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * 1024),
}
# The interpreter gets sm_90's tiles, and few multiprocessors so that persistent loops iterate.
INTERPRETED = Target("cuda", 90, 32, 2, 227 * 1024, interpreted=True)

_assumed: Target | None = None


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Choose configs for ``target``, whatever device the tensors are on (for compiling ahead)."""
    global _assumed
    previous, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = previous


def target_of(device: torch.device) -> Target:
    """The target that kernels on tensors of ``device`` are launched for."""
    if _assumed is not None:
        return _assumed
    return INTERPRETED if device.type != "cuda" else _cuda_target(device.index or 0)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return Target("hip", name, properties.warp_size, count, 64 * 1024, properties.name)
    arch = properties.major * 10 + properties.minor
    # Turing, and Ada and Blackwell of the desktop, have less than the data-center parts.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    # CUDA graphs have edges for it since CUDA 12.3.
    overlaps = arch >= 90 and _driver_version() >= 12030
    return Target("cuda", arch, 32, count, shared, properties.name, overlaps=overlaps)


def _driver_version() -> int:
    """Return the version of CUDA that the driver knows: 12030 for 12.3."""
    version = ctypes.c_int()
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")  # torch has loaded it
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


@dataclass(frozen=True)
class LaunchConfig:
    """How a compiled kernel is launched."""

    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """Options of the compiler. Multiply-adds are fused where ``primitives.fma`` says so."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False,
        }  # fmt: skip


@dataclass(frozen=True)
class OverlappingConfig(LaunchConfig):
    """Is for a launch that begins while the one before it ends, where ``Target.overlaps``.

    The first kernel says when by ``primitives.let_next_begin``. The second begins with
    ``primitives.wait_for_last``: until then it may touch no memory, and all that the first kernel
    wrote is there afterwards. CUDA calls it programmatic dependent launch.
    """

    def options(self) -> dict[str, int]:
        """Options of the compiler, of which the launcher reads this one."""
        return super().options() | {"launch_pdl": True}


@dataclass(frozen=True)
class TileConfig(LaunchConfig):
    """A tile of BLOCK_M rows and BLOCK_N columns."""

    block_m: int = 1
    block_n: int = 16


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_float32_products = "torch"


def set_float32_products(name: str) -> None:
    """See :func:`fusedformer.set_float32_products`."""
    global _float32_products
    if name != _float32_products:
        _float32_products = name
        clear_caches()  # plans have launches of the other kind


def float32_products() -> str:
    """What :func:`set_float32_products` says."""
    return _float32_products


def dot_precision(dtype: torch.dtype, target: Target | None = None, dim: int = 0) -> str:
    """Precision of float32 products: "tf32" where torch's own setting for products is that.

    Those of attention, for a target and of the larger head dim, may be by three of TF32. Above 64
    the backward has no registers for them.
    """
    if dtype != torch.float32:
        return "ieee"
    if precision_of_products() == "tf32":
        return "tf32"
    has_tf32 = target is not None and target.backend == "cuda" and int(target.arch) >= 80
    return "tf32x3" if _float32_products == "tf32x3" and has_tf32 and dim <= 64 else "ieee"


# What ``torch.backends.cuda.matmul.fp32_precision`` is, by the short way to it.
precision_of_products = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def assumed_target() -> Target | None:
    """What :func:`assume_target` says."""
    return _assumed
