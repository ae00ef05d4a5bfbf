"""Norms on the CPU, in C++ with the sum before them: values, gradients, bits, what ATen does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES
from torch import Tensor
from torch.profiler import profile

import fusedformer.functional as F
from fusedformer import reference
from fusedformer.ops import norm_aten
from fusedformer.testing import compare_tensors
from fusedformer_kernels.cpu import build
from fusedformer_kernels.cpu import norm as kernel

pytestmark = pytest.mark.usefixtures("by_compiled_torch")

# Ends of every kind: of a vector, of four of them; and more than a thread's share of elements.
SHAPES = [(3, 32), (2, 47), (5, 64), (4, 129), (120, 768), (1, 9000)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    found = {name: torch.randn(shape) for name in ("input", "residual")}
    found["input"] += 3.0  # where a sum of squares would lose the variance
    found |= {name: torch.randn(shape[-1:]) for name in ("weight", "bias")}
    return {name: x.to(dtype) for name, x in found.items()} | {"normalized_shape": shape[-1:]}


def some_of(
    kind: str, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]]:
    """Shapes, with each parameter there or not; the last without a residual."""
    for at, shape in enumerate(SHAPES):
        given = inputs(shape, dtype)
        if kind == "rms_norm" or at % 2:
            del given["bias"]
        if at % 3 == 1:
            del given["weight"]
        yield shape, given, {name: x for name, x in given.items() if name != "residual"}


def calls_aten(function: Any) -> bool:
    with profile() as seen:
        function()
    return any("norm" in event.name or event.name == "aten::add" for event in seen.events())


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}


@contextmanager
def aten() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "computes", lambda dtype: False)
        yield


def by_aten(name: str, given: dict[str, Any]) -> Any:
    with aten():
        return getattr(F, name)(**given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_values(kind: str, dtype: torch.dtype) -> None:
    """Alone, with a sum, with the sum returned; each parameter there or not."""
    for shape, given, alone in some_of(kind, dtype):
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


def test_a_variance_that_overflows_is_no_number() -> None:
    """As ATen has it; of a mean of squares it makes 0."""
    x = torch.randn(3, 40)
    x[1] *= 1e30
    assert F.layer_norm(x, (40,))[1].isnan().all() and F.layer_norm(x, (40,))[::2].isfinite().all()
    assert not F.rms_norm(x, (40,))[1].any() and not torch.rms_norm(x, (40,))[1].any()


def test_nan_and_infinity_stay_in_their_rows() -> None:
    given = inputs((4, 40), torch.float32)
    clean = F.layer_norm(given["input"], (40,))
    given["input"][1, 39], given["input"][2, 0] = torch.nan, torch.inf
    found = F.layer_norm(given["input"], (40,))
    assert found[1:3].isnan().all()
    assert torch.equal(found[::3], clean[::3])


def test_a_mean_takes_no_digits() -> None:
    """Summed in float32, it is rounded; what it leaves is taken away after it."""
    x = torch.randn(40, 768) + 30.0
    wanted = torch.layer_norm(x.double(), (768,))
    error = (F.layer_norm(x, (768,)) - wanted).square().mean().sqrt()
    assert error < 1.1 * 2**-24
    with aten():
        assert (F.layer_norm(x, (768,)) - wanted).square().mean().sqrt() > 2 * error


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
    [lambda x: x.double(), lambda x: x[:0], lambda x: x[:, :24].contiguous()],
    ids=["float64", "empty", "few columns"],
)
def test_other_calls_have_atens_bits(change: Any) -> None:
    x, residual = change(torch.randn(6, 40)), change(torch.randn(6, 40))
    found = F.dropout_add_layer_norm(x, residual, x.shape[1:])
    assert torch.equal(found, torch.layer_norm(x + residual, x.shape[1:]))
    x = torch.randn(6, 40, requires_grad=True)  # less than is worth a node of Python's
    with torch.enable_grad():
        assert type(F.layer_norm(x, (40,)).grad_fn).__name__ == "NativeLayerNormBackward0"


@pytest.mark.parametrize("name", ["residual", "weight", "bias"])
def test_tensors_that_do_not_fit_are_refused_as_by_torch(name: str) -> None:
    """By whoever calls with no checks before, as fused layers do."""
    given = inputs((6, 40), torch.float32)
    given[name] = given[name][..., :-3].contiguous()
    x, residual, weight, bias = (given[n] for n in ("input", "residual", "weight", "bias"))
    with pytest.raises(RuntimeError, match="37"):
        norm_aten.add_norm_aten(
            "layer", x, residual, (40,), weight, bias, 1e-5, None,
            input_bias=None, p=0.0, return_sum=False,
        )  # fmt: skip


@pytest.fixture
def worth() -> Iterator[None]:
    """Let gradients of any size be computed in C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm_aten, "_WORTH_A_NODE", 0)
        yield


