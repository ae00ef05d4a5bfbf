"""Timing: device events with a cold L2 on a GPU, paired and order-rotated rounds everywhere.

Every provider of a case is timed in the same rounds, and the order rotates from round to round, so
that a drift of clocks or load falls on all of them alike. On a GPU one of two methods is used, and
recorded with the result:

``flush``: a 256 MB buffer is written before each run, so nothing of the inputs is left in L2.
``rotate``: for cases whose fastest provider takes under 100 us. Events around one such run would
measure the event, so many launches are timed as a batch, rotating among input sets that together
are several times as large as L2.

In both, the device first sleeps while the host enqueues the work: what is measured is the time of
the device, not how fast Python launches. ``paired`` is the CPU's: wall time, warm caches.

``host`` is for what a call costs the host: wall time to enqueue few calls on an idle device.
``latency`` is for what one call takes: wall time until the device is idle again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
ROTATE_BELOW_US = 100.0
ROTATION_OVER_L2 = 3
MAX_INPUT_SETS = 32
MAX_BATCH = 128
HOST_CALLS = 30  # few enough that the device's queue never fills


@dataclass(frozen=True)
class Samples:
    """Times of one provider in microseconds, in the order in which they were taken."""

    samples_us: list[float]
    method: str

    def percentile(self, share: float) -> float:
        """Give the value below which ``share`` of the samples lie, linearly interpolated."""
        ordered = sorted(self.samples_us)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def median_us(self) -> float:
        return self.percentile(0.5)


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """Say how many input sets rotate: together thrice the L2 of a GPU; one on CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size or 64 * 2**20
    wanted = math.ceil(ROTATION_OVER_L2 * cache / max(bytes_per_set, 1))
    return min(max(wanted, 1), MAX_INPUT_SETS)


def measure(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, Samples]:
    """Time each provider for about ``seconds``; its calls, one for each input set, ran before."""
    if not calls:
        return {}
    if device.type != "cuda":
        return _measure_on_cpu({name: some[0] for name, some in calls.items()}, seconds)
    return _measure_on_gpu(calls, device, seconds)


def measure_host(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, Samples]:
    """Time what a call costs the host; on the CPU, where that is all of it, by :func:`measure`."""
    return _measure_wall(calls, device, seconds, "host", HOST_CALLS)


def measure_latency(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, Samples]:
    """Time one call until its result is there; on the CPU by :func:`measure`."""
    return _measure_wall(calls, device, seconds, "latency", 1)


def _measure_wall(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float,
    method: str,
    count: int,
) -> dict[str, Samples]:
    if device.type != "cuda":
        return measure(calls, device, seconds)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or (rounds < 100 and time.perf_counter() < end):
        for name in _rotated(list(calls), rounds):
            call = calls[name][0]
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            if method == "latency":
                torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - start) / count * 1e6)
        rounds += 1
    torch.cuda.synchronize()
    return {name: Samples(found, method) for name, found in samples.items()}


CLOCKS = {"device": measure, "host": measure_host, "latency": measure_latency}


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _measure_on_cpu(calls: dict[str, Call], seconds: float) -> dict[str, Samples]:
    # A sample is long enough that the clock's own cost, some 50 ns, is under a thousandth.
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(1e-4 / max(time.perf_counter() - start, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 3 or (rounds < 100 and time.perf_counter() < end):
        for name in _rotated(list(calls), rounds):
            call, count = calls[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count * 1e6)
        rounds += 1
    return {name: Samples(found, "paired") for name, found in samples.items()}


def _measure_on_gpu(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, Samples]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for some in calls.values():
        for call in some:
            call()
    first = {name: _flushed(some[0], flush, 5) for name, some in calls.items()}
    typical = {name: sorted(found)[len(found) // 2] for name, found in first.items()}
    rotate = min(typical.values()) < ROTATE_BELOW_US
    rounds = 10
    lead_us: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in _rotated(list(calls), turn):
            some, share_us = calls[name], seconds / rounds * 1e6
            if rotate:
                sets = len(some)
                batch = min(max(sets, math.ceil(1000 / typical[name])), MAX_BATCH)
                batch = max(batch // sets, 1) * sets
                count = min(max(round(share_us / (batch * typical[name])), 1), 5)
                if name not in lead_us:
                    lead_us[name] = 1.5 * _batched(some, batch, 200.0 * batch)[1] + 200
                samples[name] += [_batched(some, batch, lead_us[name])[0] for _ in range(count)]
            else:
                count = min(max(round(share_us / typical[name]), 1), 20)
                samples[name] += _flushed(some[0], flush, count)
    method = "rotate" if rotate else "flush"
    return {name: Samples(found, method) for name, found in samples.items()}


def _sleep(microseconds: float) -> None:
    """Keep the device busy for about this long (cycles of a clock near 2 GHz)."""
    torch.cuda._sleep(int(min(microseconds, 1e5) * 2e3))


def _flushed(call: Call, flush: torch.Tensor, count: int) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    torch.cuda.synchronize()
    _sleep(2000)  # a head start of the host; after it, each flush hides the next launch
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _batched(calls: Sequence[Call], batch: int, lead_us: float) -> tuple[float, float]:
    """Time the device for one call, and the host to enqueue the whole batch, in microseconds."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    _sleep(lead_us)
    start.record()
    began = time.perf_counter()
    for turn in range(batch):
        calls[turn % len(calls)]()
    host_us = (time.perf_counter() - began) * 1e6
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / batch, host_us


def ceilings(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, object]:
    """Measure the two ceilings here and now: a large copy, and a large matrix product.

    The copy counts bytes read plus bytes written. Both on random numbers: a product of zeros draws
    less power and runs faster than any real one.
    """
    on_gpu = device.type == "cuda"
    size = 256 if tiny else 8192 if on_gpu else 1024
    elements = 2**20 if tiny else 2**31 if on_gpu else 2**27  # bytes of the source
    source = torch.randint(0, 127, (elements,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls: dict[str, Sequence[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "product": [lambda: left @ right],
    }
    for some in calls.values():
        some[0]()
    found = measure(calls, device, 0.02 if tiny else 0.3)
    return {
        "copy_gb_s": 2 * elements / found["copy"].median_us / 1e3,
        "matmul_tflop_s": 2 * size**3 / found["product"].median_us / 1e6,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "matmul_size": size,
    }
