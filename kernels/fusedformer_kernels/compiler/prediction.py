"""Predict how long a launch takes on a GPU of sm_90, from its machine code alone.

The larger of two times, and what a launch costs: to move every tensor once, and to run all
programs. For the second a program is followed through its instructions (waits.py). Each of its
waits is scaled by a factor; those of the programs that an SM holds at once overlap with each other
and with the units that all of them share, which is a sum of powers. The factors were fitted to what
an H200 measured: ``benchmarks/model/calibrate.py`` gives them again, and says how far they are off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from fusedformer_kernels.compiler.waits import CAUSES, UNITS

if TYPE_CHECKING:
    from fusedformer_kernels.compiler.ahead_of_time import Compiled
    from fusedformer_kernels.runtime.launch import Launch


@dataclass(frozen=True)
class Gpu:
    """An H200: what its result file says of it, its clock under load, its multiprocessors."""

    copy_bytes: float = 4.243e12  # a second, read plus written
    clock: float = 1.755e9
    multiprocessors: int = 132
    cache_bytes: float = 30e6  # of rows that a second pass still finds: 50 MB less what is written


GPU = Gpu()
_ALMOST_THE_LARGER = 10  # of two parts, but smooth


@dataclass(frozen=True)
class Factors:
    """What ``benchmarks/model/calibrate.py`` fitted: see its table for units and meaning."""

    issue: float = 1.3
    product: float = 0.426
    memory: float = 1.31
    cache: float = 1.4
    shared: float = 1.64
    special: float = 0.935
    overlap: float = 2.09
    launch: float = 6.45


@dataclass(frozen=True)
class Worth:
    """How far predictions were off on the H200, by ``benchmarks/model/calibrate.py``.

    Attributes:
        held_out: number of measurements that were kept out of the fit.
        median_error: of those, as a share.
        ranks_median, ranks_least: Spearman's coefficient of a workload's tile candidates, when all
            of that workload is left out of the fit.
    """

    held_out: int = 51
    median_error: float = 0.081
    ranks_median: float = 0.97
    ranks_least: float = 0.7


@dataclass(frozen=True)
class Demand:
    """What a launch asks of a GPU, whatever the factors are.

    Attributes:
        rounds: how many times the slots of the busiest SM are filled, at least 1.
        clocks: of one program, by what it waits for.
        units: clocks of each unit of an SM, of all its programs.
        bytes: to and from memory.
    """

    rounds: float
    clocks: Mapping[str, float]
    units: Mapping[str, float]
    bytes: float


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch, and what takes most of them."""

    microseconds: float
    limit: str  # memory, a unit of an SM, or what a program spends its clocks on


def predict(launch: Launch, compiled: Compiled, pairs: float | None = None) -> Prediction:
    """Predict the time of ``launch``, which :func:`compile_launch` compiled for sm_90.

    ``pairs`` are the (query, key) pairs over batch and heads that attention computes, where masks
    or lengths, which a launch does not show, leave some out.
    """
    factors = Factors()
    demand = demand_of(launch, compiled, pairs)
    waited, units, memory = parts_us(demand, factors)
    longest = max(CAUSES, key=lambda cause: float(clocks_of(cause, demand, factors)))
    named = {"memory": memory, **units, f"a program's {longest}": waited}
    limit = max(named, key=lambda name: float(named[name]))
    return Prediction(float(microseconds(demand, factors)), limit)


def microseconds(demand: Demand, factors: Factors) -> Any:
    """Add up the time of a launch. Numbers may be tensors, so that factors can be fitted."""
    waited, units, memory = parts_us(demand, factors)
    running = _overlapped((waited, *units.values()), factors.overlap)
    return _overlapped((running, memory), _ALMOST_THE_LARGER) + factors.launch


def parts_us(demand: Demand, factors: Factors) -> tuple[Any, dict[str, Any], Any]:
    """Compute microseconds of the waits, of each unit, and of memory."""
    per_us = GPU.clock / 1e6
    clocks = sum(clocks_of(cause, demand, factors) for cause in CAUSES)
    units = {unit: demand.units[unit] / per_us for unit in UNITS}
    units["shared"] = factors.shared * units["shared"]  # the same bank conflicts
    return demand.rounds * clocks / per_us, units, 1e6 * demand.bytes / GPU.copy_bytes


def clocks_of(cause: str, demand: Demand, factors: Factors) -> Any:
    """Compute the clocks that a program spends on ``cause``; barriers take what waits.py says."""
    return getattr(factors, cause, 1.0) * demand.clocks[cause]