def learned(given: dict[str, Any]) -> list[Tensor]:
    return [x.requires_grad_() for x in given.values() if isinstance(x, Tensor)]


def gradients(name: str, given: dict[str, Any], grads: list[Tensor], module: Any = F) -> Any:
    """Gradients of all tensors; ``given`` are new leaves."""
    given = {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in given.items()}
    leaves = learned(given)
    with torch.enable_grad():
        found = getattr(module, name)(**given)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
        return torch.autograd.grad(outputs, leaves, grads)


@pytest.mark.usefixtures("worth")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients(kind: str, dtype: torch.dtype) -> None:
    for shape, given, alone in some_of(kind, dtype):
        grads = [torch.randn(shape).to(dtype) for _ in range(2)]
        both = given | {"return_sum": True}
        for name, own in (
            (kind, alone),
            (f"dropout_add_{kind}", given),
            (f"dropout_add_{kind}", both),
        ):
            found = gradients(name, own, grads)
            with aten():
                stock = gradients(name, own, grads)
                truth = gradients(name, wide(own), grads)
            for part in zip(found, stock, truth, strict=True):
                assert part[0].dtype is dtype
                comparison = compare_tensors("gradient", *part)
                assert comparison.passed, (name, shape, comparison)


@pytest.mark.usefixtures("worth")
@pytest.mark.parametrize("rows", [40, 5000])
def test_sums_over_rows_are_exact_and_the_same_by_any_number_of_threads(rows: int) -> None:
    """Gradients with a mean, which row by row in float32 lose digits."""
    given = inputs((rows, 40), torch.float32)
    grad = torch.randn(rows, 40) + 2.0
    found = gradients("dropout_add_layer_norm", given, [grad])
    truth = gradients("dropout_add_layer_norm", wide(given), [grad])
    for ours, right in zip(found[2:], truth[2:], strict=True):
        assert (ours - right).abs().max() <= 2e-7 * right.abs().max()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = gradients("dropout_add_layer_norm", given, [grad])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, again))


@pytest.mark.usefixtures("worth")
@pytest.mark.parametrize("frozen", ["input", "residual", "weight", "bias", "input residual"])
def test_only_what_learns_has_a_gradient(frozen: str) -> None:
    given = inputs((6, 40), torch.float32)
    grad = torch.randn(6, 40)
    wanted = gradients("dropout_add_layer_norm", given, [grad])
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    for name in names:
        given[name].requires_grad_(name not in frozen.split())
    with torch.enable_grad():
        F.dropout_add_layer_norm(**given).backward(grad)
    for name, gradient in zip(names, wanted, strict=True):
        own = given[name].grad
        assert own is None if name in frozen.split() else torch.equal(own, gradient)


@pytest.mark.usefixtures("worth")
def test_the_bits_are_those_of_inference() -> None:
    given = inputs((30, 65), torch.bfloat16)
    found = F.dropout_add_layer_norm(**given, return_sum=True)
    learned(given)
    with torch.enable_grad():
        again = F.dropout_add_layer_norm(**given, return_sum=True)
    assert all(map(torch.equal, found, again))
    assert not calls_aten(lambda: torch.autograd.grad(again, given["input"], again))


@pytest.mark.usefixtures("worth")
@pytest.mark.usefixtures("worth")
def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """Hooks promise a tensor's values and size."""
    given = inputs((30, 65), torch.float32)
    grad = torch.randn(30, 65)
    wanted = gradients("dropout_add_layer_norm", given, [grad])
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda kept: kept, lambda kept: kept.t().contiguous().t() if kept.dim() == 2 else kept
    )
    with hooks:
        found = gradients("dropout_add_layer_norm", given, [grad])
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("of_sum", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_of_gradients_and_batches_of_them(kind: str, of_sum: bool) -> None:
    given = inputs((6, 40), torch.float32) | {"return_sum": of_sum}
    if kind == "rms_norm":
        del given["bias"]
    grads, seconds = torch.randn(3, 6, 40), torch.randn(4, 6, 40)

    def twice(given: dict[str, Any]) -> Any:
        given = {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        leaves, dtype = learned(given), given["input"].dtype
        with torch.enable_grad():
            found = getattr(F, f"dropout_add_{kind}")(**given)
            outputs = list(found) if of_sum else [found]
            own = grads[: len(outputs)].to(dtype).unbind()
            first = torch.autograd.grad(outputs, leaves, own, create_graph=True)
            total = sum(
                (f * s.to(dtype)[0, : f.shape[-1]]).sum()
                for f, s in zip(first, seconds, strict=False)
            )
            second = torch.autograd.grad(total, leaves[:3], retain_graph=True)
            batch = torch.autograd.grad(
                outputs, leaves, [torch.stack([g, 2 * g]) for g in own], is_grads_batched=True
            )
        return [*first, *second, *batch]

    found, truth = twice(given), twice(wide(given))
    for ours, right in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5)


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
