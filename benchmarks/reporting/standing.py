"""Where the library stands beside its peers, in a line for each suite and direction."""

from __future__ import annotations

import math
from typing import Any

from reporting.table import OURS, groups


def standing(document: dict[str, Any]) -> list[str]:
    """Compare the library with the fastest peer of each case that both were timed in.

    A line says in how many cases it is at least as fast, how many times as fast it is in the
    geometric mean, and in which case it is furthest behind. Last come its own faults: what failed
    a check or raised.
    """
    lines = []
    for (suite, direction), records in groups(document["records"]).items():
        ratios = _ratios(records)
        if not ratios:
            continue
        mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
        ahead = sum(ratio >= 1 for ratio, _ in ratios)
        least, where = min(ratios)
        lines.append(
            f"{suite}, {direction}: as fast as the fastest peer in {ahead} of {len(ratios)} cases, "
            f"{mean:.2f}x in the mean; the least is {least:.2f}x ({where})"
        )
    for r in document["records"]:
        if r["provider"] == OURS and r["status"] in ("failed check", "error"):
            where = f"{r['suite']}, {r['case']}, {r['direction']}"
            lines.append(f"{r['status']}: {where}: {r['reason'].splitlines()[0][:200]}")
    return lines


def _ratios(records: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """Divide the fastest peer's time by the library's, case by case; with case and peer."""
    timed = [r for r in records if r["status"] == "timed"]
    found = []
    for ours in (r for r in timed if r["provider"] == OURS):
        peers = [
            r for r in timed if r["case"] == ours["case"] and not r["provider"].startswith(OURS)
        ]
        if peers:
            peer = min(peers, key=lambda r: float(r["median_us"]))
            words = f"{ours['case']}, {peer['provider']}"
            found.append((peer["median_us"] / ours["median_us"], words))
    return found
