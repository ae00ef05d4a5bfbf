"""Run the command ``parity``: on this library's ops, or on a Hugging Face model."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fusedformer._internal import backend as backends
from fusedformer.parity.cases import Case
from fusedformer.parity.run import Record, run_all

DTYPES = ("float32", "float16", "bfloat16")
_ROW = "{:<30}{:<34}{:<10}{:<22}{:>11}{:>11}{:>8}  {}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return 0 if every tensor passes, 1 if one does not, 2 if it cannot run."""
    given = _parser().parse_args(argv)
    if given.model is not None:
        return _model(given)
    on_gpu = torch.cuda.is_available()
    best: backends.Backend = "triton" if backends.TRITON_IS_INSTALLED else "torch"
    backend: backends.Backend = given.backend or best
    if backend == "triton" and not on_gpu and not backends.INTERPRETER_IS_ON:
        # Triton reads the variable when it is imported, so only a new process sees it.
        arguments = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "fusedformer", "parity", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    return _ops(given, backend, torch.device("cuda" if on_gpu else "cpu"))


def _ops(given: argparse.Namespace, backend: backends.Backend, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    place = "on " + torch.cuda.get_device_name() if on_gpu else "on the CPU"
    if backend == "triton" and not on_gpu:
        place = "in Triton's interpreter"
    print(f"fusedformer ({backend} backend) {place}, torch {torch.__version__}")
    print(_ROW.format("op", "case", "dtype", "tensor", "ours", "stock", "ratio", ""))

    def show(case: Case, records: list[Record]) -> None:
        for record in records:
            print(_line(record), flush=True)

    dtypes = [getattr(torch, name) for name in given.dtype or DTYPES]
    result = run_all(dtypes, device, backend, quick=given.quick, advance=show)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.html is not None:
        from fusedformer.parity import pages

        given.html.write_text(pages.ops_page(result), encoding="utf-8")
    records = result["records"]
    failed = [record for record in records if not record["passed"]]
    for record in failed:
        print(f"FAILED {record['op']}, {record['case']}, {record['dtype']}: {record['fault']}")
    print(
        f"{len(records) - len(failed)} of {len(records)} tensors pass: error at most twice stock's "
        f"plus two roundings, against float64 ({result['seconds']:.0f} s)"
    )
    return 1 if failed else 0


def _model(given: argparse.Namespace) -> int:
    """Compare a model in each dtype; with several, file names get the dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend: backends.Backend = given.backend or ("triton" if device.type == "cuda" else "torch")
    dtypes = given.dtype or ["float32"]
    passed = True
    for name in dtypes:
        try:
            from fusedformer.parity import models

            with backends.backend(backend):
                done, report = models.compare_fused(
                    given.model, getattr(torch, name), device, layers=given.layers
                )
        except (ModuleNotFoundError, ValueError) as error:
            print(f"parity: {error}", file=sys.stderr)
            return 2
        print(f"{given.model} in {name} on {device}\n\n{done}\n\n{report}\n")
        for path, write in ((given.json, report.save), (given.html, report.html)):
            if path is not None:
                write(path if len(dtypes) == 1 else path.with_stem(f"{path.stem}-{name}"))
        passed &= report.passed
    return 0 if passed else 1


def _line(record: Record) -> str:
    return _ROW.format(
        record["op"], record["case"], record["dtype"], record["tensor"],
        f"{record['error']:.2e}", f"{record['stock_error']:.2e}", f"{record['ratio']:.2f}",
        "pass" if record["passed"] else "FAIL",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer parity",
        description="Every op, forward and every gradient, against float64 beside stock PyTorch; "
        "or a Hugging Face model fused, beside itself as it was.",
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_CONFIG",
        help="a folder with a model of transformers, a "
        "config.json (then with random weights), or a model type such as bert",
    )
    parser.add_argument("--layers", type=int, help="of a --model without weights (default: all)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: all three; float32 for a --model"
    )
    parser.add_argument("--quick", action="store_true", help="one case of each op")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to FILE")
    parser.add_argument(
        "--backend",
        choices=("triton", "torch"),
        help="default: triton where it is installed; for a --model, on a GPU",
    )
    return parser
