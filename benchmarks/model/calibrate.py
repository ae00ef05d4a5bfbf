"""Fit the prediction's factors to what was measured: ``python benchmarks/model/calibrate.py``.

The numbers of ``prediction.Factors`` are fitted to the result files of the H200 and to what each
launch asks of it (``tables/demands.csv``, which ``demands.py`` writes; nothing is compiled here). A
tenth of the measurements is kept out of the fit: those of which a hash of workload and config, in
decimal, ends in 0. ``--write`` puts factors and errors into ``tables/calibration.md``; a test holds
that ``prediction.py`` has the same. Some minutes, since each workload is also left out as a whole.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fusedformer_kernels.compiler.prediction import Demand, Factors, Worth, microseconds
from fusedformer_kernels.compiler.waits import CAUSES, UNITS
from model import TABLES, page
from model.demands import TABLE, measured_cases, measured_tiles, name_of

NAMES = [field.name for field in dataclasses.fields(Factors)]
START = {**dict.fromkeys(NAMES, 1.0), "overlap": 2.0, "launch": 3.0}
MEANING = {
    "issue": ("of the clocks that ptxas lets a warp stall", "its issue slots, shared with others"),
    "product": ("of the clocks that a program waits for its HGMMA", "nominal: `waits.py`"),
    "memory": ("of 600 clocks", "the latency of loads, from DRAM"),
    "cache": ("of 600 clocks", "the same in loops of products, mostly out of L2"),
    "shared": (
        "of 30 clocks and the wavefronts before",
        "with bank conflicts: Nsight Compute counts 3.4 wavefronts for 1 in norm backward's sums",
    ),
    "special": ("of 24 clocks and the queue of the MUFU", "exponentials, shuffles, conversions"),
    "overlap": ("exponent", "1: waits and units add up; infinite: all but the longest are hidden"),
    "launch": ("µs", "to launch a kernel, fill the SMs and drain them"),
}  # fmt: skip
MANY = 8  # fewer candidates have no ranks to speak of
SCALE = 0.15  # of a residual, a logarithm, beyond which it counts linearly


@dataclass(frozen=True)
class Measurement:
    """One time, and where its launches stand in the table."""

    family: str
    workload: str
    size: str
    config: str
    us: float
    rows: tuple[int, ...]

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.workload} {self.config}".encode()).hexdigest()
        return int(digest, 16) % 10 == 0

    @property
    def is_tile(self) -> bool:
        return self.family.startswith("tiles")

    @property
    def group(self) -> str:
        """What is left out of a fit together."""
        return self.workload if self.is_tile else self.family


class Data:
    """All measurements, and what their launches ask for, as columns."""

    def __init__(self) -> None:
        with open(TABLE, newline="") as file:
            rows = list(csv.DictReader(file))
        places: dict[tuple[str, ...], list[int]] = {}
        for at, row in enumerate(rows):
            key = row["of"], row["workload"], row["size"], row["config"]
            places.setdefault(key, []).append(at)

        def column(name: str) -> Any:
            return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)

        self.demand: Any = Demand(
            column("rounds"), {cause: column(cause) for cause in CAUSES},
            {unit: column(f"{unit} unit") for unit in UNITS}, column("bytes"),
        )  # fmt: skip
        self.measurements = [
            Measurement(f"tiles {name.split()[0]}", name, size, name_of(config), us,
                        tuple(places["tiles", name, size, name_of(config)]))
            for name, config, times in measured_tiles() for size, us in times.items()
        ] + [
            Measurement(f"{suite} {way}", f"{suite} {case} {way}", "", "",
                        us, tuple(places["cases", suite, case, way]))
            for (suite, case, way), us in measured_cases().items()
            if ("cases", suite, case, way) in places
        ]  # fmt: skip
        pairs = [(at, row) for at, m in enumerate(self.measurements) for row in m.rows]
        self.owner, self.row = (torch.tensor(column) for column in zip(*pairs, strict=True))
        self.us = torch.tensor([m.us for m in self.measurements], dtype=torch.float64)
        sizes: dict[str, int] = {}
        for m in self.measurements:
            sizes[m.family] = sizes.get(m.family, 0) + 1
        # A family with many measurements counts for more, but not in proportion.
        weights = [sizes[m.family] ** -0.5 for m in self.measurements]
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def predicted(self, factors: Factors) -> torch.Tensor:
        """Add up the launches of each measurement."""
        times = microseconds(self.demand, factors)[self.row]
        return torch.zeros_like(self.us).index_add(0, self.owner, times)

    def mask(self, chosen: Callable[[Measurement], bool]) -> torch.Tensor:
        """Mark the measurements that are chosen."""
        return torch.tensor([chosen(m) for m in self.measurements])


def _is(field: str, value: str, measurement: Measurement) -> bool:
    return bool(getattr(measurement, field) == value)


def fit(data: Data, used: torch.Tensor) -> Factors:
    """Fit the factors to the measurements ``used``, by the logarithms of the times."""
    start = [log(START[name]) for name in NAMES]
    logs = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    weights = data.weights * used
    search = torch.optim.LBFGS([logs], max_iter=500, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip

    def loss() -> torch.Tensor:
        search.zero_grad()
        factors = Factors(**dict(zip(NAMES, logs.exp(), strict=True)))
        off = (data.predicted(factors) / data.us).log() / SCALE
        found = (weights * ((1 + off**2).sqrt() - 1)).sum() / weights.sum()
        found.backward()
        return found

    search.step(loss)
    values = [float(f"{value:.3g}") for value in logs.exp().tolist()]
    return Factors(**dict(zip(NAMES, values, strict=True)))


def errors(predicted: torch.Tensor, data: Data, chosen: torch.Tensor) -> list[float]:
    """List the errors of the chosen measurements, as factors of at least 1."""
    return (predicted / data.us).log().abs()[chosen].exp().tolist()


def median_error(predicted: torch.Tensor, data: Data, chosen: torch.Tensor) -> float:
    """Give the median error, as a share."""
    return statistics.median(errors(predicted, data, chosen)) - 1


def rank_correlation(a: Iterable[float], b: Iterable[float]) -> float:
    """Compute Spearman's coefficient."""
    ranked = [torch.tensor(list(x)).argsort().argsort().tolist() for x in (a, b)]
    return statistics.correlation(*ranked)


