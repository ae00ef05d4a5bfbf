"""Draw the plots of the page."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedformer._internal.figures import plt, source, styled

COLOURS = {"stock": "#94a3b8", "fused": "#2563eb"}
LABELS = {"stock": "stock Hugging Face", "fused": "fusedformer"}
MIB = 2**20


def draw(result: dict[str, Any]) -> dict[str, str]:
    """Draw the plots; return the ``src`` attributes of layers, cosine, time, memory, lengths."""
    drawings = {
        "layers": _layers,
        "cosine": _cosine,
        "time": _time,
        "memory": _memory,
        "lengths": _lengths,
    }
    with styled():
        return {name: source(function(result)) for name, function in drawings.items()}


def _panels(
    result: dict[str, Any], height: float = 3.2
) -> tuple[Figure, list[tuple[Axes, str, Any]]]:
    """Make a figure with one panel for each dtype."""
    found = result["dtypes"]
    figure, axes = plt.subplots(1, len(found), figsize=(9.2, height), layout="constrained")
    rows = zip(list(getattr(axes, "flat", [axes])), found.items(), strict=True)
    return figure, [(axis, dtype, one) for axis, (dtype, one) in rows]


def _layers(result: dict[str, Any]) -> Figure:
    figure, panels = _panels(result)
    for axis, dtype, one in panels:
        depths = one["layers"]
        names = ["emb." if i == 0 else str(i) for i in range(len(depths))]
        for name, key in (("stock", "stock_rms_error"), ("fused", "rms_error")):
            values = [depth[key] for depth in depths]
            # Stock's line is wider and below, so that both show where they agree.
            width, size = (5.0, 8) if name == "stock" else (1.8, 4)
            axis.plot(
                names, values, marker="o", linewidth=width, markersize=size,
                color=COLOURS[name], label=LABELS[name],
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(dtype)
        axis.set_xlabel("after layer")
    panels[0][0].set_ylabel("RMS error against float64")
    panels[0][0].legend()
    return figure


def _cosine(result: dict[str, Any]) -> Figure:
    figure, panels = _panels(result)
    for axis, dtype, one in panels:
        for name in ("stock", "fused"):
            values = sorted(max(v, 1e-17) for v in one["cosine_loss"][name])
            axis.plot(
                range(1, len(values) + 1), values, linewidth=5.0 if name == "stock" else 1.8,
                color=COLOURS[name], label=LABELS[name],
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(dtype)
        axis.set_xlabel("passages, from best to worst")
    panels[0][0].set_ylabel("1 − cosine with float64")
    panels[0][0].legend()
    return figure


def _time(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.2), layout="constrained")
    for axis, kind, title in zip(
        axes, ("forward", "step"), ("forward", "forward + backward"), strict=True
    ):
        rows = {
            dtype: {name: one[kind][name] for name in COLOURS}
            for dtype, one in result["dtypes"].items()
        }
        scale = 1e3 if max(r[n]["median"] for r in rows.values() for n in r) < 1 else 1.0
        bars = {d: {n: v["median"] * scale for n, v in r.items()} for d, r in rows.items()}
        spread = {
            d: {n: (v["p20"] * scale, v["p80"] * scale) for n, v in r.items()}
            for d, r in rows.items()
        }
        _bars(axis, bars, spread)
        axis.set_title(title)
        axis.set_ylabel(f"{'ms' if scale > 1 else 's'} for a batch, median")
    return figure


def _memory(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.2), layout="constrained")
    for axis, kind, title in zip(
        axes, ("forward", "step"), ("forward", "forward + backward"), strict=True
    ):
        bars = {
            dtype: {name: one["peak_memory_bytes"][kind][name] / MIB for name in COLOURS}
            for dtype, one in result["dtypes"].items()
        }
        _bars(axis, bars, None)
        axis.set_title(title)
        axis.set_ylabel("peak MiB for a batch")
    return figure


def _bars(
    axis: Axes,
    values: dict[str, dict[str, float]],
    spread: dict[str, dict[str, tuple[float, float]]] | None,
) -> None:
    """Draw a pair of bars for each dtype, with values, and whiskers for the spread."""
    for side, name in enumerate(COLOURS):
        for place, (dtype, row) in enumerate(values.items()):
            x, value = place + 0.38 * (side - 0.5), row[name]
            top = value
            axis.bar(x, value, 0.34, color=COLOURS[name], label=None if place else LABELS[name])
            if spread is not None:
                low, high = spread[dtype][name]
                axis.plot([x, x], [low, high], color="#0f172a", linewidth=1)
                top = max(top, high)
            axis.annotate(
                f"{value:.3g}", (x, top), (0, 3), textcoords="offset points", ha="center",
                fontsize=9, color="#0f172a",
            )  # fmt: skip
    axis.set_xticks(range(len(values)), list(values))
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.3)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right", fontsize=8)


def _lengths(result: dict[str, Any]) -> Figure:
    corpus = result["corpus"]
    figure, axis = plt.subplots(figsize=(9.2, 2.6), layout="constrained")
    axis.hist(corpus["tokens"], bins=range(0, 272, 8), color=COLOURS["fused"], rwidth=0.9)
    mean = corpus["mean_tokens"]
    axis.axvline(mean, color="#0f172a", linewidth=1.2, linestyle="--")
    axis.annotate(f"mean {mean:.0f}", (mean, axis.get_ylim()[1]), (6, -12),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axis.set_xlabel("tokens in a passage")
    axis.set_ylabel("passages")
    return figure
