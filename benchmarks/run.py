"""Checks and times the library beside its peers: ``python benchmarks/run.py``.

An interrupted run keeps what it measured in ``--out``; run again with the same file, at the same
commit, and it goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import timing
from harness.busy import spinning
from harness.case import Sizes
from harness.providers import absent_peers
from harness.records import ResultFile, clocks, new_document
from harness.runner import Options, run_suite
from harness.suites import SUITES
from reporting.table import markdown


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen suites; 1 if the library failed a check or raised, 3 if time ran out."""
    given = _parser().parse_args(arguments)
    with spinning(given.busy):
        return _run(given)


def _run(given: argparse.Namespace) -> int:
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    sizes = Sizes.of(given.sizes or ("full" if device.type == "cuda" else "cpu"))
    tiny = sizes.name == "tiny"
    began = time.monotonic()
    options = Options(
        device,
        seconds=given.seconds or (0.005 if tiny else 0.03 if given.quick else 0.15),
        compile="thorough" if given.thorough else given.compile,
        deadline=began + given.budget,
    )
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    results = ResultFile(given.out, new_document(device, absent_peers(device), given.busy))
    document = results.document
    print(f"{document['device']}, torch {document['torch']}, triton {document['triton']}")
    for peer, reason in document["absent"].items():
        print(f"absent: {peer} ({reason})")
    complete = True
    try:
        results.set_ceilings(timing.ceilings(device, dtype, tiny))
        ceilings = document["ceilings"]
        print(
            f"ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, {ceilings['matmul_dtype']} "
            f"product {ceilings['matmul_tflop_s']:.3g} TFLOP/s",
            flush=True,
        )
        for name in given.suite or SUITES:
            suite = importlib.import_module(f"suites.bench_{name}").SUITE
            cases = suite.cases(sizes, dtype)
            if given.quick:
                cases = [case for case in cases if case.headline]
            complete &= run_suite(suite, cases, results, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        document["clocks"]["end"] = clocks(device)
        if document["ceilings"]:
            results.save()
    print(markdown(document, suites=given.suite))
    print(f"{time.monotonic() - began:.0f} s" + (f", {given.out}" if given.out else ""))
    failed = [r for r in document["records"] if r["status"] in ("failed check", "error")]
    for r in failed:
        print(f"{r['status']}: {r['suite']}, {r['case']}, {r['direction']}, {r['provider']}")
    if any(r["provider"] == "fusedformer" for r in failed):
        return 1
    return 0 if complete else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--suite",
        nargs="+",
        action="extend",
        choices=list(SUITES),
        help="these only (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="headline cases, fewer samples")
    parser.add_argument(
        "--compile",
        choices=("none", "headline", "all"),
        default="none",
        help="time torch.compile and FlexAttention too, in which cases",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="torch.compile in all cases, with max-autotune too"
    )
    parser.add_argument("--out", type=Path, help="result file, written after every case")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU, float32 on CPU",
    )
    parser.add_argument(
        "--sizes", choices=("full", "cpu", "tiny"), help="default: full on a GPU, cpu on CPU"
    )
    parser.add_argument("--seconds", type=float, help="of timing for each provider and direction")
    parser.add_argument(
        "--busy", type=int, nargs="?", const=1, default=0, metavar="N",
        help="run N processes beside that spin (1 if no number is given)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which no further case starts"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
