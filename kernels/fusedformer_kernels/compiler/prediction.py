"""Predict how long a launch takes on a GPU of sm_90, from its machine code alone.

The largest of four times: to move every tensor once; to bring what the loops load out of the L2
cache; to run the main loop's instructions on the units that they occupy; and to wait for memory,
which in one latency delivers no more than the programs that an SM holds ask for at once. In a loop
of matrix products one program's products and softmax follow each other; only another program of the
same SM fills the gaps. A model to rank configs and to be compared with what is measured, not a
simulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch

from fusedformer_kernels.compiler.ahead_of_time import Compiled
from fusedformer_kernels.runtime.launch import Launch


@dataclass(frozen=True)
class Gpu:
    """Measured ceilings of an H200, its clock under load, and the latency of its loaded memory."""

    copy_bytes: float = 4.3e12  # a second, read plus written
    l2_bytes: float = 5.5e12  # a second, read: an assumption
    product_share: float = 0.83  # of the tensor cores' rate, that a large product reaches
    clock: float = 1.755e9
    multiprocessors: int = 132
    latency: float = 800e-9


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch: the largest of the four, each of which is named."""

    memory: float
    l2: float
    flight: float
    units: float
    busiest: str  # unit

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.l2, self.flight, self.units)

    @property
    def limit(self) -> str:
        """The unit, or the memory, that the launch waits for."""
        limits = {self.l2: "L2", self.memory: "memory", self.flight: "latency"}
        return limits.get(self.microseconds, self.busiest)


def predict(
    launch: Launch, compiled: Compiled, gpu: Gpu | None = None, pairs: float | None = None
) -> Prediction:
    """Predict the time of ``launch``, which :func:`compile_launch` compiled for sm_90.

    ``pairs`` are the (query, key) pairs over batch and heads that attention computes, where masks
    or lengths, which a launch does not show, leave some out.
    """
    gpu = gpu or Gpu()
    passes = _passes(launch, compiled, pairs)
    a_program = ceil(launch.arguments.get("n_dims", 0) / launch.arguments.get("BLOCK_K", 1))
    cycles = dict(compiled.cycles)
    product = cycles.pop("product", 0.0) / gpu.product_share
    busiest = max(cycles, key=lambda name: cycles[name])
    clocks = max(cycles[busiest], product)
    if product:
        serial = (product + cycles[busiest]) / max(compiled.programs, 1)
        name = "products" if product > cycles[busiest] else busiest
        busiest = "products then softmax" if serial > clocks else name
        clocks = max(clocks, serial)
    if a_program:  # a loop of products alone, and then the work on their tile
        busiest = max(compiled.outside, key=lambda name: compiled.outside[name])
        loop, tile = product * a_program, compiled.outside[busiest]
        clocks = max(loop, tile, (loop + tile) / max(compiled.programs, 1)) / a_program
        busiest = f"products then {busiest}"
    resident = min(compiled.programs, ceil(prod(launch.grid) / gpu.multiprocessors))
    # A grid leaves its last wave partly idle; that of short programs is evened out by then.
    share = passes / gpu.multiprocessors
    tensors = {id(t): t for t in _tensors_in(launch.arguments.values())}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    per_trip = max(compiled.loaded_bytes * resident, 1)
    asked = compiled.loaded_bytes * passes
    trips = asked / (per_trip * gpu.multiprocessors)
    overlapped = product or asked > 2 * moved  # then most of it hits the L2 cache, prefetched
    return Prediction(
        memory=1e6 * moved / gpu.copy_bytes,
        l2=1e6 * asked / gpu.l2_bytes,
        flight=0.0 if overlapped else 1e6 * trips * gpu.latency,
        units=1e6 * share * clocks / gpu.clock,
        busiest=busiest,
    )


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among ``values`` and in their tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors_in(value)


def _passes(launch: Launch, compiled: Compiled, pairs: float | None) -> float:
    """Count the passes of the main loop in all programs together."""
    given = launch.arguments
    programs = prod(launch.grid)
    if not compiled.loops:
        return programs
    if "n_dims" in given:
        return programs * ceil(given["n_dims"] / given["BLOCK_K"])
    scores = given.get("s")
    if scores is not None and "queries" in given:
        over_queries = "NEEDS_K" in given
        rows = given["BLOCK_M" if "BLOCK_M" in given else "BLOCK"]
        columns = given["BLOCK_N" if "BLOCK_N" in given else "BLOCK"]
        if pairs is not None:
            return max(1.0, pairs / (rows * columns))
        visible = 0.5 if scores.right is not None else 1.0
        n_keys = given["keys"] * (16 if given["in_sixteens"] else 1)
        tiles = given["queries"] / rows if over_queries else n_keys / columns
        if "shares" in given:  # these programs walk over queries too
            tiles *= given["queries"] / rows / given["shares"]
        return programs * max(1.0, visible * tiles)
    if "n_rows" in given and "BLOCK_M" in given:  # persistent programs walk the rows
        return ceil(given["n_rows"] / given["BLOCK_M"]) * prod(launch.grid[1:])
    return programs
