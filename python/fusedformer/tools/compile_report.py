"""Compile every kernel for GPUs that need not be here: ``python -m fusedformer compile-report``.

For each shipped variant and target: registers, shared memory, spills, tensor-core instructions,
waits, TMA loads and compile time, and on sm_90 how many programs an SM holds; and which of them
fall short of what the library promises: all compile and fit in shared memory, nothing spills on
sm_90, matrix kernels use the tensor cores (HGMMA on sm_90), and each of these gets the descriptors
of its tiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedformer.tools.arguments import check_any, pattern, positive

TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC*MMA", "gfx942": "MFMA"}
# Kernels without a product, in cases whose other kernels must use the tensor cores.
NO_PRODUCTS = (
    "_attention_delta", "_attention_sink_gradient", "_clear_query_sums", "_list_mask_tiles",
    "_list_work", "_merge_parts", "_merge_splits", "_spread_table", "_store_query_sums",
    "_sum_diagonals", "_sum_partials", "_sum_query_parts",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One compiled kernel of one case on one target."""

    case: str
    dtype: str
    target: str
    kernel: str
    facts: dict[str, Any]
    faults: tuple[str, ...]


@contextlib.contextmanager
def float32_products(name: str) -> Iterator[None]:
    """Multiply float32 by "ieee", "tf32" or "tf32x3" inside."""
    from fusedformer_kernels.runtime import targets

    previous = torch.backends.cuda.matmul.fp32_precision, targets.float32_products()
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    targets.set_float32_products("tf32x3" if name == "tf32x3" else "torch")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous[0]
        targets.set_float32_products(previous[1])


def compile_case(index: int, target_name: str) -> list[Row]:
    """Compile every launch of one case for one target."""
    from fusedformer_kernels.compiler.ahead_of_time import compile_launch
    from fusedformer_kernels.compiler.compile_cases import compile_cases
    from fusedformer_kernels.runtime.launch import recorded_launches
    from fusedformer_kernels.runtime.targets import TARGETS, assume_target

    case, target = compile_cases()[index], TARGETS[target_name]
    dtype = str(case.dtype).removeprefix("torch.")
    with (
        float32_products(case.products),
        assume_target(target),
        recorded_launches(run=False) as launches,
    ):
        case.call()
    rows = []
    for launch in launches:
        try:
            facts = compile_launch(launch, target).as_dict()
            matrix = case.matrix and launch.name not in NO_PRODUCTS
            expected = TENSOR_CORES[target_name]
            if getattr(launch.config, "keys_per_split", 0) and target_name != "gfx942":
                expected = "HMMA"  # a tile of few queries is too small for the wider instructions
            faults = _faults(facts, target_name, expected if matrix else "")
            if facts["shared_bytes"] > target.shared_memory:
                faults += (f"shared memory over {target.shared_memory}",)
        except Exception as error:  # a compiler may raise anything; the report names it
            facts, faults = {}, (f"does not compile: {type(error).__name__}: {error}"[-600:],)
        config = launch.config
        tile = f"{getattr(config, 'block_m', '-')}x{getattr(config, 'block_n', '-')}"
        facts["config"] = f"{tile} w{config.num_warps} s{config.num_stages}"
        rows.append(Row(case.name, dtype, target_name, launch.name, facts, faults))
    return rows


def _faults(facts: dict[str, Any], target: str, expected: str) -> tuple[str, ...]:
    faults: list[str] = []
    if facts["spills"] and target == "sm_90":
        faults.append(f"{facts['spills']} spill instructions")
    if facts["wrong_descriptors"]:
        count, first = len(facts["wrong_descriptors"]), facts["wrong_descriptors"][0]
        faults.append(f"{count} products may read the wrong memory, as {first}")
    if expected and facts["tensor_core"] != expected:
        faults.append(f"no {expected}, but {facts['tensor_core'] or 'none'}")
    return tuple(faults)


def _work(item: tuple[int, str]) -> list[Row]:
    return compile_case(*item)


