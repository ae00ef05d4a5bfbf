"""What a call costs the host before its kernels are enqueued, measured on a machine without a GPU.

    PYTHONPATH=python:kernels python benchmarks/host_cost.py [--json FILE]

Kernels are compiled for sm_90 and launched nowhere (harness/no_driver.py); a GPU's driver adds
its own launch. Tensors are so small that torch's own ops, which run beside them on the CPU,
compute next to nothing; on a GPU they have their launches to add as well. Times are those of the
thread, so that other work on the machine counts little, and the least of several.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent))

import torch

from fusedformer._internal.text import table
from fusedformer.ops import _registered
from fusedformer.tools.environment import describe
from harness.case import Case, Inputs, Program, Sizes
from harness.no_driver import kernels_go_nowhere
from suites.bench_host import SUITE, eager, fused

CPU = torch.device("cpu")
REPEATS, ROUNDS = 150, 15
DIRECTIONS = ("inference", "forward", "forward + backward")


def least(call: Callable[[], Any]) -> float:
    """Time a call in microseconds of the thread, the least of several rounds."""
    for _ in range(20):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(REPEATS):
            call()
        times.append((time.thread_time() - start) / REPEATS)
    return round(1e6 * min(times), 1)


@contextlib.contextmanager
def by_the_dispatcher() -> Iterator[None]:
    """Send eager calls to the registered ops, as compilers and tensor subclasses do."""
    with mock.patch.object(_registered, "is_eager", lambda: False):  # noqa: PT008, a Mock is slow
        yield


def measure(program: Program, inputs: Inputs) -> list[float]:
    """Time a program in each direction."""
    leaves = list(program.leaves(inputs).values())
    output = program.function(**inputs)
    grad = torch.randn_like(output)
    with torch.no_grad():
        found = [least(lambda: program.function(**inputs))]
    found.append(least(lambda: program.function(**inputs)))
    step = lambda: torch.autograd.grad(program.function(**inputs), leaves, grad)
    return [*found, least(step)]


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Time a case in all directions, ours and torch's."""
    inputs = case.make(CPU)
    ours = measure(fused(case, CPU), inputs)
    with by_the_dispatcher():
        registered = measure(fused(case, CPU), inputs)
    stock = measure(eager(case, CPU), inputs)
    times = zip(DIRECTIONS, ours, registered, stock, strict=True)
    return [
        {"case": case.name, "direction": d, "fusedformer_us": o, "registered_us": r, "torch_us": t}
        for d, o, r, t in times
    ]


def main() -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what is in memory that no kernel wrote slows a product down
    kernels_go_nowhere()
    found = [row for case in SUITE.cases(Sizes.of("full"), torch.float32) for row in rows_of(case)]
    head = ["", "", "fusedformer, us", "registered, us", "torch on the CPU, us"]
    print(table(head, [[str(value) for value in row.values()] for row in found], (2, 3, 4)))
    if arguments.json:
        text = json.dumps({**describe(CPU), "rows": found}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
