"""What a call costs the host before its kernels are enqueued, measured on a machine without a GPU.

    PYTHONPATH=python:kernels python benchmarks/host_cost.py [--json FILE] [--beside CHECKOUT]

Kernels are compiled for sm_90 and launched nowhere (harness/no_driver.py); a GPU's driver adds
its own launch. Tensors are so small that torch's own ops, which run beside them on the CPU,
compute next to nothing; on a GPU they have their launches to add as well. Times are those of the
thread, so that other work on the machine counts little, and the least of several. ``--beside``
measures another checkout of this repository too, an earlier commit say, in turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent))

import torch

from fusedformer._internal import plans
from fusedformer._internal.text import table
from fusedformer.ops import _registered
from fusedformer.tools.environment import describe
from harness.case import Case, Inputs, Program, Sizes
from harness.no_driver import kernels_go_nowhere
from suites.bench_host import SUITE, eager, fused

CPU = torch.device("cpu")
REPEATS, ROUNDS, TURNS = 150, 15, 3
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
    layer = sys.modules["fusedformer.ops.encoder.node"]
    with contextlib.ExitStack() as stack:
        for module in (_registered, plans, layer):
            stack.enter_context(mock.patch.object(module, "is_eager", lambda: False))  # noqa: PT008
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


def all_rows() -> list[dict[str, Any]]:
    """Time every case of the suite."""
    cases = SUITE.cases(Sizes.of("full"), torch.float32)
    return [row for case in cases for row in rows_of(case)]


def rows_of_checkout(checkout: Path) -> dict[str, Any]:
    """Run this script as it is in another checkout; return what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        path = os.pathsep.join(str(checkout / name) for name in ("python", "kernels"))
        subprocess.run(
            [sys.executable, checkout / "benchmarks" / "host_cost.py", "--json", file],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def least_of(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Take the least of each time over runs of the same cases."""
    found = []
    for same in zip(*runs, strict=True):
        times = {key: min(row[key] for row in same) for key in same[0] if key.endswith("_us")}
        found.append({**same[0], **times})
    return found


def beside(checkout: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time this checkout and another in turns; add the other's times to the rows."""
    own, others = [], []
    for _ in range(TURNS):
        others.append(rows_of_checkout(checkout))
        own.append(all_rows())
    before = least_of([other["rows"] for other in others])
    rows = [
        {**row, "before_us": old["fusedformer_us"]}
        for row, old in zip(least_of(own), before, strict=True)
    ]
    return rows, {"before": {"commit": others[0]["commit"]}}


def main() -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what is in memory that no kernel wrote slows a product down
    kernels_go_nowhere()
    more: dict[str, Any] = {}
    if arguments.beside:
        found, more = beside(arguments.beside.resolve())
    else:
        found = all_rows()
    head = ["", "", "fusedformer, us", "registered, us", "torch on the CPU, us"]
    head += ["before, us"] if more else []
    body = [[str(value) for value in row.values()] for row in found]
    print(table(head, body, tuple(range(2, len(head)))))
    if arguments.json:
        text = json.dumps({**describe(CPU), **more, "rows": found}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
