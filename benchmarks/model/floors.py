"""FLOPs, bytes and floor times of the benchmark's cases: ``python benchmarks/model/floors.py``.

Nothing is run: the counts are those of ``harness/counting.py``, the ceilings are given (by default
those measured on an H200). ``--write`` puts the table into ``tables/floors.md``.
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
from model import TABLES, page

COPY, PRODUCT = 4300.0, 790.0  # GB/s read plus written, TFLOP/s


def table(copy_gb_s: float, matmul_tflop_s: float) -> str:
    """Make a Markdown table of every case and direction at full size in bfloat16."""
    lines = [
        f"At {copy_gb_s:g} GB/s copied and {matmul_tflop_s:g} TFLOP/s multiplied, bfloat16.",
        "",
        "| suite | case | direction | MB | GFLOP | bytes µs | FLOPs µs | floor µs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(
        [*lines, *(row for name in SUITES for row in rows(name, copy_gb_s, matmul_tflop_s))]
    )


def rows(name: str, copy_gb_s: float = COPY, matmul_tflop_s: float = PRODUCT) -> list[str]:
    """Make the lines of one suite; none of one whose clock is the host's."""
    suite = importlib.import_module(f"suites.bench_{name}").SUITE
    if suite.clock == "host":
        return []
    found = []
    for case in suite.cases(Sizes.of("full"), torch.bfloat16):
        for direction, cost in case.costs.items():
            moving, computing = cost.times_us(copy_gb_s, matmul_tflop_s)
            found.append(
                f"| {name} | {case.name} | {direction} | {cost.bytes / 1e6:.1f} | "
                f"{cost.flops / 1e9:.1f} | {moving:.1f} | {computing:.1f} | "
                f"**{max(moving, computing):.1f}** |"
            )
    return found


def main() -> None:
    """Print the table, or put it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy", type=float, default=COPY, help="GB/s, read plus written")
    parser.add_argument("--matmul", type=float, default=PRODUCT, help="TFLOP/s")
    parser.add_argument("--write", action="store_true", help="into tables/floors.md")
    given = parser.parse_args()
    found = table(given.copy, given.matmul)
    if given.write:
        (TABLES / "floors.md").write_text(text(found))
    else:
        print(found)


def text(found: str) -> str:
    """Put a table into the text of its file."""
    about = "Bytes and FLOPs are those of `harness/counting.py`; notes/counts.md says what counts."
    return page("Floors on an H200", "floors", about, found)


if __name__ == "__main__":
    main()
