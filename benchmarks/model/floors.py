"""FLOPs, bytes and floor times of the benchmark's cases: ``python benchmarks/model/floors.py``.

Nothing is run: the counts are those of ``harness/counting.py``, the ceilings are given (by default
those measured on an H200). ``--write FILE`` replaces the table between the two marks in FILE.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.case import Sizes
from harness.suites import SUITES

BEGIN, END = "<!-- floors: begin -->", "<!-- floors: end -->"


def table(copy_gb_s: float, matmul_tflop_s: float) -> str:
    """A Markdown table of every case and direction at full size in bfloat16."""
    lines = [
        f"At {copy_gb_s:g} GB/s copied and {matmul_tflop_s:g} TFLOP/s multiplied, bfloat16.",
        "",
        "| suite | case | direction | MB | GFLOP | bytes µs | FLOPs µs | floor µs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SUITES:
        suite = importlib.import_module(f"suites.bench_{name}").SUITE
        if suite.clock == "host":
            continue
        for case in suite.cases(Sizes.of("full"), torch.bfloat16):
            for direction, cost in case.costs.items():
                moving, computing = cost.times_us(copy_gb_s, matmul_tflop_s)
                lines.append(
                    f"| {name} | {case.name} | {direction} | {cost.bytes / 1e6:.1f} | "
                    f"{cost.flops / 1e9:.1f} | {moving:.1f} | {computing:.1f} | "
                    f"**{max(moving, computing):.1f}** |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy", type=float, default=4300.0, help="GB/s, read plus written")
    parser.add_argument("--matmul", type=float, default=790.0, help="TFLOP/s")
    parser.add_argument("--write", type=Path, help="file whose marked table is replaced")
    given = parser.parse_args()
    found = table(given.copy, given.matmul)
    if given.write is None:
        print(found)
        return
    replace_between(given.write, BEGIN, found, END)


def replace_between(file: Path, begin: str, text: str, end: str) -> None:
    """Put ``text`` in the place of what stands between two marks of ``file``."""
    before, _, rest = file.read_text().partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
