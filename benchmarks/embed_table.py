"""Time and exactness of ``fusedformer.embed`` on the CPU, by ``batch_tokens`` and by dtype.

    PYTHONPATH=python:kernels python benchmarks/embed_table.py [--tokens 1024 4096] [--json FILE]

Texts are docstrings of the standard library, the model is all-MiniLM-L6-v2. Settings take turns, so
that other work on the machine meets all of them, and the median of the rounds counts. Cosines are
those to the vectors of the model in float64. ``autocast`` has weights in float32, and products in
bfloat16 by ``torch.autocast``. The first line is ``encode`` of the stock model in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedformer
from fusedformer._internal.text import table
from fusedformer.tools.environment import describe
from fusedformer.tools.report.corpus import stdlib_passages
from fusedformer.tools.report.minilm import WEIGHTS_PACKAGE, require_extras
from harness.serving_peers import sentence_model

WAYS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


class Row(NamedTuple):
    """What embeds, and what was measured of it."""

    way: str
    batch_tokens: int | None
    seconds: float
    mean_cosine: float
    least_cosine: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description="Time and exactness of fusedformer.embed.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=["float32"])
    parser.add_argument("--texts", type=int, default=512, help="how many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    given = parser.parse_args(argv)
    require_extras()
    warnings.filterwarnings("ignore", "embed")  # texts that are cut
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    texts = [passage.text for passage in stdlib_passages(given.texts)]
    calls = _calls(folder, texts, given.ways, given.tokens)
    rows = measured(calls, _truth(folder, texts), given.rounds)
    head = "way", "batch_tokens", "seconds", "texts/s", "mean cosine", "least cosine"
    body = [_cells(row, len(texts)) for row in rows]
    print(table(head, body, right=(1, 2, 3, 4, 5)))
    if given.json:
        found = {"texts": len(texts), "rounds": given.rounds, "rows": [r._asdict() for r in rows]}
        given.json.write_text(
            json.dumps({**describe(torch.device("cpu")), **found}, indent=1) + "\n"
        )
    return 0


def measured(
    calls: dict[tuple[str, int | None], Callable[[], Tensor]], truth: Tensor, rounds: int
) -> list[Row]:
    """Call in turns; the first round warms up and is compared with ``truth``."""
    cosines = {name: F.cosine_similarity(call().double(), truth) for name, call in calls.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return [
        Row(*name, statistics.median(seconds[name]), one.mean().item(), one.min().item())
        for name, one in cosines.items()
    ]


def _cells(row: Row, texts: int) -> list[str]:
    cosines = f"{row.mean_cosine:.6f}", f"{row.least_cosine:.6f}"
    speed = f"{row.seconds:.2f}", f"{texts / row.seconds:.0f}"
    return [row.way, str(row.batch_tokens or ""), *speed, *cosines]


def _calls(
    folder: Path, texts: list[str], ways: Sequence[str], tokens: Sequence[int]
) -> dict[tuple[str, int | None], Callable[[], Tensor]]:
    stock = sentence_model(folder, torch.float32)
    calls: dict[tuple[str, int | None], Callable[[], Tensor]] = {
        ("stock", None): lambda: torch.from_numpy(stock.encode(texts, show_progress_bar=False))
    }
    for way in ways:
        model = sentence_model(folder, WAYS[way])
        fusedformer.fuse(model)
        for most in tokens:
            calls[way, most] = lambda model=model, way=way, most=most: _embedded(  # type: ignore[misc]
                model, texts, way, most
            )
    return calls


def _embedded(model: Any, texts: list[str], way: str, most: int) -> Tensor:
    half = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    with half:
        found = fusedformer.embed(model, texts, batch_tokens=most, show_progress_bar=False)
    return torch.from_numpy(found)


def _truth(folder: Path, texts: list[str]) -> Tensor:
    found = sentence_model(folder, torch.float32).double().encode(texts, show_progress_bar=False)
    return torch.from_numpy(found)


if __name__ == "__main__":
    sys.exit(main())
