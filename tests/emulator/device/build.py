"""Compile the fake device and its driver on first use, into a folder named for their sources."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from tests.emulator.build import FOLDER, compiler

HERE = Path(__file__).resolve().parent
SOURCES = ("memory.cpp", "graph.cpp", "runtime.cpp", "operators.cpp")


def package(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed"
    return Path(spec.origin).parent


@functools.cache
def built() -> Path:
    """Build what is not there; return the folder of libdevice.so and libcuda.so.1."""
    torch, triton = package("torch"), package("triton")
    digest = hashlib.sha256()
    sources = [*sorted(HERE.glob("*.[ch]*")), HERE.parent / "core" / "tensor_map.h"]
    for file in (*sources, torch / "version.py", triton / "__init__.py"):
        digest.update(file.read_bytes())
    folder = FOLDER / f"device-{digest.hexdigest()[:12]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "device.lock", "w") as lock:  # several workers begin at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = FOLDER / f"device-{os.getpid()}"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            _build_device(made, torch)
            _build_driver(made, triton)
            made.rename(folder)
    return folder


def _build_device(folder: Path, torch: Path) -> None:
    include = torch / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    _run_side_by_side(
        [[compiler(), *flags, "-c", str(HERE / s), "-o", str(folder / f"{s}.o")] for s in SOURCES]
    )
    objects = [str(folder / f"{source}.o") for source in SOURCES]
    libraries = [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10"]
    _run_side_by_side(
        [[compiler(), "-shared", "-o", str(folder / "libdevice.so"), *objects, *libraries]]
    )


def _build_driver(folder: Path, triton: Path) -> None:
    include = triton / "backends" / "nvidia" / "include"  # of cuda.h
    flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    driver = str(folder / "libcuda.so.1")
    _run_side_by_side([[compiler(), "-x", "c", *flags, str(HERE / "driver.c"), "-o", driver]])


def _run_side_by_side(commands: list[list[str]]) -> None:
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{process.args!r} failed:\n{errors[-4000:]}")