def compile_all(
    targets: list[str],
    pattern: str = "",
    processes: int | None = None,
    *,
    core: bool = False,
    quick: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Compile the cases whose name matches the regular expression ``pattern``.

    ``core`` takes the core cases alone: every kernel, not every variant. ``quick`` does so for all
    targets but sm_90, where it leaves out cases that differ from another in a size alone.
    """
    from fusedformer_kernels.compiler.compile_cases import compile_cases

    cases = compile_cases()
    names = [case.name for case in cases]
    work = [
        (index, target)
        for index, case in enumerate(cases)
        for target in targets
        if re.search(pattern, case.name)
        and (case.core or not core)
        and (not quick or case.core or (target == "sm_90" and not case.extra))
    ]
    rows: list[Row] = []
    # spawn: a fork would copy torch's threads, and the compiler runs in the children only.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes or os.cpu_count() or 1, max(len(work), 1))) as pool:
        for done, result in enumerate(pool.imap_unordered(_work, work, chunksize=4), 1):
            rows += result
            if progress:
                print(f"\r{done}/{len(work)} compiled", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda r: (order[r.case], r.dtype, targets.index(r.target), r.kernel))


def table(rows: list[Row]) -> str:
    """Write the report as text, one line a kernel."""
    header = (
        f"{'case':34} {'dtype':9} {'target':7} {'kernel':29} {'tile':>16} {'regs':>5} "
        f"{'shared':>7} {'spills':>6} {'tensor core':>13} {'waits':>5} {'TMA':>4} {'an SM':>5} "
        f"{'s':>5}"
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        facts = row.facts
        start = f"{row.case:34} {row.dtype:9} {row.target:7} {row.kernel:29} {facts['config']:>16} "
        if "registers" in facts:
            cores = f"{facts['tensor_core']} {facts['tensor_core_count'] or '-'}"
            start += (
                f"{facts['registers']:5} {facts['shared_bytes']:7} {facts['spills']:6} "
                f"{cores:>13} {facts['waits']:5} {facts['tma_loads']:4} "
                f"{facts['programs'] or '-':>5} {facts['compile_seconds']:5.1f}"
            )
        lines.append(start + "".join(f"  << {fault}" for fault in row.faults))
    return "\n".join(lines)


def mixes(rows: list[Row]) -> str:
    """Write what each kernel of sm_90 does in its main loop, one line a kernel.

    First the warp instructions of one pass, then the clocks that it takes of each unit of an SM.
    """
    from fusedformer_kernels.compiler.machine_code import CLASSES

    units = ("product", "exp2", "issue", "fma", "alu")
    header = f"{'case':34} {'dtype':9} {'kernel':29} {'an SM':>5} "
    header += " ".join(f"{name:>7}" for name in CLASSES) + "  clocks: "
    header += " ".join(f"{name:>7}" for name in units)
    lines = [header, "-" * len(header)]
    for row in rows:
        facts = row.facts
        if facts.get("programs"):
            line = f"{row.case:34} {row.dtype:9} {row.kernel:29} {facts['programs']:5} "
            line += " ".join(f"{facts['loop'].get(name, 0) or '-':>7}" for name in CLASSES)
            line += " " * 10 if facts["loops"] else "  no loop "
            lines.append(line + " ".join(f"{facts['cycles'].get(u, 0):7.0f}" for u in units))
    return "\n".join(lines)


def tuned_entries(targets: list[str]) -> str:
    """Write which entries of tuned tables the configs of ``targets`` come from, one a line."""
    from fusedformer_kernels.runtime.targets import TARGETS
    from fusedformer_kernels.runtime.tuned import entries_in_use

    return "\n".join(
        f"{target}: {key} from {entry.table.name}: "
        + " ".join(f"{name}={value}" for name, value in entry.fields.items())
        + (" (predicted, not measured)" if entry.predicted else "")
        for target in targets
        for key, entry in entries_in_use(TARGETS[target]).items()
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if any kernel falls short."""
    parser = argparse.ArgumentParser(prog="fusedformer compile-report", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TENSOR_CORES), help="repeatable")
    parser.add_argument(
        "--case", default="", type=pattern, help="only cases that match this regular expression"
    )
    parser.add_argument("--core", action="store_true", help="only core cases: each kernel once")
    parser.add_argument("--quick", action="store_true", help="all cases on sm_90 only, else core")
    parser.add_argument("--mix", action="store_true", help="also the instructions of main loops")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--processes", type=positive, help="compilers at once; all cores by default"
    )
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: under the interpreter nothing is compiled")
    import triton

    from fusedformer_kernels.compiler.compile_cases import compile_cases

    check_any(parser, arguments.case, (case.name for case in compile_cases()))
    targets = arguments.target or list(TENSOR_CORES)
    rows = compile_all(
        targets, arguments.case, arguments.processes, core=arguments.core,
        quick=arguments.quick, progress=sys.stderr.isatty(),
    )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    print(table(rows))
    if arguments.mix:
        print(f"\n{mixes(rows)}")
    print(f"\nTuned configs in use:\n{tuned_entries(targets) or 'none'}")
    short = [row for row in rows if row.faults]
    print(
        f"\n{len(rows)} kernels compiled for {', '.join(targets)} by triton "
        f"{triton.__version__}; {len(short)} fall short"
    )
    for row in short:
        print(f"  {row.case} {row.dtype} {row.target} {row.kernel}: {'; '.join(row.faults)}")
    return 1 if short else 0
