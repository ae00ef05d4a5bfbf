"""Show progress in the terminal, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusedformer.tools.report import rows
from fusedformer.tools.report.verdict import Check


class Bars:
    """Shows a progress bar for each stage; without a terminal, a line when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    @contextmanager
    def stage(self, name: str, steps: int | None) -> Iterator[Callable[[], None]]:
        task = self.progress.add_task(name, total=steps)
        if not self.console.is_terminal:
            self.console.print(name)
        yield lambda: self.progress.advance(task)
        done = self.progress.tasks[task].completed or 1
        self.progress.update(task, total=done, completed=done)


def show(console: Console, result: dict[str, Any], found: list[Check]) -> None:
    """Print tables of errors, times, memory and ops; then what passed."""
    table = new_table("Errors against float64", "", "fusedformer", "stock", "ratio", "")
    for dtype, one in result["dtypes"].items():
        for name, ours, stock, ratio, passed in rows.error_rows(one):
            table.add_row(f"{dtype} {name}", ours, stock, ratio, _mark(passed))
    console.print(table)

    table = new_table("Time and peak memory of a batch", "", "fusedformer", "stock", "stock / ours")
    for dtype, one in result["dtypes"].items():
        for kind, name in rows.DIRECTIONS.items():
            table.add_row(f"{dtype} {name}, time", *rows.speed_cells(one[kind]))
            table.add_row(f"{dtype} {name}, memory", *rows.memory_cells(one, kind))
    console.print(table)

    dtypes, summary = rows.op_summary(result["ops"])
    table = new_table("Ops: tensors that pass (largest error as a share of its limit)", "", *dtypes)
    for row in summary:
        table.add_row(*row)
    console.print(table)
    if "skipped" in result["benchmarks"]:
        console.print(f"Op timings: {result['benchmarks']['skipped']}")
    else:
        columns = "op", "case", "", "fusedformer", "fastest peer", "peer / ours"
        table = new_table("Op timings", *columns)
        for cells in rows.timing_rows(result["benchmarks"]):
            table.add_row(*cells)
        console.print(table)

    for check in found:
        console.print(f"{_mark(check.passed)} {check.name}: {check.detail}", highlight=False)


def new_table(title: str, *columns: str) -> Table:
    """Make a table without rows, all columns but the first flush right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _mark(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"
