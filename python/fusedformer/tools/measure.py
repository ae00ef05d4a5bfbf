"""Measure time and peak memory of two programs, in turns in the same run."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], object]


def interleaved(
    calls: Mapping[str, Sequence[Call]],
    seconds: float,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time each program on each batch, in seconds, in rounds over all batches.

    The programs take turns at every batch, and who is first changes each time, so that a drift
    of clocks or load falls on all alike: the i-th samples of all programs belong together.

    Args:
        calls: for each program its calls, one for each batch, in the same order.
        seconds: no batch begins after this time, but the first round is always completed.
        device: a GPU is waited for before and after each call.
        advance: called after each batch of the first round (for a progress bar).
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    turn = rounds = 0
    while True:
        for index in range(len(calls[names[0]])):
            if rounds and time.perf_counter() >= end:
                return samples
            by = turn % len(names)
            for name in names[by:] + names[:by]:
                synchronize(device)
                start = time.perf_counter()
                calls[name][index]()
                synchronize(device)
                samples[name].append(time.perf_counter() - start)
            turn += 1
            if not rounds:
                advance()
        rounds += 1


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Summarize times, and the paired ratio stock/fused: medians, 20th and 80th percentiles."""
    ratios = [a / b for a, b in zip(samples["stock"], samples["fused"], strict=True)]
    found = {name: {**_spread(values), "samples_s": values} for name, values in samples.items()}
    return {**found, "speedup": _spread(ratios)}


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        low = high = values[0]
    else:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; on a CPU do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Call, device: torch.device) -> int:
    """Return the most bytes alive at once during ``call``, beyond those alive before it.

    On a GPU the caching allocator counts. On a CPU the profiler reports every allocation and
    release of torch's allocator, workspaces inside operators that use it included; what a
    library allocates past torch (oneDNN's own scratch memory) is not seen, for either program.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    results: Any = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        raise RuntimeError("torch's profiler returned no memory events")
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
