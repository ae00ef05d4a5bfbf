"""Steps of an encoder layer besides launches; the products are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer._internal.plans import step
from fusedformer._internal.tracing import may_be_batched
from fusedformer.ops._shared import draw_seed
from fusedformer.ops.product import product, product_add

seed_of, product_of = step(draw_seed), step(product)


@step
def added_product(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    if may_be_batched():  # nothing of many may be written in place
        return x @ weight if addend is None else addend + x @ weight
    return product_add(x, weight, addend)


@step
def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@step
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


@step
def bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum(0)


def in_dtype(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else cast_to(x, dtype)
