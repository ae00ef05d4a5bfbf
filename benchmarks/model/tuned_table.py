"""The shipped table of tuned configs: ``python benchmarks/model/tuned_table.py --write``.

Made of the tile search's result file and nothing else. Of each workload the candidate with the
smallest geometric mean over the sizes is taken if it beats the default by at least 3%, at no size
by less than nothing. The same config was timed twice where a candidate is the default again, and
those pairs differ by less than that: ``--noise`` prints them.

What was measured without a mask is taken over by the causal and the heavier forms of the same head
dim that were not measured; that they neither spill nor wait after each product is held by the
compile report. Nothing goes by length: a sequence's bits must not depend on how it was batched.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import CHECKOUT

TILES = "benchmarks/results/h200/2026-11-28-tiles.json"
BENCH = "benchmarks/results/h200/2026-11-28-bench.json"  # of the same session: device and versions
SHIPPED = CHECKOUT / "kernels/fusedformer_kernels/tuned/sm_90.json"
LEAST = 1.03


def text() -> str:
    """Put the table into the text of its file."""
    measured = json.loads((CHECKOUT / TILES).read_text())
    session = json.loads((CHECKOUT / BENCH).read_text())
    where = {name: session[name] for name in ("device", "date", "torch", "triton", "commit")}
    entries: dict[str, Any] = {}
    for workload in measured:
        best = best_of(workload)
        if best:
            facts = {**best, **where, "measured": workload["workload"]}
            for key in (workload["workload"], *others(workload["workload"], measured)):
                entries[key] = facts
    document = {"schema": 1, "target": "cuda 90", "measurements": TILES, "entries": entries}
    return json.dumps(document, indent=1) + "\n"


def speedups(workload: dict[str, Any]) -> Iterator[tuple[float, float, dict[str, Any]]]:
    """Give of each candidate the mean speed-up, the least one, and what an entry says of it."""
    default = workload["default"]
    for times, config, _ in workload["tried"]:
        gains = [default[size] / times[size] for size in times]
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        pairs = {size: [round(default[size], 1), round(times[size], 1)] for size in times}
        yield mean, min(gains), {"config": config, "speedup": round(mean, 3), "times_us": pairs}


def best_of(workload: dict[str, Any]) -> dict[str, Any] | None:
    """Find the fastest candidate, if it is faster than the default by more than noise."""
    good = [found for found in speedups(workload) if found[0] >= LEAST and found[1] >= 1]
    return max(good, key=lambda found: found[0])[2] if good else None


def others(name: str, measured: list[dict[str, Any]]) -> list[str]:
    """Name the forms of attention that take over what was measured of ``name``."""
    kernel, *words = name.split()
    if not kernel.startswith("attention"):
        return []
    operands, size, weight, _ = words
    weights = [weight]
    if weight == "plain" and not any(w["workload"] == name.replace(weight, "heavy") for w in measured):
        weights.append("heavy")
    keys = [f"{kernel} {operands} {size} {w} {mask}" for w in weights for mask in ("full", "causal")]
    return [key for key in keys if key != name]


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {SHIPPED.name}")
    given = parser.parse_args()
    if given.write:
        SHIPPED.write_text(text())
    else:
        print(text(), end="")


if __name__ == "__main__":
    main()
