"""Steps of a layer besides launches; the products are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer._internal.plans import step
from fusedformer.ops import product
from fusedformer.ops._shared import draw_seed

seed_of = step(draw_seed)
product_of = step(product.product)
input_gradient = step(product.input_gradient)
weight_gradient = step(product.weight_gradient)
bias_gradient = step(product.bias_gradient)


@step
def added(x: Tensor, y: Tensor) -> Tensor:
    """Add what comes by two ways."""
    return x + y


@step
def joined(x: Tensor, y: Tensor) -> Tensor:
    """Put the gradient of the part for keys and values behind that of the part for queries."""
    return torch.cat((x, y))


@step
def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def in_dtype(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return ``x`` in ``dtype``, itself where it is so already."""
    return x if x.dtype == dtype else _cast(x, dtype)
