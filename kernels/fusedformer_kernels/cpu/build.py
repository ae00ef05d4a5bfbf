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

import torch

from fusedformer_kernels.runtime.tuned import cache_folder

_HERE = Path(__file__).parent
SOURCES = tuple(sorted(_HERE.glob("*.cpp")))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SECONDS = 120.0


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be compiled.

    Raises:
        ValueError: ``FUSEDFORMER_CPU_KERNELS`` is neither "on" nor "off", or ``CXX`` no command.
    """
    said = os.environ.get("FUSEDFORMER_CPU_KERNELS", "on")
    if said not in ("on", "off"):
        raise ValueError(f"FUSEDFORMER_CPU_KERNELS: expected 'on' or 'off', but got {said!r}")
    compiler, *flags = _command(os.environ.get("CXX", ""))
    found = shutil.which(compiler)
    if said == "off" or found is None or sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(os.fspath(_compiled(found, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        names = ", ".join(source.name for source in SOURCES)
        warnings.warn(
            f"fusedformer: attention, dropout and norms on the CPU are computed by ATen, as {found}"
            f" did not compile {names} (FUSEDFORMER_CPU_KERNELS=off leaves them out):\n{words}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def loaded() -> ctypes.CDLL:
    """:func:`library`, for callers that have asked whether there is one."""
    found = library()
    assert found is not None
    return found


def _command(said: str) -> list[str]:
    """The words of ``CXX``; those of the usual compiler where it has none."""
    try:
        return shlex.split(said) or ["g++"]
    except ValueError as error:
        raise ValueError(f"CXX: expected a command, but got {said!r}: {error}") from None


def _compiled(compiler: str, flags: list[str]) -> Path:
    """The library, from the cache if it is there."""
    state = os.stat(compiler)
    command = [compiler, *flags, *_FLAGS, *map(os.fspath, SOURCES), *openmp_of_torch()]
    texts = [path.read_text() for path in (*SOURCES, *sorted(_HERE.glob("*.h")))]
    parts = texts, command, state.st_size, state.st_mtime_ns, _processor()
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    made = cache_folder() / "cpu" / f"kernels-{name}.so"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not there: other processes may look.
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        whole = Path(folder) / made.name
        subprocess.run(
            [*command, "-o", os.fspath(whole)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        whole.replace(made)
    return made


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
