"""Write the rows of the tables as text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusedformer.parity import share_of_limit, worst_of

DIRECTIONS = {"forward": "forward", "step": "forward + backward"}
MIB = 2**20

ErrorRow = tuple[str, str, str, str, bool]


def error_rows(one: dict[str, Any]) -> Iterator[ErrorRow]:
    """Return rows (what, our error, stock's, ratio, passed) of one dtype."""
    errors, last = one["errors"], one["layers"][-1]
    judged = [gradient for gradient in one["gradients"] if gradient["judged"]]
    worst = max(judged, key=share_of_limit)
    yield "embeddings, max", *_pair(errors, ""), errors["passed"]
    yield "embeddings, RMS", *_pair(errors, "rms_"), errors["passed"]
    yield "hidden states after the last layer, RMS", *_pair(last, "rms_"), last["passed"]
    yield f"worst gradient, max ({_short(worst['name'])})", *_pair(worst, ""), worst["passed"]


def _pair(found: dict[str, Any], kind: str) -> tuple[str, str, str]:
    ours, stock = found[f"{kind}error"], found[f"stock_{kind}error" if kind else "stock_error"]
    return f"{ours:.2e}", f"{stock:.2e}", f"{ours / stock:.2f}" if stock else "-"


def _short(parameter: str) -> str:
    return parameter.removeprefix("encoder.").removesuffix(".weight")


def neighbour_rows(one: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return rows (what, ours, stock) of one dtype, in passages."""
    ours, stock = one["neighbours"]["fused"], one["neighbours"]["stock"]
    for name, key in (
        ("same nearest neighbour as float64", "top1_unchanged"),
        ("same ten nearest, in the same order", "top10_unchanged"),
        ("same ten nearest, in any order", "top10_same_set"),
        ("changed, only by ties below rounding", "ties"),
        ("changed beyond rounding", "beyond_rounding"),
    ):
        yield name, f"{ours[key]} of {ours['passages']}", f"{stock[key]} of {stock['passages']}"


def cosine_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Return rows (dtype, ours, stock): 1 less the lowest cosine of a passage with the truth."""
    for dtype, one in result["dtypes"].items():
        ours, stock = (max(one["cosine_loss"][name]) for name in ("fused", "stock"))
        yield dtype, f"1 - {ours:.1e}", f"1 - {stock:.1e}"


def speed_cells(timing: dict[str, Any]) -> tuple[str, str, str]:
    """Write our time, stock's, and their paired ratio: medians, 20th and 80th percentiles."""
    ratio = timing["speedup"]
    return (
        _seconds(timing["fused"]),
        _seconds(timing["stock"]),
        f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})",
    )


def _seconds(spread: dict[str, float]) -> str:
    unit, scale = ("ms", 1e3) if spread["median"] < 1 else ("s", 1.0)
    median, low, high = (spread[key] * scale for key in ("median", "p20", "p80"))
    return f"{median:.3g} {unit} ({low:.3g} to {high:.3g})"


def memory_cells(one: dict[str, Any], kind: str) -> tuple[str, str, str]:
    """Write our peak memory, stock's, and stock's as a multiple of ours."""
    ours, stock = (one["peak_memory_bytes"][kind][name] for name in ("fused", "stock"))
    return f"{ours / MIB:.0f} MiB", f"{stock / MIB:.0f} MiB", f"{stock / ours:.2f}x"


def op_rows(ops: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str, str, bool]]:
    """Return rows (op, dtype, passed of all, the worst, our error, stock's, passed)."""
    for group in worst_of(ops["records"]):
        worst = group["worst"]
        yield (
            group["op"],
            group["dtype"],
            f"{group['passed']} of {group['tensors']}",
            f"{worst['case']}: {worst['tensor']}",
            f"{worst['error']:.2e}",
            f"{worst['stock_error']:.2e}",
            group["passed"] == group["tensors"],
        )


def op_summary(ops: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (dtypes, rows): by op and dtype how many pass, and the largest share of a limit."""
    groups = worst_of(ops["records"])
    dtypes = list(dict.fromkeys(group["dtype"] for group in groups))
    cells: dict[str, dict[str, str]] = {}
    for group in groups:
        share = share_of_limit(group["worst"])
        text = f"{group['passed']}/{group['tensors']} ({share:.2f})"
        cells.setdefault(group["op"], {})[group["dtype"]] = text
    return dtypes, [[op, *(row.get(d, "-") for d in dtypes)] for op, row in cells.items()]


def timing_rows(benchmarks: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return rows (suite, case, direction, ours, the fastest peer, its time over ours)."""
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    for record in benchmarks["records"]:
        if record["median_us"] is not None:
            key = tuple(record[name] for name in ("suite", "case", "direction", "dtype"))
            groups.setdefault(key, {})[record["provider"]] = record["median_us"]
    for (suite, case, direction, dtype), times in groups.items():
        peers = {name: time for name, time in times.items() if name != "fusedformer"}
        if "fusedformer" in times and peers:
            ours, best = times["fusedformer"], min(peers, key=lambda name: peers[name])
            yield (
                suite, f"{case}, {dtype}", direction, f"{ours:.1f} µs",
                f"{best} {peers[best]:.1f} µs", f"{peers[best] / ours:.2f}x",
            )  # fmt: skip
