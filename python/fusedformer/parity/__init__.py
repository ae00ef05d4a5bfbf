"""Parity of every op with the float64 definition, beside stock PyTorch's own error.

``python -m fusedformer parity`` runs the grid in :mod:`fusedformer.parity.cases` by the criterion
in :mod:`fusedformer.testing`, prints a table, and fails if a tensor fails. Without a GPU it runs
the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedformer import _backend
from fusedformer.parity.cases import Case
from fusedformer.parity.run import Record, run_all, run_case

__all__ = ["Record", "main", "run_all", "run_case", "share_of_limit", "worst_of"]

DTYPES = ("float32", "float16", "bfloat16")
_ROW = "{:<30}{:<34}{:<10}{:<22}{:>11}{:>11}{:>8}  {}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``parity``; returns 0 if every tensor passes, else 1."""
    given = _parser().parse_args(argv)
    on_gpu = torch.cuda.is_available()
    best: _backend.Backend = "triton" if _backend.TRITON_IS_INSTALLED else "torch"
    backend: _backend.Backend = given.backend or best
    if backend == "triton" and not on_gpu and not _backend.INTERPRETER_IS_ON:
        # Triton reads the variable when it is first imported, so it takes another process.
        arguments = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "fusedformer", "parity", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    device = torch.device("cuda" if on_gpu else "cpu")
    place = "on " + torch.cuda.get_device_name() if on_gpu else "on the CPU"
    if backend == "triton" and not on_gpu:
        place = "in Triton's interpreter"
    print(f"fusedformer ({backend} backend) {place}, torch {torch.__version__}")
    print(_ROW.format("op", "case", "dtype", "tensor", "ours", "stock", "ratio", ""))

    def show(case: Case, records: list[Record]) -> None:
        for record in records:
            print(_line(record), flush=True)

    dtypes = [getattr(torch, name) for name in given.dtype]
    result = run_all(dtypes, device, backend, quick=given.quick, advance=show)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    records = result["records"]
    failed = [record for record in records if not record["passed"]]
    for record in failed:
        print(f"FAILED {record['op']}, {record['case']}, {record['dtype']}: {record['fault']}")
    print(
        f"{len(records) - len(failed)} of {len(records)} tensors pass: error at most twice stock's "
        f"plus two roundings, against float64 ({result['seconds']:.0f} s)"
    )
    return 1 if failed else 0


def worst_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """For each op and dtype: number of tensors, how many pass, and the worst of them.

    The worst is the record that used up most of its limit (see :func:`share_of_limit`).
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["op"], record["dtype"]), []).append(record)
    return [
        {
            "op": op,
            "dtype": dtype,
            "tensors": len(group),
            "passed": sum(record["passed"] for record in group),
            "worst": max(group, key=share_of_limit),
        }
        for (op, dtype), group in groups.items()
    ]


def share_of_limit(record: Record) -> float:
    """How much of what the criterion allows was used: above 1 the record fails."""
    if not record["passed"]:
        return float("inf")
    shares = [
        record[error] / record[limit] if record[limit] else 0.0
        for error, limit in (("error", "limit"), ("rms_error", "rms_limit"))
    ]
    return float(max(shares))


def _line(record: Record) -> str:
    return _ROW.format(
        record["op"], record["case"], record["dtype"], record["tensor"],
        f"{record['error']:.2e}", f"{record['stock_error']:.2e}", f"{record['ratio']:.2f}",
        "pass" if record["passed"] else "FAIL",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer parity",
        description="Every op, forward and every gradient, against float64 beside stock PyTorch.",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all three"
    )
    parser.add_argument("--quick", action="store_true", help="one case of each op")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--backend", choices=("triton", "torch"), help="default: triton where it is installed"
    )
    return parser
