"""Write the reports of the parity tool as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusedformer._internal.text import table
from fusedformer.parity.measure import Measured

if TYPE_CHECKING:
    from fusedformer.parity.compared import ParityReport

HEAD = (
    "", "max error", "stock's", "ratio", "RMS error", "stock's", "max ULP", "stock's",
    "1 - cosine", "worst at", "",
)  # fmt: skip
SHOWN = 12  # rows of a kind at most, those nearest to their limits


def report_text(report: ParityReport) -> str:
    """Write outputs, the gradients nearest to their limits, the layers, and the verdict."""
    parts = []
    for kind in ("output", "gradient", "submodule"):
        rows = report.of(kind)
        if not rows:
            continue
        shown = rows
        if kind == "gradient":
            shown = nearest(rows)[:SHOWN]
        elif kind == "submodule":
            shown = layers(rows)
        title = f"{kind}s" if len(shown) == len(rows) else f"{kind}s: {len(shown)} of {len(rows)}"
        parts.append(table((title, *HEAD[1:]), [cells(row) for row in shown], range(1, 9)))
    parts.append("\n".join(verdict(report)))
    return "\n\n".join(parts)


def cells(row: Measured) -> list[str]:
    """Write the cells of one tensor, under :data:`HEAD`."""
    c = row.comparison
    verdict = "pass" if row.passed else "FAIL"
    if row.kind == "submodule":
        verdict = "drifts" if row.drifts else ""
    if not row.judged:
        verdict = "not judged"
    return [
        row.name, f"{c.error:.2e}", f"{c.stock_error:.2e}", f"{c.ratio:.2f}",
        f"{c.rms_error:.2e}", f"{c.stock_rms_error:.2e}", f"{row.max_ulp:.3g}",
        f"{row.baseline_max_ulp:.3g}", f"{row.cosine_loss:.1e}", str(list(row.worst)), verdict,
    ]  # fmt: skip


def nearest(rows: Sequence[Measured]) -> list[Measured]:
    """Sort: failures first, then by how much of its limit the error used."""

    def used(row: Measured) -> tuple[bool, float]:
        c = row.comparison
        pairs = (c.error, c.limit), (c.rms_error, c.rms_limit)
        return row.passed, -max(error / limit if limit else 0.0 for error, limit in pairs)

    return sorted(rows, key=used)


def layers(rows: Sequence[Measured]) -> list[Measured]:
    """Return the longest series of submodules whose names differ in one number, or all."""
    groups: dict[str, list[Measured]] = {}
    for row in rows:
        if re.search(r"(^|\.)\d+( \(call \d+\))?$", row.name):
            groups.setdefault(re.sub(r"\d+( \(call \d+\))?$", "", row.name), []).append(row)
    return max(groups.values(), key=len) if groups else list(rows)


def verdict(report: ParityReport) -> list[str]:
    """Write the lines of the verdict."""
    judged = [row for row in report.rows if row.kind != "submodule"]
    lines = []
    if report.not_called:
        lines.append(
            f"{len(report.not_called)} submodules are not called by {report.names[0]}: fused into "
            f"those above them"
        )
    unjudged = [row.name for row in judged if not row.judged]
    if unjudged:
        lines.append(
            f"{len(unjudged)} not judged, their true value being below the baseline's rounding: "
            + ", ".join(unjudged[:4])
            + (", ..." if len(unjudged) > 4 else "")
        )
    if report.of("submodule"):
        drift: Any = report.first_drift
        lines.append(
            f"the first submodule that drifts faster than {report.names[1]}: "
            + ("none" if drift is None else drift.name)
        )
    lines += [f"FAILED {fault}" for fault in report.failures]
    passed = sum(row.passed for row in judged)
    lines.append(
        f"{'PASS' if report.passed else 'FAIL'}: {passed} of {len(judged)} tensors: error at most "
        f"twice {report.names[1]}'s plus two roundings, against float64"
    )
    return lines
