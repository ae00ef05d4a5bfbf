"""Search: prune candidates by the compiler's report, check the others, time those that pass."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fusedformer.testing import compare_tensors
from fusedformer.tools.tune.workloads import HALF, Call, Workload, workloads
from fusedformer_kernels.runtime.launch import Launch, recorded_launches
from fusedformer_kernels.runtime.targets import Target, assume_target
from fusedformer_kernels.runtime.tuned import Fields, forced


@dataclass
class Found:
    """The result of one workload.

    Attributes:
        name: the key's words.
        best: the fields to use, empty where the default is the fastest.
        speedup: of ``best`` over the default, the geometric mean over the shapes.
        times_us: by shape the medians of the default and of ``best``.
        tried, pruned, wrong: numbers of candidates: timed, left out by the compiler's report, and
            left out because their results were further from the truth than the default's.
        candidates_us: the fields of each candidate that was timed, and its medians by shape; the
            first is the default, without fields.
    """

    name: str
    best: Fields = field(default_factory=dict)
    speedup: float = 1.0
    times_us: dict[str, tuple[float, float]] = field(default_factory=dict)
    tried: int = 0
    pruned: int = 0
    wrong: int = 0
    candidates_us: list[tuple[Fields, dict[str, float]]] = field(default_factory=list)


def reason_against(workload: Workload, fields: Fields | None, target: Target) -> str:
    """Compile a candidate for ``target``; return why it will not be tried, or "".

    ``None`` stands for the default.
    """
    from fusedformer_kernels.compiler.ahead_of_time import compile_launch

    size = next(iter(workload.shapes.values()))
    if fields and fields.get("specialized") and (target.backend, target.arch) != ("cuda", 90):
        return "specialized warps are for sm_90"
    for launch in launches_of(workload, fields, size, target):
        if launch.config.num_warps * 32 > 1024:
            return "more than 1024 threads"
        try:
            compiled = compile_launch(launch, target)
        except Exception as error:  # a compiler may raise anything
            return f"does not compile: {type(error).__name__}"
        if compiled.spills:
            return f"{compiled.spills} spills in {launch.name}"
        if compiled.wrong_descriptors:
            return f"products of {launch.name} may read the wrong memory"
        if compiled.shared_bytes > target.shared_memory:
            return f"{compiled.shared_bytes} bytes of shared memory in {launch.name}"
    return ""


def predicted_us(workload: Workload, fields: Fields | None, target: Target) -> float:
    """Predict microseconds from the machine code for sm_90, summed over the shapes."""
    from fusedformer_kernels.compiler.ahead_of_time import compile_launch
    from fusedformer_kernels.compiler.prediction import predict

    total = 0.0
    for size in workload.shapes.values():
        for launch in launches_of(workload, fields, size, target):
            total += predict(launch, compile_launch(launch, target)).microseconds
    return total


def worth() -> str:
    """Say what predicted times and their order are worth, as measured on one GPU."""
    from fusedformer_kernels.compiler.prediction import Worth

    known = Worth()
    return (
        f"predictions on an H200 of attention and row kernels: median error "
        f"{known.median_error:.0%} of {known.held_out} times kept out of the fit; rank correlation "
        f"of a workload's candidates {known.ranks_median:.2f}, at least {known.ranks_least:.2f}"
    )


def launches_of(
    workload: Workload, fields: Fields | None, size: tuple[int, ...], target: Target
) -> list[Launch]:
    """Record what a call at ``size`` launches with these fields, without making its inputs."""
    with assume_target(target), recorded_launches(run=False) as launches:
        call = workload.make(size, torch.device("meta"), HALF)
        launches.clear()
        with forced(workload.key, fields or {}):
            call()
    return launches


def _judge(item: tuple[int, Fields, Target]) -> str:
    index, fields, target = item
    return reason_against(workloads()[index], fields, target)


def prune(
    indices: Sequence[int],
    target: Target,
    processes: int | None = None,
    deadline: float = math.inf,
) -> dict[int, list[tuple[Fields, str]]]:
    """Compile the candidates of many workloads at once.

    Args:
        indices: into :func:`workloads`.
        target: what to compile for.
        processes: compilers at once.
        deadline: by time.monotonic(): workloads that are not compiled by then are left out.

    Returns:
        by index each candidate, and why not to try it, or "".
    """
    found: dict[int, list[tuple[Fields, str]]] = {}
    # spawn: a fork would copy torch's threads and its state of the GPU.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or os.cpu_count()) as pool:
        work = [(i, fields, target) for i in indices for fields in workloads()[i].candidates]
        reasons = pool.imap(_judge, work)
        for index in indices:
            own = []
            for fields in workloads()[index].candidates:
                left = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
                try:
                    own.append((fields, reasons.next(left)))
                except multiprocessing.TimeoutError:
                    return found
            found[index] = own
    return found


def fault_of(workload: Workload, fields: Fields, device: torch.device) -> str:
    """Return what the criterion of parity finds in a candidate's results, or "".

    The default config is the baseline; the truth are the same kernels on the same numbers in
    float32, which have other configs.
    """
    call = workload.make(workload.small, device, HALF)
    truth = workload.make(workload.small, device, torch.float32)()
    wanted = call()
    with forced(workload.key, fields):
        found = call()
    for i, (one, stock, true) in enumerate(zip(found, wanted, truth, strict=True)):
        if one is not None and stock is not None and true is not None:
            fault = compare_tensors(f"result {i}", one, stock, true.double()).fault
            if fault:
                return fault
    return ""


def median_us(call: Call) -> float:
    """Return the median time of a call, by CUDA events, with the L2 cache flushed between calls."""
    from triton.testing import do_bench

    median: Any = do_bench(call, warmup=10, rep=40, return_mode="median")
    return 1e3 * float(median)


def search(
    index: int,
    pruned: Sequence[tuple[Fields, str]],
    device: torch.device,
    *,
    timer: Callable[[Call], float] = median_us,
    deadline: float = math.inf,
    least: float = 1.02,
) -> Found:
    """Find the fastest right config of the workload at ``index``.

    Args:
        index: into :func:`workloads`.
        pruned: its candidates, and why not to try each, or "": of :func:`prune`.
        device: where candidates run.
        timer: microseconds of a call.
        deadline: by time.monotonic(): no candidate is timed after it.
        least: speed-up below which the default stays.
    """
    workload = workloads()[index]
    found = Found(workload.name)
    candidates = []
    for fields, reason in pruned:
        if reason:
            found.pruned += 1
        elif fault_of(workload, fields, device):
            found.wrong += 1
        else:
            candidates.append(fields)
    calls = {name: workload.make(size, device, HALF) for name, size in workload.shapes.items()}
    default = {name: timer(call) for name, call in calls.items()}
    found.candidates_us.append(({}, default))
    for fields in candidates:
        if time.monotonic() > deadline:
            break
        found.tried += 1
        with forced(workload.key, fields):
            times = {name: timer(call) for name, call in calls.items()}
        found.candidates_us.append((fields, times))
        gains = [math.log(default[name] / times[name]) for name in calls]
        speedup = math.exp(sum(gains) / len(gains))
        if speedup > max(least, found.speedup):
            found.best, found.speedup = fields, speedup
            found.times_us = {name: (default[name], times[name]) for name in calls}
    if not found.times_us:
        found.times_us = {name: (t, t) for name, t in default.items()}
    return found
