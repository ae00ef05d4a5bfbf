"""Show the progress of a training, and tables; plain lines if there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fusedformer.tools.report.terminal import new_table

_LINES = 20  # printed in place of a bar


@contextmanager
def progress(
    console: Console, name: str, steps: int, done: int = 0
) -> Iterator[Callable[[str], None]]:
    """Show a bar of ``steps``; yield the function that reports a step and its figures."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[said]}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(name, total=steps, completed=done, said="")
    start, reached = time.perf_counter(), done

    def advance(said: str) -> None:
        nonlocal reached
        reached += 1
        bar.update(task, advance=1, said=said)
        every = max(1, steps // _LINES)
        if not console.is_terminal and (reached % every == 0 or reached == steps):
            took = time.perf_counter() - start
            say(console, f"{name} {reached}/{steps}  {said}  {took:.0f} s")

    with bar:
        yield advance


def say(console: Console, line: str) -> None:
    """Print a line unchanged: brackets are not markup, and nothing is cut."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table, all columns but the first flush right."""
    table = new_table(title, *columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
