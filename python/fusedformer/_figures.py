"""Figures in one style, as SVG in data URIs, so that a page needs nothing besides itself."""

from __future__ import annotations

import base64
import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["plt", "source", "styled"]

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
    """A context in which figures are drawn in the style."""
    context: AbstractContextManager[None] = plt.rc_context(_STYLE)
    return context


def source(figure: Figure) -> str:
    """``src`` of an image; the figure is closed."""
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
