"""The report of :func:`fusedformer.fuse`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from fusedformer._internal.text import table


class Replaced(NamedTuple):
    """A module, or a model's attention, and what computes it now."""

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A module of a kind that the library has, which it does not replace, and why."""

    path: str
    module: str
    reason: str


class FusionReport:
    """Replacements, and modules left alone; ``str()`` of it is a table.

    Attributes:
        replaced: tuples of path, before, after.
        left: tuples of path, module, reason.
    """

    def __init__(self, replaced: Iterable[Replaced], left: Iterable[Left]) -> None:
        self.replaced = tuple(replaced)
        self.left = tuple(left)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {
            "replaced": [one._asdict() for one in self.replaced],
            "left": [one._asdict() for one in self.left],
        }

    def __str__(self) -> str:
        lines = []
        if self.replaced:
            lines.append(table(("path", "before", "after"), _shown(self.replaced)))
        if self.left:
            lines += ["", table(("left alone", "module", "reason"), _shown(self.left))]
        counts = f"{len(self.replaced)} replaced, {len(self.left)} left alone"
        return "\n".join([*lines, "", counts]).lstrip("\n")

    __repr__ = __str__


def _shown(rows: Iterable[tuple[str, ...]]) -> list[list[str]]:
    return [[cell or "(the model)" for cell in row] for row in rows]