def ranks(predicted: torch.Tensor, data: Data, workload: str) -> dict[str, float]:
    """Correlate the ranks of a workload's candidates, by size."""
    by_size: dict[str, list[int]] = {}
    for at, m in enumerate(data.measurements):
        if m.workload == workload and m.is_tile:
            by_size.setdefault(m.size, []).append(at)
    return {
        size: rank_correlation(predicted[at].tolist(), data.us[at].tolist())
        for size, at in by_size.items()
    }


@dataclass(frozen=True)
class LeftOut:
    """What a fit without a group of measurements predicts of them."""

    name: str
    count: int
    median: float
    ranks: Mapping[str, float]  # of candidates, by size


def left_out(data: Data) -> Iterator[LeftOut]:
    """Leave out each workload of the search, and each family of cases, in turn."""
    held = data.mask(lambda m: m.held_out)
    for name in dict.fromkeys(m.group for m in data.measurements):
        own = data.mask(functools.partial(_is, "group", name))
        predicted = data.predicted(fit(data, ~own & ~held))
        found = ranks(predicted, data, name)
        yield LeftOut(name, int(own.sum()), median_error(predicted, data, own), found)


def worth_of(data: Data, factors: Factors, groups: Iterable[LeftOut]) -> Worth:
    """State what predictions are worth: what ``tune --dry-run`` says."""
    held = data.mask(lambda m: m.held_out)
    correlations = [r for group in groups if group.count >= MANY for r in group.ranks.values()]
    return Worth(
        held_out=int(held.sum()),
        median_error=round(median_error(data.predicted(factors), data, held), 3),
        ranks_median=round(statistics.median(correlations), 2),
        ranks_least=round(min(correlations), 2),
    )


def text(data: Data, factors: Factors, groups: list[LeftOut], worth: Worth) -> str:
    """Put factors and errors into the text of their file."""
    held, predicted = data.mask(lambda m: m.held_out), data.predicted(factors)
    lines = ["| factor | value | of | |", "| --- | ---: | --- | --- |"]
    lines += [f"| {n} | {getattr(factors, n):g} | {' | '.join(MEANING[n])} |" for n in NAMES]
    lines += [
        "",
        f"Median error of the {int((~held).sum())} measurements in the fit: "
        f"{median_error(predicted, data, ~held):.1%}; of the {worth.held_out} kept out of it: "
        f"{worth.median_error:.1%} (goal: 20%).",
        "",
        "| measurements | in the fit | median error | kept out | median error | largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family in dict.fromkeys(m.family for m in data.measurements):
        own = data.mask(functools.partial(_is, "family", family))
        cells = [family]
        for part in (own & ~held, own & held):
            count = int(part.sum())
            cells += [str(count), f"{median_error(predicted, data, part):.1%}" if count else "-"]
        largest = max(errors(predicted, data, own))
        lines.append(f"| {' | '.join(cells)} | {largest:.2f}x |")
    lines += [
        "",
        f"Each left out of the fit as a whole. Rank correlation (Spearman) of the candidates of a "
        f"workload with {MANY} measurements or more: median {worth.ranks_median:.2f}, least "
        f"{worth.ranks_least:.2f} (goal: 0.8).",
        "",
        "| left out | measurements | median error | rank correlation |",
        "| --- | ---: | ---: | --- |",
    ]
    for group in groups:
        found = ", ".join(f"{size}: {r:.2f}" for size, r in group.ranks.items())
        lines.append(f"| {group.name} | {group.count} | {group.median:.1%} | {found} |")
    about = "The model is that of `fusedformer_kernels/compiler/prediction.py`, for the H200."
    return page("Calibration of predictions", "calibrate", about, "\n".join(lines))


def main() -> None:
    """Fit, and print or write factors and errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into tables/calibration.md")
    given = parser.parse_args()
    data = Data()
    factors = fit(data, data.mask(lambda m: not m.held_out))
    groups = list(left_out(data))
    worth = worth_of(data, factors, groups)
    found = text(data, factors, groups, worth)
    if given.write:
        (TABLES / "calibration.md").write_text(found)
    else:
        print(found)
    print(factors, worth, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
