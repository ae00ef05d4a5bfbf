"""What became faster or slower: ``python benchmarks/reporting/compare.py OLD NEW``.

Two runs differ in more than the code: clocks, load, temperature. So a time has changed only where
the spreads of the two (20th to 80th percentile) do not meet; and beside the ratio of the times
stands the ratio of the speed-ups over torch eager, each taken within its run, which a slower
machine leaves alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fusedformer._internal.text import table
from harness.case import REFERENCE
from harness.records import problems

Key = tuple[str, str, str, str, str]


def compare(
    old: dict[str, Any], new: dict[str, Any], provider: str | None = "fusedformer"
) -> list[dict[str, Any]]:
    """Compare each record in both: ``verdict`` "faster", "slower" or "", and two ratios.

    ``ratio`` is new over old time, ``relative`` that of the times as multiples of torch eager's in
    the same run, None where that was not timed. ``provider`` None takes all.
    """
    before, after = _timed(old), _timed(new)
    found = []
    for key in after:
        if key not in before or provider not in (None, key[-1]):
            continue
        a, b = before[key], after[key]
        verdict = ""
        if b["p80_us"] < a["p20_us"]:
            verdict = "faster"
        elif b["p20_us"] > a["p80_us"]:
            verdict = "slower"
        stock = (*key[:-1], REFERENCE)
        relative = None
        if stock in before and stock in after:
            moved = after[stock]["median_us"] / before[stock]["median_us"]
            relative = b["median_us"] / a["median_us"] / moved
        found.append(
            {
                "suite": key[0], "case": key[1], "direction": key[2], "dtype": key[3],
                "provider": key[4], "old_us": a["median_us"], "new_us": b["median_us"],
                "ratio": b["median_us"] / a["median_us"], "relative": relative,
                "verdict": verdict,
            }
        )  # fmt: skip
    return sorted(found, key=lambda row: row["ratio"])


def _timed(document: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (r["suite"], r["case"], r["direction"], r["dtype"], r["provider"]): r
        for r in document["records"]
        if r["status"] == "timed"
    }


def text(old: dict[str, Any], new: dict[str, Any], rows: list[dict[str, Any]], all: bool) -> str:
    """Show the changes, or with ``all`` every row, under what the two runs are."""
    lines = [
        f"{word}: {d['device']}, torch {d['torch']}, triton {d['triton']}, commit "
        f"{d['commit'][:12]}, {d['date'][:10]}"
        for word, d in (("old", old), ("new", new))
    ]
    if old["device"] != new["device"]:
        lines.append("The devices differ: of the times only the last ratio says something.")
    shown = [row for row in rows if all or row["verdict"]]
    if shown:
        body = [
            [
                f"{r['suite']}: {r['case']}",
                r["direction"],
                r["dtype"],
                r["provider"],
                f"{r['old_us']:.4g}",
                f"{r['new_us']:.4g}",
                f"{r['ratio']:.2f}",
                "" if r["relative"] is None else f"{r['relative']:.2f}",
                r["verdict"],
            ]
            for r in shown
        ]
        head = ("case", "direction", "dtype", "provider", "old us", "new us", "new / old",
                "beside torch eager", "")  # fmt: skip
        lines += ["", table(head, body, range(4, 8))]
    counts = {word: sum(r["verdict"] == word for r in rows) for word in ("faster", "slower")}
    lines += ["", f"{len(rows)} in both: {counts['faster']} faster, {counts['slower']} slower "
                  f"beyond the spread"]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Print the comparison; 1 if something is slower, 2 if a file is no result file."""
    parser = argparse.ArgumentParser(
        prog="bench compare",
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0, 1 if something became slower, 2 for what is no result file.",
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also what did not change")
    parser.add_argument("--peers", action="store_true", help="all providers")
    given = parser.parse_args()
    documents = []
    for path in (given.old, given.new):
        document = json.loads(path.read_text())
        wrong = problems(document)
        if wrong:
            print(f"{path}: not a result file: {wrong[0]}", file=sys.stderr)
            return 2
        documents.append(document)
    old, new = documents
    rows = compare(old, new, provider=None if given.peers else "fusedformer")
    print(text(old, new, rows, given.all))
    return int(any(row["verdict"] == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
