"""Draw figures in one style: to files, or to SVG in data URIs for pages of one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["drawn", "plt", "source", "styled"]

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#334155",
    "axes.titlesize": 11,
    "axes.titlecolor": "#0f172a",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.hashsalt": "fusedformer",
}


def styled() -> AbstractContextManager[None]:
    """Return a context in which figures are drawn in the style."""
    context: AbstractContextManager[None] = plt.rc_context(_STYLE)
    return context


@contextmanager
def drawn(path: Path, height: float = 3.6) -> Iterator[Axes]:
    """Yield the axes of a figure, then save it in the format of its ending, SVG undated."""
    with styled():
        figure, axis = plt.subplots(figsize=(7.2, height), layout="constrained")
        yield axis
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def source(figure: Figure) -> str:
    """Return the figure as the ``src`` of an image, and close it."""
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
