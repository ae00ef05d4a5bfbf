"""torch.func: what works on each backend, and the errors where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend
from fusedformer import functional as F


def by_token(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss of each token with class 1, as wide as the input."""

    def call(x: Tensor) -> Tensor:
        target = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return loss(x, target, reduction="none")[..., None].expand_as(x)

    return call


OPS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "bias_activation": lambda x: F.bias_activation(x, None, "gelu"),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "cross_entropy": by_token(lambda x, *t, **k: F.cross_entropy(x.movedim(-1, 1), *t, **k)),
    "linear_cross_entropy": by_token(
        lambda x, t, **k: F.linear_cross_entropy(x, torch.eye(9, 8, device=x.device), t, **k)
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_vjp(op: str, device: str) -> None:
    x, dy = torch.randn(2, 1, 3, 5, 8, device=device)
    with backend("torch"):
        _, vjp = torch.func.vjp(OPS[op], x)
        (got,) = vjp(dy)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(OPS[op](leaf), leaf, dy)
    # Elsewhere these are computed in chunks.
    chunked = op in ("linear_cross_entropy", "scaled_dot_product_attention")
    if chunked:
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)
    with backend("triton"), pytest.raises(RuntimeError, match=r"torch.func.*backend\('torch'\)"):
        torch.func.vjp(OPS[op], x)


@pytest.mark.parametrize("op", OPS)
def test_jvp(op: str, device: str) -> None:
    """Along a direction the derivative of <dy, y> is that of the gradient with it."""
    x, direction, dy = torch.randn(3, 1, 3, 5, 8, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match=r"torch.func.*backend\('torch'\)"):
        torch.func.jvp(OPS[op], (x,), (direction,))
    if op == "scaled_dot_product_attention":  # ATen's attention has no forward derivative
        return
    with backend("torch"):
        _, moved = torch.func.jvp(OPS[op], (x,), (direction,))
        _, vjp = torch.func.vjp(OPS[op], x)
    assert torch.allclose((moved * dy).sum(), (vjp(dy)[0] * direction).sum(), atol=1e-4)


def test_a_gradient_by_parameters_and_of_a_mapped_function(device: str) -> None:
    """The error comes whichever argument is differentiated and whatever is inside."""
    x, weight = torch.randn(2, 5, 8, device=device), torch.randn(8, device=device)

    def loss(weight: Tensor) -> Tensor:
        return torch.func.vmap(lambda each: F.layer_norm(each, (8,), weight))(x).square().sum()

    with backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(weight)
    with backend("torch"):
        assert torch.func.grad(loss)(weight).isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_vmap(op: str, name: Any, device: str) -> None:
    x = torch.randn(3, 1, 2, 5, 8, device=device)
    with backend(name):
        got = torch.func.vmap(OPS[op])(x)
        want = torch.stack([OPS[op](each) for each in x])
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_gradient_outside_of_vmap(name: Any, device: str) -> None:
    """What is mapped hides that a gradient will be asked for, and is kept all the same."""
    x, residual, dy = torch.randn(3, 3, 4, 16, device=device).unbind()

    def gradients(mapped: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        each = lambda x, residual: F.dropout_add_layer_norm(F.rms_norm(x, (16,)), residual, (16,))
        call = torch.func.vmap(each) if mapped else each
        return torch.autograd.grad(call(*leaves), leaves, dy)

    with backend(name):
        pairs = zip(gradients(True), gradients(False), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("op", OPS)
def test_double_backward(op: str, device: str) -> None:
    x = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)

    def twice(name: Any) -> Tensor:
        with backend(name):
            output = OPS[op](x)
            (first,) = torch.autograd.grad(output, x, output.detach(), create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match=r"backend\('torch'\)"):
        twice("triton")
    if op != "scaled_dot_product_attention":
        assert twice("torch").isfinite().all()
