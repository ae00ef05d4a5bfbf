"""Compile the kernels of suites side by side: ``python benchmarks/harness/compile_kernels.py``.

Each process of a pool calls the library once in every direction of a case, so that Triton's cache
has all kernels when a suite is timed, one case after the other. A case that raises is left to the
suite, which says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.case import Case, Sizes, Suite, Unsupported
from harness.runner import Contender, prepared_calls
from harness.suites import SUITES

# Providers whose kernels are Triton's.
COMPILED_HERE = ("fusedformer", "liger_kernel")


class Work(NamedTuple):
    """A headline case of a suite, by its place among them, and what to make it for."""

    suite: str
    place: int
    device: str
    sizes: str
    dtype: torch.dtype


def headlines(name: str, sizes: str, dtype: torch.dtype) -> tuple[Suite, list[Case]]:
    """List what ``run.py --quick`` times of a suite."""
    suite: Suite = importlib.import_module(f"suites.bench_{name}").SUITE
    return suite, [case for case in suite.cases(Sizes.of(sizes), dtype) if case.headline]


def call_once(work: Work) -> str:
    """Call the library in a case; return why that was not possible, or ""."""
    suite, cases = headlines(work.suite, work.sizes, work.dtype)
    case, device = cases[work.place], torch.device(work.device)
    try:
        inputs = case.make(device)
        for name, build in suite.providers(device, "none").items():
            if name.startswith(COMPILED_HERE):
                with contextlib.suppress(Unsupported):
                    contender = Contender(name, build(case))
                    for direction in case.costs:
                        prepared_calls(contender, direction, [inputs])[0]()
    except Exception as error:  # whatever it is, the suite meets it again and records it
        return f"{work.suite}, {case.name}: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def main() -> int:
    """Compile, and name what could not be called; 0 whatever that is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+", choices=list(SUITES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="full", choices=("full", "cpu", "tiny"))
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 12))
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    work = [
        Work(name, place, given.device, given.sizes, dtype)
        for name in given.suites
        for place in range(len(headlines(name, given.sizes, dtype)[1]))
    ]
    began = time.monotonic()
    # spawn: a process that was forked can't use the GPU.
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        reasons = pool.map(call_once, work, chunksize=1)
    for reason in filter(None, reasons):
        print(reason)
    print(f"{len(work)} cases in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
