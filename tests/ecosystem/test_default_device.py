"""A default device or dtype of torch changes nothing for tensors that are there already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.bad_arguments import good_leaves
from torch import Tensor

from fusedformer import backend, functional
from fusedformer.ops import relative_position
from fusedformer.ops.attention import compiled

FUNCTIONS = [name for name in functional.__all__ if name not in ("pack", "unpack")]


@contextmanager
def defaults(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str, name: Any) -> None:
    """Values and gradients, of little and, where there is a gradient, of much."""
    arguments, leaves = good_leaves(function)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        with backend(name):
            found = getattr(functional, function)(**arguments)
            outputs = found if isinstance(found, tuple) else (found,)
            grads = torch.autograd.grad(outputs, leaves, outputs, allow_unused=True)
            with torch.no_grad():
                plain = getattr(functional, function)(**arguments)
        plain = plain if isinstance(plain, tuple) else (plain,)
        return [*outputs, *plain, *(grad for grad in grads if grad is not None)]

    want = run()
    with defaults(torch.bfloat16):
        got = run()
    assert all(map(torch.equal, got, want))


def test_what_is_kept_from_call_to_call() -> None:
    """Starts of whole sequences, buckets of distances, batches of packed sequences."""
    x, long = torch.randn(3, 2, 7, 16), torch.randn(3, 40, 2, 16)
    rows, table = torch.randn(50, 2, 16), torch.randn(2, 12, 16)
    starts = torch.tensor([0, 9, 10, 50])

    def run() -> list[Tensor]:
        for cached in (compiled._starts_of, relative_position.distance_buckets):
            cached.cache_clear()
        torch.manual_seed(5)
        leaf = rows.clone().requires_grad_()
        with backend("torch"):
            attended = functional.varlen_attention(leaf, leaf, leaf, starts, starts, 40, 40, 0.5)
            (grad,) = torch.autograd.grad(attended, leaf, attended)
            with torch.no_grad():
                whole = functional.scaled_dot_product_attention(x, x, x)
                q = long.transpose(1, 2)
                keys = functional.disentangled_attention(q, q, q, table, max_distance=20)
        return [attended.detach(), grad, whole, keys]

    want = run()
    with defaults(torch.bfloat16):
        got = run()
    assert all(map(torch.equal, got, want))
