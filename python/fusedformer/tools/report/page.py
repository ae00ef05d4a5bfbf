"""Write the report as ``index.html``, a single file, and as ``report.json``."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from fusedformer._internal.html import image, page, section, table, verdict
from fusedformer.tools.report import plots, rows

_HOW_TO_READ = """
<p>The same pretrained sentence encoder, with the same weights and the same text, was run twice:
as Hugging Face ships it ("stock") and on fusedformer. Both answers were compared with a third,
computed in float64, which is precise enough to count as the truth.</p>
<p><b>Errors.</b> Every number format rounds, so stock is not exact either, and its own error is
the yardstick. A result passes if fusedformer's error is at most twice stock's plus two roundings
of the format, at its worst element and on average (RMS). A ratio of 1 means as accurate as stock,
below 1 more accurate.</p>
<p><b>Neighbours.</b> What such a model is used for is to find similar texts. For each passage the
others were ranked by similarity; the tables count how often that ranking is the truth's. Two
passages that are almost equally similar can change places through rounding alone, in stock as
well; only a change larger than that counts against fusedformer.</p>
<p><b>Time and memory.</b> Both programs took turns in one run, batch by batch, so that a busy
machine slows both alike. Above 1x fusedformer is faster, or needs less memory. Speed is measured,
not judged: the verdict is about correctness alone.</p>
"""


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write both files into the folder ``out``, made if missing; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    index, data = out / "index.html", out / "report.json"
    data.write_text(json.dumps(result, indent=1) + "\n")
    index.write_text(html(result), encoding="utf-8")
    return [index, data]


def html(result: dict[str, Any]) -> str:
    """Write the page."""
    drawn = plots.draw(result)
    return page(
        "fusedformer report",
        "fusedformer and stock Hugging Face, side by side",
        f"all-MiniLM-L6-v2 on {escape(result['device'])}, {escape(result['date'])}",
        [
            _verdict(result),
            _tiles(result),
            section("How to read this page", _HOW_TO_READ),
            section("Accuracy", *_accuracy(result, drawn)),
            section("Nearest neighbours", *_neighbours(result, drawn)),
            section("Time and peak memory", *_speed(result, drawn)),
            section("The text", *_text(result, drawn)),
            section("Parity of all ops", *_ops(result["ops"])),
            section("Timings of ops", *_timings(result["benchmarks"])),
            section("Made with", *_made_with(result)),
        ],
    )


def _verdict(result: dict[str, Any]) -> str:
    failed = [check for check in result["checks"] if not check["passed"]]
    if not failed:
        said = (
            f"All {len(result['checks'])} checks hold: embeddings, layers, gradients, neighbours "
            f"and ops."
        )
        return verdict(True, "PASS: as exact as stock", [said])
    lines = [f"{check['name']}: {check['detail']}" for check in failed]
    return verdict(False, f"FAIL: {len(failed)} checks", lines)


def _tiles(result: dict[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    for dtype, one in result["dtypes"].items():
        ranks, errors = one["neighbours"]["fused"], one["errors"]
        ratio = errors["rms_error"] / errors["stock_rms_error"] if errors["stock_rms_error"] else 1
        tiles += [
            (f"{ratio:.2f}x", f"stock's RMS error, embeddings in {dtype}"),
            (
                f"{ranks['top1_unchanged']} of {ranks['passages']}",
                f"nearest neighbours as in float64, {dtype}",
            ),
            (f"{one['forward']['speedup']['median']:.2f}x", f"stock's speed, forward, {dtype}"),
            (
                f"{one['step']['speedup']['median']:.2f}x",
                f"stock's speed, forward + backward, {dtype}",
            ),
        ]
    found = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>'
        for value, label in tiles
    )
    return f'<div class="tiles">{found}</div>'


def _accuracy(result: dict[str, Any], drawn: dict[str, str]) -> list[str]:
    body = [
        (f"{dtype}: {row[0]}", *row[1:])
        for dtype, one in result["dtypes"].items()
        for row in rows.error_rows(one)
    ]
    judged = next(iter(result["dtypes"].values()))
    passages = judged["layer_passages"]
    skipped = sum(not gradient["judged"] for gradient in judged["gradients"])
    return [
        '<p class="soft">The truth of a dtype is stock in float64 with the weights rounded to that '
        "dtype, so that what is compared is the computation.</p>",
        table(["", "fusedformer", "stock", "ratio", ""], body),
        f"<h3>Growth of the error with depth (real tokens of {passages} passages)</h3>",
        image(drawn["layers"], "RMS error against float64 after each layer"),
        f'<p class="soft">Gradients: every parameter, those of a kind judged together over all '
        f"layers, for random gradients of the embeddings. The biases of the keys ({skipped} kind) "
        f"are not judged: their true gradient is zero, what is computed is rounding alone.</p>",
    ]


def _neighbours(result: dict[str, Any], drawn: dict[str, str]) -> list[str]:
    parts = []
    for dtype, one in result["dtypes"].items():
        gap = one["neighbours"]["fused"]["tie"]
        parts += [
            f"<h3>{escape(dtype)} (a tie: true similarities that differ by less than "
            f"{gap:.1e})</h3>",
            table(["passages", "fusedformer", "stock"], rows.neighbour_rows(one)),
        ]
    return [
        *parts,
        "<h3>How far each embedding turned away from the true one</h3>",
        table(["lowest cosine with the truth", "fusedformer", "stock"], rows.cosine_rows(result)),
        image(drawn["cosine"], "one minus cosine with float64, passage by passage"),
    ]


def _speed(result: dict[str, Any], drawn: dict[str, str]) -> list[str]:
    times, memory = [], []
    for dtype, one in result["dtypes"].items():
        for kind, name in rows.DIRECTIONS.items():
            times.append((f"{dtype}: {name}", *rows.speed_cells(one[kind])))
            memory.append((f"{dtype}: {name}", *rows.memory_cells(one, kind)))
    first = next(iter(result["dtypes"].values()))
    size, length = first["step_batch"]
    counted = (
        "torch's caching allocator"
        if result["device_type"] == "cuda"
        else "each allocation and release of torch's CPU allocator, as its profiler reports them"
    )
    return [
        f'<p class="soft">Batches of {result["corpus"]["batch"]} passages in their natural order, '
        f"padded to the longest. Forward: inference over the corpus. Forward + backward: a batch "
        f"of {size} x {length}, as in training, dropout included. Medians, with the 20th and "
        f"80th percentile; the ratio is that of pairs taken one after the other.</p>",
        table(["a batch", "fusedformer", "stock", "stock / fusedformer"], times),
        image(drawn["time"], "time of a batch, stock and fusedformer"),
        f'<p class="soft">Peak memory for that batch of {size} x {length}, beyond weights and '
        f"inputs, counted by {counted}.</p>",
        table(["peak memory", "fusedformer", "stock", "stock / fusedformer"], memory),
        image(drawn["memory"], "peak memory of a batch, stock and fusedformer"),
    ]


def _text(result: dict[str, Any], drawn: dict[str, str]) -> list[str]:
    corpus = result["corpus"]
    share = corpus["mean_tokens"] / corpus["max_tokens"]
    return [
        f"<p>{corpus['passages']} docstrings of Python's standard library, cut at 256 tokens as "
        f"this model does: {corpus['mean_tokens']:.0f} tokens on average, {corpus['max_tokens']} "
        f"at most (mean/max {share:.2f}). In batches of {corpus['batch']}, "
        f"{corpus['padding_share']:.0%} of all positions are padding.</p>",
        image(drawn["lengths"], "histogram of the lengths of the passages"),
    ]


def _ops(ops: dict[str, Any]) -> list[str]:
    where = "the Triton kernels" if ops["backend"] == "triton" else "the ATen compositions"
    place = f"on {ops['device']}"
    if ops["interpreter"]:
        place = "in Triton's interpreter, without a GPU"
    head = ["op", "dtype", "passed", "nearest to its limit", "ours", "stock", ""]
    return [
        f'<p class="soft">Outputs and every gradient of {escape(where)}, run {escape(place)}, by '
        f"the same criterion. Errors are of the tensor that used up most of its limit.</p>",
        table(head, rows.op_rows(ops)),
    ]


def _timings(benchmarks: dict[str, Any]) -> list[str]:
    if "skipped" in benchmarks:
        return [f"<p>{escape(benchmarks['skipped'])}</p>"]
    head = ["op", "case", "direction", "fusedformer", "fastest peer", "peer / ours"]
    return [
        f'<p class="soft">Measured on {escape(benchmarks["device"])}.</p>',
        table(head, rows.timing_rows(benchmarks)),
    ]


def _made_with(result: dict[str, Any]) -> list[str]:
    commit = result["commit"] or "not a checkout"
    facts = {
        "device": f"{result['device']}, {result['threads']} threads",
        "commit": commit + (" with changes" if result["dirty"] else ""),
        **{name: version or "not installed" for name, version in result["versions"].items()},
        "time taken": f"{result['seconds']['total']:.0f} s",
    }
    return [
        table(["", ""], facts.items()),
        '<p class="soft">All numbers and samples are in report.json beside this page.</p>',
    ]