def _overlapped(parts: Iterable[Any], power: Any) -> Any:
    """The larger ``power``, the better the parts overlap: 1 is their sum, infinity the largest."""
    return sum((part + 1e-6) ** power for part in parts) ** (1 / power)


def demand_of(launch: Launch, compiled: Compiled, pairs: float | None = None) -> Demand:
    """Count what ``launch`` asks of a GPU of sm_90."""
    programs = prod(launch.grid)
    passes = _passes(launch, pairs) if compiled.loops else 0.0
    work = compiled.once.plus(compiled.a_pass, passes)
    busiest = ceil(programs / GPU.multiprocessors)
    tensors = {id(t): t for t in _tensors_in(launch.arguments.values())}
    moved: float = sum(t.numel() * t.element_size() for t in tensors.values())
    if _is_in_chunks(launch):
        moved += _moved_again(launch, min(programs, GPU.multiprocessors * compiled.programs))
    elif launch.arguments.get("ONE_PASS") is False:
        moved += programs * work.loaded_bytes / 2  # rows that are read again
    return Demand(
        rounds=max(1.0, busiest / max(compiled.programs, 1)),
        clocks=work.clocks,
        units={unit: n * programs / GPU.multiprocessors for unit, n in work.units.items()},
        bytes=moved,
    )


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among ``values`` and in their tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors_in(value)


def _is_in_chunks(launch: Launch) -> bool:
    """Tell whether rows are read in chunks (``rows/softmax_long.py``)."""
    return "STAGES" in launch.arguments and "n_written" in launch.arguments


def _moved_again(launch: Launch, in_flight: int) -> float:
    """Count bytes of rows in chunks besides one for each tensor, which may be negative."""
    given = launch.arguments
    first, second, written = (given[name] for name in launch.kernel.arg_names[:3])
    if given["splits"] > 1:  # the first of two launches writes statistics alone
        return 0.0 if given["n_written"] else -float(written.numel() * written.element_size())
    read = sum(t.numel() * t.element_size() for t in (first, second) if t is not None)
    together = read / given["n_rows"] * in_flight
    return read * max(0.0, 1.0 - GPU.cache_bytes / max(together, 1.0))


def _passes(launch: Launch, pairs: float | None) -> float:
    """Count the passes of the loop in one program, on average."""
    given = launch.arguments
    if _is_in_chunks(launch):
        return 1.0 if given["splits"] > 1 else given["n_columns"] / given["BLOCK_N"]
    if "n_dims" in given:
        return float(ceil(given["n_dims"] / given["BLOCK_K"]))
    if "last_block" in given and "CHUNK" in given:  # two programs of a table walk half each
        return float(given["diagonals"] * given["BLOCK"] / given["CHUNK"] / 2 / given["chunks"])
    if given.get("s") is not None and "queries" in given:
        return _passes_of_attention(launch, pairs)
    if "n_tiles" in given:  # of a mask, some at a time
        return float(ceil(given["n_tiles"] / given["TILES"]))
    if "splits" in given:
        return float(given["splits"])
    if "n_sums" in given:  # partial sums, all of which each program reads
        return float(ceil(given["n_rows"] / given["BLOCK_M"]))
    # Rows that are too long for one tile.
    if "n_columns" in given and (
        given.get("ONE_PASS") is False or "RESUMES" in given or "BLOCK_M" not in given
    ):
        return float(ceil(given["n_columns"] / given["BLOCK_N"]))
    if "n_rows" in given and "BLOCK_M" in given:  # persistent programs walk the rows
        return max(1.0, ceil(given["n_rows"] / given["BLOCK_M"]) / launch.grid[0])
    return 1.0


def _passes_of_attention(launch: Launch, pairs: float | None) -> float:
    given = launch.arguments
    queries, n_keys = given["queries"], given["keys"] * (16 if given["in_sixteens"] else 1)
    rows = min(given["BLOCK_M" if "BLOCK_M" in given else "BLOCK"], queries)
    columns = min(given["BLOCK_N" if "BLOCK_N" in given else "BLOCK"], n_keys)
    if "BLOCK_P" in given:  # a program for each query adds up parts of its keys, some at a time
        seen = n_keys if pairs is None else pairs / prod(launch.grid)
        return max(1.0, seen / (columns * given["BLOCK_P"]))
    if pairs is not None:
        return max(1.0, pairs / (rows * columns)) / prod(launch.grid)
    walked = getattr(launch.config, "keys_per_split", 0) or n_keys
    tiles = queries / rows if "NEEDS_K" in given else walked / columns
    if "shares" in given:  # these programs walk over queries too
        tiles *= queries / rows / given["shares"]
    visible = 0.5 if given["s"].right is not None else 1.0
    return max(1.0, visible * tiles)
