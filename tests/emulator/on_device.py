"""Tests of the fake device itself, which run on it: ``test_device.py`` starts them.

A test whose name ends in ``_is_found`` plants a fault, and fails by it: that is what
``test_device.py`` wants to see.
"""

from __future__ import annotations

import copy
import ctypes
import threading

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedformer import backend
from fusedformer import functional as F
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.primitives import wait_for_last

GPU = torch.device("cuda", 0)


@triton.jit
def _shift(x_ptr, y_ptr, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + first + columns) + 1.0)


@triton.jit
def _count(y_ptr, steps):  # type: ignore[no-untyped-def]
    total = 0
    for step in range(steps):
        total += step * total + 1
    tl.store(y_ptr, total)


@triton.jit
def _fill_rows(y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(2).to(tl.int64)
    tl.store(y_ptr + row * BLOCK + tl.arange(0, BLOCK), 1.0)


def test_copies() -> None:
    host = torch.randn(3, 5)
    device = host.to(GPU)
    assert device.device == GPU and device.is_cuda
    assert torch.equal(device.cpu(), host)
    host[0] = 0.0
    assert device[0].any()
    assert torch.equal(device.half().cpu(), device.cpu().half())


def test_deep_copies() -> None:
    x = torch.randn(3, 5, device=GPU)
    copied = copy.deepcopy({"x": x, "t": x.t()})
    assert torch.equal(copied["x"], x) and copied["x"].data_ptr() != x.data_ptr()
    assert copied["t"].data_ptr() == copied["x"].data_ptr()


def test_views_and_in_place() -> None:
    x = torch.zeros(4, 6, device=GPU)
    view = x.view(2, 12)[:, ::2].t()
    view.add_(torch.arange(12, device=GPU).view(6, 2))
    expected = torch.zeros(4, 6)
    expected.view(2, 12)[:, ::2].t().add_(torch.arange(12).view(6, 2))
    assert torch.equal(x.cpu(), expected)
    assert view.data_ptr() == x.data_ptr() and view._base is x
    assert torch.equal(x.unfold(1, 3, 2).cpu(), expected.unfold(1, 3, 2))


def test_results_given() -> None:
    x = torch.randn(5, 3, device=GPU)
    values, places = torch.empty(0, device=GPU), torch.empty(0, dtype=torch.int64, device=GPU)
    torch.max(x, 1, out=(values, places))
    assert torch.equal(values, x.amax(1)) and values.shape == (5,)


def test_autograd() -> None:
    given = torch.randn(4, 6), torch.randn(6, 5), torch.randn(4, 5)
    found = []
    for place in (torch.device("cpu"), GPU):
        x, w, dy = (t.to(place) for t in given)
        x.requires_grad_()
        w.requires_grad_()
        y = torch.nn.functional.gelu(x @ w)
        found.append([t.cpu() for t in (y, *torch.autograd.grad(y, (x, w), dy))])
    for host, device in zip(*found, strict=True):
        assert host.any()
        torch.testing.assert_close(device, host)


def test_random_numbers() -> None:
    """The device's are not the host's; a seed, a state and a generator give them again."""
    torch.manual_seed(3)
    first = torch.randn(50, device=GPU)
    host = torch.randn(50)
    state = torch.cuda.get_rng_state()
    more = torch.rand(50, device=GPU), torch.nn.functional.dropout(first, 0.5)
    torch.manual_seed(3)
    assert torch.equal(host, torch.randn(50))
    assert torch.equal(first, torch.randn(50, device=GPU))
    torch.cuda.set_rng_state(state)
    again = torch.rand(50, device=GPU), torch.nn.functional.dropout(first, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(more, again, strict=True))
    generators = [torch.Generator(GPU).manual_seed(7) for _ in range(2)]
    one, two = (torch.randn(9, device=GPU, generator=g) for g in generators)
    assert torch.equal(one, two) and not torch.equal(one, first[:9])
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(9, device=GPU, generator=torch.Generator())


def test_dropout_by_generator() -> None:
    x = torch.ones(40, 70, device=GPU)
    torch.manual_seed(5)
    kept = F.dropout_add(x, torch.zeros_like(x), p=0.3)
    torch.manual_seed(5)
    assert torch.equal(kept, F.dropout_add(x, torch.zeros_like(x), p=0.3))
    assert 0.6 < (kept != 0).float().mean().item() < 0.8
    assert not torch.equal(kept, F.dropout_add(x, torch.zeros_like(x), p=0.3))


def test_devices_do_not_mix() -> None:
    x = torch.randn(4, device=GPU)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.randn(4)
    assert torch.equal(x + torch.tensor(1.0), x + 1)  # a number is none of any device
    assert torch.equal(x[torch.tensor([2, 0])], x[torch.tensor([2, 0], device=GPU)])


def test_unwritten_memory_is_nan() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.empty(7, dtype=dtype, device=GPU).isnan().all()
    assert (torch.empty(7, dtype=torch.int16, device=GPU) == 0x7FA5).all()


def test_kernels_and_their_cached_launches() -> None:
    """Both ways to a kernel give the host's numbers."""
    x = torch.randn(5, 77)
    with backend("torch"):
        expected = F.softmax(x, -1)
    found = [F.softmax(x.to(GPU), -1) for _ in range(3)]
    torch.testing.assert_close(found[0].cpu(), expected)
    assert all(torch.equal(found[0], other) for other in found)


@triton.jit
def _wait_and_fill(y_ptr, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_last(WAITS)
    tl.store(y_ptr + tl.arange(0, 16), 1.0)


def test_launches_that_begin_early() -> None:
    """The library's do on this device; a kernel that does not wait for the one before may not."""
    assert targets.target_of(GPU).overlaps
    y = torch.empty(16, device=GPU)
    _wait_and_fill[(1,)](y, True, launch_pdl=True)
    assert (y == 1).all()
    with pytest.raises(RuntimeError, match="an early launch of a kernel that does not wait"):
        _wait_and_fill[(1,)](y, False, launch_pdl=True)


def test_memory_of_the_host_is_refused() -> None:
    x = torch.zeros(16)
    with pytest.raises(ValueError, match=r"cannot be accessed from Triton \(cpu tensor\?\)"):
        _shift[(1,)](x, torch.empty(16, device=GPU), 0, BLOCK=16)


def test_grids_that_no_gpu_takes() -> None:
    y = torch.empty(16, device=GPU)
    with pytest.raises(RuntimeError, match="invalid argument: the grid"):
        _fill_rows[(1, 1, 65536)](y, BLOCK=16)
    with pytest.raises(RuntimeError, match="invalid argument: the grid"):
        _fill_rows[(1, 65536, 1)](y, BLOCK=16)


def test_streams_and_events() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    before = torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream != before
        event.record()
        F.softmax(torch.randn(3, 5, device=GPU), -1)  # launched on the current stream, or it fails
    assert torch.cuda.current_stream() == before
    event.wait()
    event.synchronize()
    torch.cuda.synchronize()


def test_threads() -> None:
    x = torch.randn(6, 40, device=GPU)
    expected = F.softmax(x, -1)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(F.softmax(x, -1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(expected, each) for each in found)


def capture(run: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()  # type: ignore[operator]
    return graph


def test_a_capture_changes_nothing_and_a_replay_does() -> None:
    x, total = torch.randn(3, 40, device=GPU), torch.zeros(3, 40, device=GPU)
    F.softmax(x, -1)
    results = []

    def step() -> None:
        results.append(F.softmax(x * 2, -1))
        total.add_(results[-1])

    graph = capture(step)
    assert not total.any() and results[0].isnan().all()
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        total.zero_()
        graph.replay()
        assert torch.equal(results[0], F.softmax(x * 2, -1)) and torch.equal(total, results[0])


def test_replays_draw_anew() -> None:
    x = torch.ones(8, 50, device=GPU)
    F.dropout_add(x, x, p=0.5)
    results = []
    state = torch.cuda.get_rng_state()
    graph = capture(lambda: results.append(F.dropout_add(x, x, p=0.5)))
    assert torch.equal(state, torch.cuda.get_rng_state())
    graph.replay()
    first = results[0].clone()
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, F.dropout_add(x, x, p=0.5))
    graph.replay()
    assert not torch.equal(first, results[0])


def test_what_a_capture_cannot_hold() -> None:
    x = torch.randn(5, device=GPU)
    for run in (x.sum().item, x.nonzero, x.cpu, lambda: x.copy_(torch.randn(5))):
        with pytest.raises(RuntimeError, match=r"capturing|previous error"):
            capture(run)
    assert not torch.cuda.is_current_stream_capturing()
    assert capture(x.neg_) is not None


def test_a_kernel_that_takes_long() -> None:
    _count[(1,)](torch.empty(1, dtype=torch.int32, device=GPU), 100_000_000)


def test_a_write_out_of_bounds_is_found() -> None:
    _shift[(1,)](torch.zeros(32, device=GPU), torch.empty(31, device=GPU), 0, BLOCK=32)


def test_a_read_out_of_bounds_is_found() -> None:
    _shift[(1,)](torch.zeros(32, device=GPU), torch.empty(32, device=GPU), 1, BLOCK=32)


def test_an_unwritten_read_is_found() -> None:
    _shift[(1,)](torch.empty(32, device=GPU), torch.empty(32, device=GPU), 0, BLOCK=32)


def test_a_finding_whose_error_is_swallowed_is_found() -> None:
    with pytest.raises(RuntimeError):
        _shift[(1,)](torch.zeros(32, device=GPU), torch.empty(31, device=GPU), 0, BLOCK=32)


def test_a_write_beside_memory_by_other_means_is_found() -> None:
    x = torch.zeros(4, device=GPU)
    ctypes.memset(x.data_ptr() + 16, 0, 4)
