"""Write the shipped table of tuned configs: ``python benchmarks/model/tuned_table.py --write``.

It is made of the tile search's result file. Of each workload the candidate with the shortest
geometric mean over the sizes is taken, if that is at most 1/1.03 of the default's and it is slower
at no size. Where the default is among the candidates, it was timed twice: ``--noise`` prints by how
much such pairs differ.

Forms that were not measured take over what was measured without a mask: causal ones, and at a head
dim where no heavy form was measured those too. A candidate that spills, or waits after each
product, in any form that would take it is left out (``LEFT_OUT``, read from the compile report),
and the next one taken. Nothing goes by length: a sequence's bits must not depend on how it was
batched.

Where the calibrated model puts tiles that were not tried before the measured ones, the entry has
them besides, as predicted (``PREDICTED``): only of kernels that were timed with other tiles.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import CHECKOUT

TILES = "benchmarks/results/h200/2026-11-28-tiles.json"
BENCH = "benchmarks/results/h200/2026-11-28-bench.json"  # of the same session: device and versions
SHIPPED = CHECKOUT / "kernels/fusedformer_kernels/tuned/sm_90.json"
LEAST = 1.03

# By the key that would take them: candidates that do not compile well with one of triton 3.6.0,
# 3.7.1 and 3.9.0. None stands for all.
LEFT_OUT: dict[str, tuple[str, ...] | None] = {
    # One wait for each product of the keys' kernel; 44 spills.
    "attention_backward half 128 plain causal": ("32x64 w4 s2", "64x128 w8 s2"),
    # Two spills with dropout.
    "attention_backward half 64 heavy full": ("64x64 w4 s3 one_loop",),
    # Spills with sinks, a window and grouped heads.
    "attention_backward half 64 heavy causal": ("64x64 w4 s3 one_loop", "64x64 w4 s3"),
    # Spills with dropout, a relative bias or an additive mask.
    "attention_backward half 128 heavy full": None,
    "attention_backward half 128 heavy causal": None,
    # Its kernel has changed since it was measured: loads are pipelined, and tiles are others.
    "activation_backward 512": None,
}

# Loads three tiles ahead, which the search did not try at this head dim; it does now. Microseconds
# of the measured config and of this one are those of ``fusedformer tune --dry-run``. With each
# of triton 3.6.0, 3.7.1 and 3.9.0 at most 3 waits for 20 products in a loop, and no spills, but one
# register of packed causal keys with 3.6.0, which waits out the loop in memory.
_THREE_STAGES = {"block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 3}
PREDICTED: dict[str, dict[str, Any]] = {
    "attention_backward half 128 plain causal": {
        "config": {**_THREE_STAGES, "one_loop": True, "split_keys": False},
        "predicted_us_of_both": {"S=512": [209.8, 186.1], "S=4096": [1191.6, 978.0]},
    },
    "attention_backward half 128 plain full": {
        "config": {**_THREE_STAGES, "one_loop": False, "split_keys": False},
        "predicted_us_of_both": {"S=512": [377.5, 284.6], "S=4096": [2500.5, 1765.8]},
    },
}


def text() -> str:
    """Put the table into the text of its file."""
    measured = {w["workload"]: w for w in json.loads((CHECKOUT / TILES).read_text())}
    session = json.loads((CHECKOUT / BENCH).read_text())
    where = {name: session[name] for name in ("device", "date", "torch", "triton", "commit")}
    entries = {}
    for key, workload in keys(measured).items():
        best = best_of(measured[workload], key)
        if best:
            entries[key] = {**best, "measured": workload, **where}
        if key in PREDICTED:
            entries[key]["predicted"] = {**PREDICTED[key], "triton": "3.7.1"}
    document = {"schema": 1, "target": "cuda 90", "measurements": TILES, "entries": entries}
    return json.dumps(document, indent=1) + "\n"


def keys(measured: Mapping[str, Any]) -> dict[str, str]:
    """Map each key that may get an entry to the workload whose measurements it takes."""
    found = {name: name for name in measured}
    for weight in ("", "heavy"):  # its own first, then that of a heavier form
        for name in measured:
            kernel, *words = name.split()
            if kernel.startswith("attention"):
                operands, dim, own, _ = words
                for mask in ("full", "causal"):
                    found.setdefault(f"{kernel} {operands} {dim} {weight or own} {mask}", name)
    return dict(sorted(found.items()))


def best_of(workload: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Find the fastest candidate for ``key``, if it beats the default by more than noise."""
    left_out = LEFT_OUT.get(key, ())
    found, most = None, LEAST
    for times, config, _ in workload["tried"]:
        gains = {size: workload["default"][size] / us for size, us in times.items()}
        mean = math.exp(sum(map(math.log, gains.values())) / len(gains))
        if left_out is None or words(config) in left_out or min(gains.values()) < 1:
            continue
        if mean >= most:
            pairs = {n: [round(workload["default"][n], 1), round(us, 1)] for n, us in times.items()}
            most = mean
            found = {"config": config, "speedup": round(mean, 3), "default_and_tuned_us": pairs}
    return found


def words(config: Mapping[str, Any]) -> str:
    """Name a candidate of attention as the compile report does."""
    sizes = f"{config.get('block_m')}x{config.get('block_n')}"
    flags = "".join(f" {n}" for n in ("one_loop", "split_keys") if config.get(n))
    return f"{sizes} w{config.get('num_warps')} s{config.get('num_stages')}{flags}"


def noise() -> Iterator[str]:
    """Compare each default with the candidate that is the same config."""
    from fusedformer.tools.tune.search import launches_of
    from fusedformer.tools.tune.workloads import workloads
    from fusedformer_kernels.runtime.targets import TARGETS

    known = {w.name: w for w in workloads()}
    for measured in json.loads((CHECKOUT / TILES).read_text()):
        workload = known[measured["workload"]]
        size = next(iter(workload.shapes.values()))
        launches = launches_of(workload, None, size, TARGETS["sm_90"])
        default = next(x.config for x in launches if hasattr(x.config, "block_m"))
        for times, config, _ in measured["tried"]:
            if all(getattr(default, name) == value for name, value in config.items()):
                for name, us in times.items():
                    yield f"{workload.name}, {name}: {us / measured['default'][name] - 1:+.1%}"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {SHIPPED.name}")
    parser.add_argument("--noise", action="store_true", help="print what was timed twice")
    given = parser.parse_args()
    if given.noise:
        print(*noise(), sep="\n")
    elif given.write:
        SHIPPED.write_text(text())
    else:
        print(text(), end="")


if __name__ == "__main__":
    main()
