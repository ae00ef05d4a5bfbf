"""Compile the C++ beside this file with the compiler that is there, once, and load it.

The library goes to the cache directory, under a name made of all that it depends on. Its threads
are those of torch: it is linked to the OpenMP that torch has loaded.
``FUSEDFORMER_CPU_KERNELS=off`` compiles nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fusedformer_kernels.runtime.tuned import cache_folder

SOURCE = Path(__file__).with_name("attention.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SECONDS = 120.0


@functools.cache
def attention() -> Any:
    """``fusedformer_attend`` of ``attention.cpp``; None where it cannot be compiled.

    Raises:
        ValueError: ``FUSEDFORMER_CPU_KERNELS`` is neither "on" nor "off".
    """
    said = os.environ.get("FUSEDFORMER_CPU_KERNELS", "on")
    if said not in ("on", "off"):
        raise ValueError(f"FUSEDFORMER_CPU_KERNELS: expected 'on' or 'off', but got {said!r}")
    compiler, *flags = shlex.split(os.environ.get("CXX") or "g++")
    found = shutil.which(compiler)
    if said == "off" or found is None or sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(os.fspath(_compiled(found, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        warnings.warn(
            f"fusedformer: attention on the CPU is computed by ATen, as {found} did not "
            f"compile {SOURCE.name} (FUSEDFORMER_CPU_KERNELS=off leaves it out):\n{words}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    attend = library.fusedformer_attend
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    attend.argtypes = [
        ctypes.c_int, *[pointer] * 4, ctypes.c_int, *[pointer] * 2, *[size] * 12, ctypes.c_float,
        ctypes.c_int,
    ]  # fmt: skip
    attend.restype = ctypes.c_int
    return attend


def _compiled(compiler: str, flags: list[str]) -> Path:
    """The library, from the cache if it is there."""
    state = os.stat(compiler)
    command = [compiler, *flags, *_FLAGS, os.fspath(SOURCE), *openmp_of_torch()]
    parts = SOURCE.read_text(), command, state.st_size, state.st_mtime_ns, _processor()
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    library = cache_folder() / "cpu" / f"attention-{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not there: other processes may look.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run(
            [*command, "-o", os.fspath(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        made.replace(library)
    return library


def openmp_of_torch() -> list[str]:
    """The file of OpenMP that torch has loaded: with another's, threads would compete.

    Other packages, such as scikit-learn, bring their own.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = sorted({line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line})
    folder = Path(torch.__file__).resolve().parent
    return [file for file in found if folder in Path(file).parents] or found[:1]


def _processor() -> str:
    """What ``-march=native`` depends on: the instructions that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = "model name", "flags", "Features"
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
