"""Norms in inference on the CPU, in C++ with the sum before them: values, bits, what ATen does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES
from torch import Tensor
from torch.profiler import profile

import fusedformer.functional as F
from fusedformer import backend, reference
from fusedformer.testing import compare_tensors
from fusedformer_kernels.cpu import build

# Ends of every kind: of a vector, of four of them; and more than a thread's share of elements.
SHAPES = [(3, 1), (2, 7), (5, 64), (4, 129), (120, 768), (1, 9000)]


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    if build.library() is None:
        pytest.skip("no compiler")
    with backend("torch"), torch.no_grad():
        yield


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    found = {name: torch.randn(shape) for name in ("input", "residual")}
    found["input"] += 3.0  # where a sum of squares would lose the variance
    found |= {name: torch.randn(shape[-1:]) for name in ("weight", "bias")}
    return {name: x.to(dtype) for name, x in found.items()} | {"normalized_shape": shape[-1:]}


def calls_aten(function: Any) -> bool:
    with profile() as seen:
        function()
    return any("norm" in event.name or event.name == "aten::add" for event in seen.events())


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}


def by_aten(name: str, given: dict[str, Any]) -> Any:
    """Learned, which is left to ATen."""
    with torch.enable_grad():
        found = getattr(F, name)(**given | {"input": given["input"].clone().requires_grad_()})
    return [x.detach() for x in found] if isinstance(found, tuple) else found.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_values(kind: str, dtype: torch.dtype) -> None:
    """Alone, with a sum, with the sum returned; each parameter there or not."""
    for at, shape in enumerate(SHAPES):
        given = inputs(shape, dtype)
        if kind == "rms_norm" or at % 2:
            del given["bias"]
        if at % 3 == 1:
            del given["weight"]
        alone = {name: x for name, x in given.items() if name != "residual"}
        for name, own in ((f"dropout_add_{kind}", given | {"return_sum": True}), (kind, alone)):
            found = getattr(F, name)(**own)
            assert not calls_aten(lambda name=name, own=own: getattr(F, name)(**own))
            own.pop("return_sum", None)
            truth = getattr(reference, name)(**wide(own))
            stock = by_aten(name, own if own is alone else own | {"return_sum": True})
            if own is alone:
                found, stock, truth = [found], [stock], [truth]
            for part in zip(found, stock, truth, strict=True):
                assert part[0].dtype is dtype and part[0].shape == shape
                comparison = compare_tensors("output", *part)
                assert comparison.passed, (name, shape, comparison)
            if own is not alone:  # whether it is asked for changes nothing
                assert torch.equal(getattr(F, name)(**own), found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    """From other memory, and with other numbers of threads."""
    given = inputs((200, 385), dtype)
    together = F.dropout_add_layer_norm(**given)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        turned = {name: given[name].t().contiguous().t() for name in ("input", "residual")}
        assert torch.equal(F.dropout_add_layer_norm(**given | turned), together)
    finally:
        torch.set_num_threads(threads)
    row = {name: given[name][77:78] for name in ("input", "residual")}
    assert torch.equal(F.dropout_add_layer_norm(**given | row), together[77:78])


def test_nan_and_infinity_stay_in_their_rows() -> None:
    given = inputs((4, 40), torch.float32)
    clean = F.layer_norm(given["input"], (40,))
    given["input"][1, 39], given["input"][2, 0] = torch.nan, torch.inf
    found = F.layer_norm(given["input"], (40,))
    assert found[1:3].isnan().all()
    assert torch.equal(found[::3], clean[::3])


def test_parameters_of_other_dtypes() -> None:
    """Gains in float32 of a half input, several dimensions, and a float32 input's half gain."""
    x, weight = torch.randn(3, 4, 5), torch.randn(4, 5)
    truth = F.layer_norm(x.bfloat16().double(), (4, 5), weight.double(), None, 1e-5)
    found = F.layer_norm(x.bfloat16(), (4, 5), weight)
    torch.testing.assert_close(found.double(), truth, rtol=2**-8, atol=0)
    truth = F.layer_norm(x.double(), (4, 5), None, weight.bfloat16().double())
    found = F.layer_norm(x, (4, 5), None, weight.bfloat16())
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x[:0], lambda x: x.requires_grad_()],
    ids=["float64", "empty", "learned"],
)
def test_other_calls_have_atens_bits(change: Any) -> None:
    x, residual = change(torch.randn(6, 24)), change(torch.randn(6, 24))
    with torch.enable_grad():
        found = F.dropout_add_layer_norm(x, residual, (24,))
        wanted = torch.layer_norm(x + residual, (24,))
    assert torch.equal(found, wanted)
    assert found.requires_grad == x.requires_grad


def test_a_sum_of_two_dtypes() -> None:
    x, residual = torch.randn(6, 24).bfloat16(), torch.randn(6, 24)
    found = F.dropout_add_layer_norm(x, residual, (24,), return_sum=True)
    total = x + residual
    torch.testing.assert_close(found, (torch.layer_norm(total, (24,)), total))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values by ATen."""
    given = inputs((5, 48), torch.float32)
    found = F.dropout_add_layer_norm(**given, return_sum=True)
    monkeypatch.setattr(build, "library", lambda: None)
    assert calls_aten(lambda: F.dropout_add_layer_norm(**given))
    again = F.dropout_add_layer_norm(**given, return_sum=True)
    torch.testing.assert_close(found, again)
