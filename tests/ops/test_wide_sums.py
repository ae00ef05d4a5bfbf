"""In half precision on the CPU, gradients that sum thousands of rows are near to the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.ops import wide_sums

ROWS, WIDTH = 2048, 16
HALF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # half a step of a number near 1


def _tensor(*shape: int) -> Tensor:
    return torch.randn(shape)


def _embedded(module: Any) -> Callable[..., Tensor]:
    ids = torch.arange(ROWS).view(4, -1) % 3

    def embed(tokens: Tensor, positions: Tensor, types: Tensor, *norm: Tensor) -> Tensor:
        found: Tensor = module.embedding_layer_norm(
            ids, tokens, *norm, position_ids=ids, position_weight=positions,
            token_type_ids=ids % 2, token_type_weight=types,
        )  # fmt: skip
        return found

    return embed


def _normed(module: Any) -> Callable[..., Tensor]:
    return lambda x, *parameters: module.layer_norm(x, (WIDTH,), *parameters)


def _added(module: Any) -> Callable[..., Tensor]:
    def add(x: Tensor, residual: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        found = module.dropout_add_layer_norm(x, residual, (WIDTH,), *norm, input_bias=bias, p=0.0)
        return found if isinstance(found, Tensor) else found[0]

    return add


def _rms(module: Any) -> Callable[..., Tensor]:
    return lambda x, weight: module.rms_norm(x, (WIDTH,), weight)


def _activated(module: Any) -> Callable[..., Tensor]:
    return lambda x, bias: module.bias_activation(x, bias, "gelu")


X, NORM, TABLE = (ROWS, WIDTH), ((WIDTH,), (WIDTH,)), (5, WIDTH)
CASES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "layer norm": (_normed, (X, *NORM)),
    "bias, residual, layer norm": (_added, (X, X, (WIDTH,), *NORM)),
    "embeddings": (_embedded, (TABLE, TABLE, TABLE, *NORM)),
    "RMS norm": (_rms, (X, (WIDTH,))),
    "bias and activation": (_activated, (X, (WIDTH,))),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    """The output gradients have a mean, so that sums grow while addends do not."""
    make, shapes = CASES[name]
    inputs = [_tensor(*shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = make(reference)(*exact)
    grad = (_tensor(*truth.shape) + 0.5).to(dtype)
    with backend("torch"):
        found = torch.autograd.grad(make(F)(*inputs), inputs, grad)
    for ours, right in zip(found, torch.autograd.grad(truth, exact, grad.double()), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - right).norm() / right.norm()
        assert error < 4 * HALF[dtype], f"{error / HALF[dtype]:.1f} roundings"


@pytest.mark.parametrize("way", ["grad of grad", "traced", "torch.func", "batched"])
def test_every_way_to_a_gradient_sums_so(way: str) -> None:
    dtype = torch.bfloat16
    shapes = (X, *NORM)
    inputs = [_tensor(*shape).to(dtype).requires_grad_() for shape in shapes]
    grad = (_tensor(*X) + 0.5).to(dtype)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weight, bias)

    with backend("torch"):
        expected = torch.autograd.grad(norm(*inputs), inputs, grad)
        if way == "grad of grad":
            found = torch.autograd.grad(norm(*inputs), inputs, grad, create_graph=True)
            exact = [t.detach().double().requires_grad_() for t in inputs]
            output = torch.layer_norm(exact[0], (WIDTH,), exact[1], exact[2])
            first = torch.autograd.grad(output, exact, grad.double(), create_graph=True)
            second = _tensor(*X).bfloat16()
            twice = [
                torch.autograd.grad(g[0], wanted[:2], second.to(g[0].dtype))
                for g, wanted in ((found, inputs), (first, exact))
            ]
            for ours, right in zip(*twice, strict=True):
                assert (ours.double() - right).norm() < 1e-2 * right.norm()
        elif way == "traced":
            compiled = torch.compile(norm, backend="aot_eager")
            found = torch.autograd.grad(compiled(*inputs), inputs, grad)
        elif way == "torch.func":
            found = torch.func.vjp(norm, *inputs)[1](grad)
        else:
            both = torch.stack([grad, grad])
            batched = torch.autograd.grad(norm(*inputs), inputs, both, is_grads_batched=True)
            found = tuple(each[1] for each in batched)
    for ours, same in zip(found, expected, strict=True):
        assert (ours.double() - same.double()).norm() < 4 * HALF[dtype] * same.double().norm()


@pytest.mark.parametrize("padding_idx", [None, 1, -4])
def test_lookup(padding_idx: int | None) -> None:
    ids = torch.arange(ROWS).view(4, -1) % 5
    weight = _tensor(5, WIDTH).bfloat16().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    found = wide_sums.embedding(ids, weight, padding_idx)
    truth = torch.nn.functional.embedding(ids, exact, padding_idx)
    assert torch.equal(found.double(), truth)
    grad = (_tensor(*found.shape) + 0.5).bfloat16()
    (ours,) = torch.autograd.grad(found, weight, grad, create_graph=True)
    (right,) = torch.autograd.grad(truth, exact, grad.double())
    assert (ours.double() - right).norm() < 2 * HALF[torch.bfloat16] * right.norm()
    if padding_idx is not None:
        assert not ours[1].any()


def test_table_of_relative_positions() -> None:
    weight = _tensor(32, 2).bfloat16().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    found, truth = (
        F.relative_position_bias(w, bidirectional=True, max_distance=4000) for w in (weight, exact)
    )
    grad = (_tensor(*found.shape) + 0.5).bfloat16()
    (ours,) = torch.autograd.grad(found, weight, grad)
    (right,) = torch.autograd.grad(truth, exact, grad.double())
    assert (ours.double() - right).norm() < 2 * HALF[torch.bfloat16] * right.norm()
