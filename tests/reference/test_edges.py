"""The definitions where they are easily wrong: empty, huge, degenerate and refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import reference


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def grads(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_empty(name: str, shape: tuple[int, ...], masked: bool) -> None:
    x = rand(*shape)
    given = {"mask": torch.ones(shape, dtype=torch.bool)} if masked else {}
    y = getattr(reference, name)(x, -1, **given)
    assert y.shape == shape
    assert grads(y, x)[0].shape == shape


def test_no_dimension() -> None:
    assert reference.softmax(rand(), 0) == 1.0
    assert reference.log_softmax(rand(), -1) == 0.0


@pytest.mark.parametrize("size", [1e6, 1e15])
def test_huge_scores_keep_their_digits(size: float) -> None:
    """A float32 kernel subtracts the largest score exactly: the truth must be no worse than it."""
    steps = torch.tensor([[0.0, -1.0, -2.0, -4.0]], dtype=torch.float64)
    exact = torch.log_softmax(steps, -1)
    tight: dict[str, Any] = {"rtol": 4 * torch.finfo(torch.float64).eps, "atol": 0.0}
    torch.testing.assert_close(reference.log_softmax(steps + size, -1), exact, **tight)
    torch.testing.assert_close(reference.softmax(steps + size, -1), exact.exp(), **tight)
    # Attention with these as its scores, and the identity as its values.
    query, key = torch.ones(1, 1, dtype=torch.float64), (steps + size).T
    identity = torch.eye(4, dtype=torch.float64)
    p, lse = reference.scaled_dot_product_attention(query, key, identity, scale=1.0)
    torch.testing.assert_close(p, exact.exp(), **tight)
    torch.testing.assert_close(lse, size - exact[:, 0], **tight)


def test_gradients_that_vanish_are_zero() -> None:
    """Exactly: rounding in their place would make a parity case of it prove nothing."""
    x = rand(5, 1)
    for y in (
        reference.softmax(x, -1),
        reference.log_softmax(x, -1),
        reference.layer_norm(x, (1,)),
    ):
        assert (grads(y, x)[0] == 0).all()
    q, k, v = (rand(2, 3, 1, 4) for _ in range(3))
    output, _ = reference.scaled_dot_product_attention(q, k, v)
    assert all((g == 0).all() for g in grads(output, q, k))


def test_additive_mask_gets_a_finite_gradient_where_it_removes() -> None:
    shift = torch.randn(4, 6, dtype=torch.float64)
    shift[0, 2], shift[1] = -torch.inf, -torch.inf
    shift.requires_grad_()
    (gradient,) = grads(reference.softmax(rand(4, 6), -1, mask=shift), shift)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0
    assert (gradient[1] == 0).all()
    q, k, v = (rand(2, n, 3) for n in (4, 6, 6))
    outputs = reference.scaled_dot_product_attention(q, k, v, shift)
    draws = [torch.randn_like(t) for t in outputs]
    (gradient,) = torch.autograd.grad(outputs, shift, draws)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0
    assert (gradient[1] == 0).all()


def test_values_alone_may_broadcast_the_batch() -> None:
    """The log-sum-exp and the masks by sequence have the batch of all three inputs."""
    q, k, v = rand(1, 2, 5, 4), rand(1, 2, 7, 4), rand(3, 2, 7, 6)
    lengths = torch.tensor([7, 2, 0])
    output, lse = reference.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    assert output.shape == (3, 2, 5, 6)
    assert lse.shape == (3, 2, 5)
    for i, n in enumerate(lengths[:2].tolist()):
        keys, values = k[0, :, :n], v[i, :, :n]
        alone, alone_lse = reference.scaled_dot_product_attention(q[0], keys, values)
        torch.testing.assert_close(output[i], alone)
        torch.testing.assert_close(lse[i], alone_lse)
    assert (output[2] == 0).all()
    assert (lse[2] == -torch.inf).all()


def test_dropout_of_everything_is_zero_with_gradient_zero() -> None:
    x, keep = rand(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    y = reference.bias_activation(x, p=1.0, keep=keep)
    assert (y == 0).all()
    assert (grads(y, x)[0] == 0).all()


def test_dropout_without_its_mask_is_refused() -> None:
    """It would be silently left out."""
    x = rand(3, 4)
    calls: list[Any] = [
        lambda: reference.dropout_add(x, x, p=0.1),
        lambda: reference.bias_activation(x, p=0.1),
        lambda: reference.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="needs its mask 'keep'"):
            call()


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish'"):
        reference.bias_activation(rand(3, 4), None, "swish")
