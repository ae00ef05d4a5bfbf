"""Write the reports of the parity tool as pages, and draw their pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusedformer._internal.html import image, page, section, table, verdict
from fusedformer.parity import tables
from fusedformer.parity.measure import Measured
from fusedformer.parity.run import share_of_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusedformer.parity.compared import ParityReport
    from fusedformer.parity.trained import TrainingReport

GREY, BLUE = "#94a3b8", "#2563eb"


def report_page(report: ParityReport) -> str:
    """Write the page of a comparison."""
    lines = tables.verdict(report)
    parts = [verdict(report.passed, lines[-1].partition(":")[0], lines[::-1])]
    if report.of("submodule") and importlib.util.find_spec("matplotlib") is not None:
        from fusedformer._internal.figures import source

        parts.append(
            section(
                "Error by depth",
                image(source(growth(report)), "RMS error against float64 after each submodule"),
            )
        )
    for kind in ("output", "gradient", "submodule"):
        rows = report.of(kind)
        if rows:
            ordered = tables.nearest(rows) if kind == "gradient" else rows
            parts.append(section(f"{kind.capitalize()}s", table(tables.HEAD, _body(ordered))))
    first, second = report.names
    return page(
        "Numerical parity",
        f"{first} beside {second}",
        "Errors against the same computation in float64.",
        parts,
    )


def ops_page(result: dict[str, Any]) -> str:
    """Write the page of a run over the ops, tensors nearest to their limits first."""
    records = sorted(result["records"], key=share_of_limit, reverse=True)
    failed = [record for record in records if not record["passed"]]
    said = [f"{len(records) - len(failed)} of {len(records)} tensors pass"]
    said += [f"{r['op']}, {r['case']}, {r['dtype']}: {r['fault']}" for r in failed]
    body = [
        (
            f"{r['op']}, {r['case']}, {r['tensor']}",
            r["dtype"],
            f"{r['error']:.2e}",
            f"{r['stock_error']:.2e}",
            f"{r['ratio']:.2f}",
            bool(r["passed"]),
        )
        for r in records
    ]
    head = ("op, case, tensor", "dtype", "ours", "stock's", "ratio", "")
    return page(
        "Numerical parity of the ops",
        "fusedformer's ops beside stock PyTorch",
        f"{result['backend']} backend on {result['device']}, torch {result['torch']}",
        [verdict(not failed, "FAIL" if failed else "PASS", said), section("", table(head, body))],
    )


def growth(report: ParityReport) -> Figure:
    """Draw RMS errors of the layers, or of all submodules where none are numbered."""
    from fusedformer._internal.figures import plt, styled

    rows = tables.layers(report.of("submodule"))
    if not rows:
        raise ValueError("plot(): there are no submodules in the report")
    with styled():
        figure, axis = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
        depths = range(1, len(rows) + 1)
        for label, key, colour, width in (
            (report.names[1], "stock_rms_error", GREY, 5.0),
            (report.names[0], "rms_error", BLUE, 1.8),
        ):
            values = [getattr(row.comparison, key) for row in rows]
            axis.plot(depths, values, marker="o", linewidth=width, color=colour, label=label)
        axis.set_yscale("log")
        axis.set_xticks(list(depths), [_short(row.name) for row in rows], rotation=30, ha="right")
        axis.set_ylabel("RMS error against float64")
        axis.legend()
    return figure


def curves(report: TrainingReport) -> Figure:
    """Draw losses, and how far losses, weights and gradients are from the baseline's."""
    from fusedformer._internal.figures import plt, styled

    with styled():
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
        steps = range(1, len(report.losses["baseline"]) + 1)
        for name, colour, width in (("baseline", GREY, 5.0), ("candidate", BLUE, 1.8)):
            axes[0].plot(steps, report.losses[name], color=colour, linewidth=width, label=name)
        axes[0].legend()
        panels = (report.loss_gaps, report.weight_gaps, report.gradient_gaps)
        for axis, gaps in zip(axes[1:], panels, strict=True):
            for name, values in gaps.items():
                colour = BLUE if name == "candidate" else GREY
                axis.plot(steps, [max(v, 1e-18) for v in values], color=colour)
            axis.set_yscale("log")
        for axis, title in zip(axes, ("loss", "loss, distance", "weights, distance",
                                      "gradients, distance"), strict=True):  # fmt: skip
            axis.set_title(title)
            axis.set_xlabel("step")
    return figure


def _body(rows: Sequence[Measured]) -> list[list[str | bool]]:
    return [
        [row.passed if cell in ("pass", "FAIL") else cell for cell in tables.cells(row)]
        for row in rows
    ]


def _short(name: str) -> str:
    """Shorten a dotted name to its last two parts."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if len(parts) > 2 else name
