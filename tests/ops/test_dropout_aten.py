"""Dropout of the torch backend: statistics, the factor, reproducibility, what goes to ATen."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from fusedformer.ops.dropout_aten import (
    drop_again_in_place,
    drop_in_place,
    dropout_add_aten,
    dropout_aten,
    dropped_again,
)
from fusedformer_kernels.cpu import build
from fusedformer_kernels.cpu import dropout as kernel

SIGMAS = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.004, 0.1, 0.5, 0.9, 0.996])
def test_rate_and_mean(p: float, dtype: torch.dtype) -> None:
    """Over pieces, and in each of the four elements of a draw; the factor is torch's."""
    ones = torch.ones(400_003, dtype=dtype)
    output = dropout_aten(ones, p)
    kept = output != 0
    for part in (kept, kept[:131_072], kept[131_072:], *(kept[i::4] for i in range(4))):
        sigma = math.sqrt(p * (1 - p) / part.numel())
        assert abs(part.double().mean().item() - (1 - p)) <= SIGMAS * sigma
    (factor,) = output[kept].unique()
    assert factor.item() == pytest.approx(1 / (1 - p), rel=torch.finfo(dtype).eps)
    together = (kept[1:] & kept[:-1]).double().mean().item()  # neighbours are independent
    assert abs(together - (1 - p) ** 2) <= SIGMAS * math.sqrt((1 - p) ** 2 / kept.numel())


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.3, 1.0])
def test_in_place_and_again(p: float) -> None:
    """What was dropped is dropped again; at 0 nothing, at 1 all, and next to 0 as ATen."""
    x = torch.rand(300, 700) + 1
    dropped = x.clone()
    kept = drop_in_place(dropped, p)
    if kept is None:
        assert p == 0 and torch.equal(dropped, x)
        return
    assert torch.equal(dropped != 0, kept.bool())
    again = x.clone()
    drop_again_in_place(again, kept, p)
    assert torch.equal(again, dropped)
    assert torch.allclose(dropped_again(x, kept, p), dropped)


def test_the_seed_decides() -> None:
    x, residual = torch.rand(1000), torch.rand(1000)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout_aten(x, 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.manual_seed(1)
    assert torch.allclose(dropout_add_aten(x, residual, 0.5), found[0] + residual)
    for p, whole in ((0.0, x), (1.0, torch.zeros_like(x))):
        assert torch.equal(dropout_aten(x, p), whole)
        assert torch.equal(dropout_add_aten(x, residual, p), whole + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_compiler_all_bits_are_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of results, gradients and the generator behind them, wherever that was before."""
    if not kernel.draws_as_torch():
        pytest.skip("no compiler")
    x, residual = (torch.randn(3, 50_001).to(dtype).requires_grad_() for _ in range(2))
    dy, found = torch.randn(3, 50_001).to(dtype), []
    for library in (build.library(), None):
        monkeypatch.setattr(build, "library", lambda library=library: library)
        for used in (0, 1, 623, 624, 1000):
            torch.manual_seed(7)
            torch.empty(used, dtype=torch.int32).random_()
            for p in (0.1, 0.996):
                output = dropout_add_aten(x, residual, p)
                found += [output, *torch.autograd.grad(output, x, dy), dropout_aten(x.t(), p)]
            found.append(torch.get_rng_state())
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:]))


def test_threads_change_nothing() -> None:
    """Neither elements that are dropped nor the state of the generator behind them."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            found.append((dropout_aten(torch.ones(100_003), 0.1), torch.get_rng_state()))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [True, False])
def test_few_calls_and_a_byte_of_each_element(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the tensor, it is drawn once; and one byte is saved of each element.

    By ATen that takes eight calls, compiled none of ATen's.
    """
    if compiled and not kernel.draws_as_torch():
        pytest.skip("no compiler")
    if not compiled:
        monkeypatch.setattr(build, "library", lambda: None)
    x, residual = (torch.rand(700, 1000, requires_grad=True) for _ in range(2))
    with torch.profiler.profile() as profiled:
        torch.autograd.grad(dropout_add_aten(x, residual, 0.1), (x, residual), residual.detach())
    calls = Counter(event.name for event in profiled.events())
    shared = "aten::random_", "aten::ge", "aten::addcmul", "aten::copy_", "aten::mul", "aten::mul_"
    assert calls["aten::random_"] == calls["aten::ge"] == (0 if compiled else 1)
    assert sum(calls[name] for name in shared) <= (0 if compiled else 8), calls
    saved: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        dropout_aten(x, 0.1)
    assert [(t.numel(), t.element_size()) for t in saved] == [(x.numel(), 1)]


def test_gradients_of_gradients() -> None:
    x, residual = (torch.rand(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropout_add_aten(x.sin(), residual, 0.4)

    assert torch.autograd.gradgradcheck(call, (x, residual))


def test_gradients_and_odd_shapes() -> None:
    for shape in ((), (1,), (0, 3), (5, 7, 3)):
        x = torch.rand(shape, requires_grad=True)
        output = dropout_aten(x, 0.5)
        dy = torch.rand(shape)
        (grad,) = torch.autograd.grad(output, x, dy)
        assert output.shape == shape and torch.equal(grad, torch.where(output == 0, 0.0, 2 * dy))
