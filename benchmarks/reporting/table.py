"""Result files as Markdown tables: ``python benchmarks/reporting/table.py FILE...``.

One table for each suite and direction; a row for each case, a column for each provider with its
median time, how many times as fast the library is, and for the library the share of the floor: the
time that the counted bytes or FLOPs need at the ceilings measured in the same run. Where a case
counts tokens, their rate and the peak of memory stand beside each time.

``--fill PAGE...`` writes the tables into pages instead: each between a line
``<!-- table: FILE... -->``, with files from the checkout's root, and ``<!-- end of table -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import CHECKOUT
from harness.records import problems, rates
from reporting import commands

OURS = "fusedformer"
MARKED = re.compile(
    r"(?P<begin><!-- table: (?P<files>[^>]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def markdown(
    document: dict[str, Any], headline: bool = False, suites: Sequence[str] | None = None
) -> str:
    """Make the tables of a benchmark document, under one line that says where it was measured."""
    ceilings = document["ceilings"]
    busy = document.get("busy", 0)  # older files lack it
    lines = [
        f"{document['device']}{f' beside {busy} spinning processes' if busy else ''}, "
        f"torch {document['torch']}, triton {document['triton']}, commit "
        f"{document['commit'][:12]}{' with changes' if document['dirty'] else ''}, "
        f"{document['date'][:10]}. Ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, "
        f"{ceilings['matmul_dtype']} product {ceilings['matmul_tflop_s']:.3g} TFLOP/s.",
    ]
    wanted = [
        record
        for record in document["records"]
        if (suites is None or record["suite"] in suites) and (record["headline"] or not headline)
    ]
    for (suite, direction), records in groups(wanted).items():
        lines += ["", f"**{suite}, {direction}, {records[0]['dtype']}**", ""]
        head, body = cells(records, ceilings)
        lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def tables(documents: Sequence[dict[str, Any]], headline: bool = False) -> str:
    """Make the tables of documents of any kind: the benchmark's, then other commands'."""
    found = [markdown(document, headline) for document in documents if "records" in document]
    others = [document for document in documents if "records" not in document]
    return "\n\n".join([*found, *([commands.tables(others)] if others else [])])


def filled(page: str) -> str:
    """Write the tables that the marks of a page name into its text."""

    def fill(found: re.Match[str]) -> str:
        paths = [path for name in found["files"].split() for path in sorted(CHECKOUT.glob(name))]
        documents = [json.loads(path.read_text()) for path in paths]
        return f"{found['begin']}\n{tables(documents)}\n\n{found['end']}"

    return MARKED.sub(fill, page)


def groups(
    records: Sequence[dict[str, Any]],
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group records by suite and direction."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["suite"], record["direction"]), []).append(record)
    return found


def cells(
    records: Sequence[dict[str, Any]], ceilings: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Make the head and the rows of a table: a row for each case, a column for each provider."""
    providers = list(dict.fromkeys(record["provider"] for record in records))
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        by_case.setdefault(record["case"], {})[record["provider"]] = record
    rows = [
        [case, *(_cell(found.get(name), found.get(OURS), ceilings) for name in providers)]
        for case, found in by_case.items()
    ]
    return ["case", *providers], rows


def _cell(record: dict[str, Any] | None, ours: dict[str, Any] | None, ceilings: Any) -> str:
    if record is None:
        return ""
    if record["status"] != "timed":
        return str(record["status"])
    rate = rates(record, ceilings)
    time = _scaled(record["median_us"], "µs", "ms", "s")
    if rate.tokens_s is not None:
        time += f", {_scaled(rate.tokens_s, 'tokens/s', 'k tokens/s', 'M tokens/s')}"
        if record["peak_memory_bytes"] is not None:
            time += f", {_scaled(record['peak_memory_bytes'], 'B', 'kB', 'MB', 'GB')}"
    if record is ours:
        speed = f"{rate.tflop_s:.3g} TFLOP/s" if rate.bound == "flops" else f"{rate.gb_s:.0f} GB/s"
        return f"{time}, {speed}, {rate.percent:.0f}%"
    if ours is None or ours["status"] != "timed":
        return time
    return f"{time} ({record['median_us'] / ours['median_us']:.2f}x)"


def _scaled(value: float, *units: str) -> str:
    """Write three significant digits, in the unit, 1000 of the last, that needs no exponent."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1e3
    return f"{value:.3g} {units[-1]}"


def main() -> int:
    """Print the tables of each file; 1 if one does not meet the schema."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--headline", action="store_true", help="headline cases only")
    parser.add_argument("--fill", action="store_true", help="the files are pages: write into them")
    given = parser.parse_args()
    if given.fill:
        for path in given.files:
            path.write_text(filled(path.read_text()))
        return 0
    documents = []
    for path in given.files:
        document = json.loads(path.read_text())
        wrong = [] if commands.is_known(document) else problems(document)
        if wrong:
            print(f"{path}: not a result file: {wrong[0]}", file=sys.stderr)
            return 1
        documents.append(document)
    print(tables(documents, given.headline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
