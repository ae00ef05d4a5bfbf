"""Compare stock and fused on a pretrained encoder and real text: ``python -m fusedformer report``.

Errors against float64, nearest neighbours, time and peak memory of all-MiniLM-L6-v2 as Hugging
Face runs it and on this library's encoder with the same weights; then the parity of every op.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fusedformer.tools.arguments import json_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if everything passes, 1 if not, 2 if an extra is missing."""
    given = _parser().parse_args(argv)
    from fusedformer.tools.report.minilm import MissingExtra, require_extras

    try:
        require_extras()
    except MissingExtra as error:
        print(f"fusedformer: {error}", file=sys.stderr)
        return 2
    return _report(given)


def _report(given: argparse.Namespace) -> int:
    # Imported here because they need the extras.
    from rich.console import Console

    from fusedformer.tools import environment
    from fusedformer.tools.report import page, programs, stages, terminal, verdict

    start = time.perf_counter()
    console = Console()
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = stages.QUICK if given.quick else stages.Plan()
    bars = terminal.Bars(console)
    watch = stages.Stopwatch(bars)
    with bars.progress:
        result = {
            "schema": 1,
            **environment.describe(device),
            "quick": given.quick,
            **stages.measure_model(plan, device, watch),
            "ops": programs.op_parity(watch, quick=given.quick),
            "benchmarks": programs.op_timings(watch, given.benchmarks, device),
        }
    found = verdict.checks(result)
    passed = all(check.passed for check in found)
    result["passed"] = passed
    result["checks"] = [vars(check) for check in found]
    result["seconds"] = {**watch.seconds, "total": time.perf_counter() - start}
    files = page.write(result, given.out)
    terminal.show(console, result, found)
    console.print(f"{time.perf_counter() - start:.0f} s; " + " and ".join(map(str, files)))
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer report",
        description="Stock Hugging Face against fusedformer on a pretrained encoder and real text.",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR",
                        help="for index.html and report.json (default: report)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer passages, fewer samples")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--benchmarks", type=json_file, metavar="FILE",
                        help="a benchmark result file to show instead of new timings")  # fmt: skip
    return parser
