"""Progress of a training, and tables, in the terminal; lines where it is no terminal."""

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

_LINES = 20  # where there is no bar


@contextmanager
def progress(
    console: Console, name: str, steps: int, done: int = 0
) -> Iterator[Callable[[str], None]]:
    """A bar of ``steps``, of which some are done; the function says that one more is, and how."""
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
    """As it is: brackets in it are no markup, and nothing is cut."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """All but the first column flush right."""
    table = new_table(title, *columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
