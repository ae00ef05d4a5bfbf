"""What the measured launches ask of a GPU: ``python benchmarks/model/demands.py --write``.

For each default and candidate of the tile search's result file, and for each case of the
benchmark's, its launches are recorded and compiled for sm_90, and ``prediction.demand_of`` counts.
``calibrate.py`` fits the model's factors to these counts, which are kept in ``tables/demands.csv``.

Measurements belong to the kernels of their day: ``--checkout DIR`` takes the kernels, and their
workloads, of a checkout of that commit, with the triton that comes first on PYTHONPATH. So the
table was written with ``git worktree add DIR 463f70d`` and triton 3.6.0.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parents[2]
TABLE = HERE / "benchmarks/model/tables/demands.csv"
RESULTS = HERE / "benchmarks/results/h200"
TILES, BENCH = RESULTS / "2026-11-28-tiles.json", RESULTS / "2026-11-28-bench.json"
DEFAULT = "default"


def name_of(config: dict[str, Any] | None) -> str:
    """Write a candidate's config in words."""
    return " ".join(f"{k}={int(v)}" for k, v in config.items()) if config else DEFAULT


def measured_tiles() -> Iterator[tuple[str, dict[str, Any] | None, dict[str, float]]]:
    """List the workload, the config and microseconds by size of all that the search timed."""
    for workload in json.loads(TILES.read_text()):
        yield workload["workload"], None, workload["default"]
        for times, config, _ in workload["tried"]:
            yield workload["workload"], config, times


def measured_cases() -> dict[tuple[str, str, str], float]:
    """Give microseconds of the library by suite, case and direction."""
    return {
        (r["suite"], r["case"], r["direction"]): r["median_us"]
        for r in json.loads(BENCH.read_text())["records"]
        if r["provider"] == "fusedformer" and r["median_us"]
    }


class Kernels:
    """The kernels of a checkout, whose modules may lie where they lay at 463f70d."""

    def __init__(self, checkout: Path) -> None:
        sys.path[:0] = [str(checkout / name) for name in ("benchmarks", "python", "kernels")]
        self.old = not (checkout / "kernels/fusedformer_kernels/compiler").exists()
        if self.old:  # the compiler's side is always of today
            package = importlib.import_module("fusedformer_kernels")
            package.__path__.append(str(HERE / "kernels/fusedformer_kernels"))
        place = "" if self.old else "runtime."
        self.launch = importlib.import_module(f"fusedformer_kernels.{place}launch")
        targets = "configs" if self.old else "runtime.targets"
        self.target = importlib.import_module(f"fusedformer_kernels.{targets}").TARGETS["sm_90"]
        tools = "fusedformer.tune" if self.old else "fusedformer.tools.tune"
        search = importlib.import_module(f"{tools}.search")
        self.launches_of = search._launches if self.old else search.launches_of
        self.workloads = importlib.import_module(f"{tools}.workloads").workloads()
        self.predictions = importlib.import_module(
            "predictions" if self.old else "model.predictions"
        )

    def rows(self, call: list[Any], pairs: float | None, *key: str) -> Iterator[list[Any]]:
        """Count each launch, in the columns of the table."""
        from fusedformer_kernels.compiler.ahead_of_time import compile_launch
        from fusedformer_kernels.compiler.prediction import demand_of

        for launch in call:
            found = demand_of(self._of_today(launch), compile_launch(launch, self.target), pairs)
            numbers = [*found.clocks.values(), *found.units.values(), found.bytes]
            yield [*key, launch.name, f"{found.rounds:.4g}", *(f"{n:.5g}" for n in numbers)]

    def _of_today(self, launch: Any) -> Any:
        """Give the sizes of attention as parameters of their own."""
        scores = launch.arguments.get("s")
        if not self.old or scores is None:
            return launch
        sizes = {"queries": scores.n_queries, "keys": scores.n_keys, "in_sixteens": None}
        arguments = {**launch.arguments, **sizes}
        return SimpleNamespace(grid=launch.grid, config=launch.config, arguments=arguments)

    def of_tiles(self) -> Iterator[list[Any]]:
        """Count the launches of the tile search."""
        by_name = {w.name: w for w in self.workloads}
        for name, config, times in measured_tiles():
            workload = by_name[name]
            for size in times:
                launches = self.launches_of(workload, config, workload.shapes[size], self.target)
                yield from self.rows(launches, None, "tiles", name, size, name_of(config))

    def of_cases(self) -> Iterator[list[Any]]:
        """Count the launches of the benchmark's cases."""
        torch = importlib.import_module("torch")
        sizes = importlib.import_module("harness.case").Sizes.of("full")
        measured = measured_cases()
        found: list[Any] = []

        def told(call: Callable[[], object], pairs: float | None = None) -> tuple[float, str]:
            found[:] = [self.predictions.launches_of(call), pairs]
            return 0.0, ""

        vars(self.predictions)["told"] = told
        for suite in sorted({suite for suite, _, _ in measured}):
            if suite not in ("softmax", "norm", "activation", "attention"):
                continue  # what waits for the host, or for torch's products
            module = importlib.import_module(
                f"bench_{suite}" if self.old else f"suites.bench_{suite}"
            )
            for case in module.SUITE.cases(sizes, torch.bfloat16):
                for direction in ("forward", "backward"):
                    if (suite, case.name, direction) in measured:
                        self.predictions.predicted(case, module.fused(case), direction)
                        yield from self.rows(*found, "cases", suite, case.name, direction)


def main() -> None:
    """Print the table, or put it into its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=HERE, help="of the kernels measured")
    parser.add_argument("--write", action="store_true", help="into tables/demands.csv")
    given = parser.parse_args()
    kernels = Kernels(given.checkout.resolve())
    from fusedformer_kernels.compiler.waits import CAUSES, UNITS

    head = ["of", "workload", "size", "config", "kernel", "rounds"]
    head += [*CAUSES, *(f"{unit} unit" for unit in UNITS), "bytes"]
    with open(TABLE if given.write else sys.stdout.fileno(), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for row in itertools.chain(kernels.of_cases(), kernels.of_tiles()):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
