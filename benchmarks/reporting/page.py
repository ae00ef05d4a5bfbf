"""Result files as one page of its own: ``python benchmarks/reporting/page.py FILE...``.

For each file and suite the tables of ``table.py``, bars of how many times the library's time the
others take, and a roofline: what was computed a second over FLOPs a byte, under the two ceilings
measured in the same run. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fusedformer._internal.html import image, page, section
from fusedformer._internal.html import table as html_table
from harness.records import problems, rates
from reporting.table import OURS, cells, groups, markdown

COLOURS = ("#2563eb", "#94a3b8", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#64748b")


def html(documents: dict[str, dict[str, Any]]) -> str:
    """Make the page of result documents by file name."""
    parts: list[str] = []
    for name, document in documents.items():
        parts.append(section(name, f"<p>{escape(_measured(document))}</p>", *_absent(document)))
        for suite in dict.fromkeys(record["suite"] for record in document["records"]):
            parts.append(section(f"{name}: {suite}", *_suite(document, suite)))
        said = escape(markdown(document))
        parts.append(
            section(
                f"{name}: for a README",
                f"<details><summary>Markdown</summary><pre>{said}</pre></details>",
            )
        )
    return page(
        "fusedformer benchmarks",
        "fusedformer beside its peers",
        "Medians. Every provider met the parity criterion before it was timed; providers of a case "
        "were timed in the same rounds. The share is that of the floor: the time that the counted "
        "bytes or FLOPs need at the ceilings.",
        parts,
    )


def _measured(document: dict[str, Any]) -> str:
    return markdown({**document, "records": []})


def _absent(document: dict[str, Any]) -> Iterable[str]:
    if document["absent"]:
        found = ", ".join(f"{name} ({why})" for name, why in document["absent"].items())
        yield f'<p class="soft">Absent: {escape(found)}</p>'


def _suite(document: dict[str, Any], suite: str) -> Iterable[str]:
    records = [r for r in document["records"] if r["suite"] == suite]
    for (_, direction), found in groups(records).items():
        head, body = cells(found, document["ceilings"])
        yield f"<h3>{escape(direction)}, {escape(found[0]['dtype'])}</h3>"
        yield html_table(head, body)
        yield image(_bars(found), f"time of each provider over the library's, {suite}, {direction}")
    yield image(_roofline(records, document["ceilings"]), f"roofline, {suite}")


def _bars(records: list[dict[str, Any]]) -> str:
    """Draw times as multiples of the library's, a group of bars for each case."""
    from fusedformer._internal.figures import plt, source, styled

    timed = [r for r in records if r["status"] == "timed"]
    ours = {r["case"]: r["median_us"] for r in timed if r["provider"] == OURS}
    cases = list(ours)
    names = [n for n in dict.fromkeys(r["provider"] for r in timed) if n != OURS]
    with styled():
        height = 1.0 + 0.16 * max(1, len(cases) * (len(names) + 1))
        figure, axis = plt.subplots(figsize=(9.2, height), layout="constrained")
        for place, name in enumerate(names):
            for case, record in ((r["case"], r) for r in timed if r["provider"] == name):
                if case in ours:
                    y = -cases.index(case) - place / (len(names) + 1)
                    axis.barh(
                        y,
                        record["median_us"] / ours[case],
                        0.8 / (len(names) + 1),
                        color=COLOURS[(place + 1) % len(COLOURS)],
                        label=name if case == cases[0] else None,
                    )
        axis.axvline(1.0, color=COLOURS[0], linewidth=1.5)
        axis.set_yticks([-i - 0.3 for i in range(len(cases))], cases, fontsize=7)
        axis.set_xlabel("times the library's time (blue line)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="lower right")
        return source(figure)


def _roofline(records: list[dict[str, Any]], ceilings: dict[str, Any]) -> str:
    from fusedformer._internal.figures import plt, source, styled

    bandwidth, peak = ceilings["copy_gb_s"] / 1e3, ceilings["matmul_tflop_s"]
    timed = [r for r in records if r["status"] == "timed" and r["bytes"] and r["flops"]]
    with styled():
        figure, axis = plt.subplots(figsize=(9.2, 3.6), layout="constrained")
        names = list(dict.fromkeys(r["provider"] for r in timed))
        for place, name in enumerate(names):
            mine = [r for r in timed if r["provider"] == name]
            axis.scatter(
                [r["flops"] / r["bytes"] for r in mine],
                [rates(r, ceilings).tflop_s for r in mine],
                s=34 if name == OURS else 14,
                color=COLOURS[place % len(COLOURS)],
                label=name,
                zorder=3 if name == OURS else 2,
            )
        found = [r["flops"] / r["bytes"] for r in timed] or [1.0]
        low, high = min(*found, peak / bandwidth) / 3, max(*found, peak / bandwidth) * 3
        axis.plot(
            [low, peak / bandwidth, high],
            [low * bandwidth, peak, peak],
            color="#0f172a",
            linewidth=1.2,
            label="ceilings",
        )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("FLOPs a byte")
        axis.set_ylabel("TFLOP/s")
        axis.legend(fontsize=7)
        return source(figure)


def main() -> int:
    """Write the page; 2 if a file is no result file."""
    parser = argparse.ArgumentParser(prog="bench report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks.html"),
        help="the page (default: benchmarks.html)",
    )
    given = parser.parse_args()
    documents: dict[str, dict[str, Any]] = {}
    for path in given.files:
        documents[path.name] = json.loads(path.read_text())
        wrong = problems(documents[path.name])
        if wrong:
            print(f"{path}: not a result file: {wrong[0]}", file=sys.stderr)
            return 2
    given.out.write_text(html(documents), encoding="utf-8")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
