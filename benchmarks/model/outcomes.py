"""Predicted beside measured times on the H200: ``python benchmarks/model/outcomes.py``.

Measurements are those of a result file; predictions those of ``prediction.py`` for the kernels that
were measured, by what their launches ask for (``tables/demands.csv``). Encoders have none: their
time is the host's too. ``--write`` puts the table into ``tables/outcomes.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fusedformer_kernels.compiler.prediction import Factors
from model import TABLES, page
from model.calibrate import Data
from model.demands import BENCH

HEAD = "| case | kept out of the fit | predicted µs | measured µs | measured over predicted |"


def table() -> str:
    """Make a row for each case and direction of the library that was timed."""
    data = Data()
    found = [HEAD, "| --- | --- | ---: | ---: | ---: |"]
    for measured, predicted in zip(
        data.measurements, data.predicted(Factors()).tolist(), strict=True
    ):
        if not measured.is_tile:
            row = [
                measured.workload, "yes" if measured.held_out else "", f"{predicted:.1f}",
                f"{measured.us:.1f}", f"{measured.us / predicted:.2f}",
            ]  # fmt: skip
            found.append("| " + " | ".join(row) + " |")
    return "\n".join(found)


def text() -> str:
    """Put the table into the text of its file."""
    commit = json.loads(BENCH.read_text())["commit"][:12]
    about = f"Measured and predicted: the kernels of commit {commit}, `{BENCH.name}`."
    return page("Predictions beside measurements", "outcomes", about, table())


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into tables/outcomes.md")
    given = parser.parse_args()
    found = text()
    if given.write:
        (TABLES / "outcomes.md").write_text(found)
    else:
        print(found)


if __name__ == "__main__":
    main()
