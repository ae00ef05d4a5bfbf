"""Predicted beside measured times on the H200: ``python benchmarks/model/outcomes.py``.

Predictions are those of ``tables/predictions.md``, measurements those of a result file; a case
stands here if both have it. ``--write`` puts the table into ``tables/outcomes.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import CHECKOUT
from model import TABLES, page

RESULTS = "benchmarks/results/h200/2026-11-28-bench.json"
HEAD = "| suite | case | direction | predicted µs | measured µs | measured over predicted |"


def table(document: dict[str, Any]) -> str:
    """Make a row for each case and direction of the library that was predicted and timed."""
    lines = (TABLES / "predictions.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    predicted = {tuple(row[:3]): row[3] for row in rows}
    found = [HEAD, "| --- | --- | --- | ---: | ---: | ---: |"]
    for record in document["records"]:
        key = record["suite"], record["case"], record["direction"]
        if key in predicted and record["provider"] == "fusedformer" and record["median_us"]:
            median, guess = record["median_us"], predicted[key]
            row = [*key, guess, f"{median:.1f}", f"{median / float(guess):.2f}"]
            found.append("| " + " | ".join(row) + " |")
    return "\n".join(found)


def text(file: str = RESULTS) -> str:
    """Put the table of a result file into the text of its file."""
    document = json.loads((CHECKOUT / file).read_text())
    about = (
        f"Measured: `{file}`, commit {document['commit'][:12]}; predicted: the kernels of "
        "`predictions.md`, some of them newer."
    )
    return page("Predictions beside measurements", "outcomes", about, table(document))


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default=RESULTS, help="a result file, from the checkout")
    parser.add_argument("--write", action="store_true", help="into tables/outcomes.md")
    given = parser.parse_args()
    found = text(given.results)
    if given.write:
        (TABLES / "outcomes.md").write_text(found)
    else:
        print(found)


if __name__ == "__main__":
    main()
