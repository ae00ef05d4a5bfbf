"""Inference's products from one source, and all that follows attention, by C++ in one region each.

Threads take rows as they are free to, so that one which the system has put aside keeps nobody
waiting for long; what lies between two products never leaves the cache. The sums of products are
float32 up to the norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer_kernels.cpu import layer as kernel
from fusedformer_kernels.cpu.layer import Block as Block
from fusedformer_kernels.cpu.layer import Pair

# Multiplications in the time that packing weights and waking threads takes little of.
_WORTH = 2**23
_PLAIN = Tensor, Parameter
Shaped = tuple[Pair, tuple[int, ...]]  # with the shape that its weight should have


def enough_rows(x: Tensor) -> bool:
    """Tell, in little time, whether ``x`` ``[*, width]`` has the rows for which it is worth to ask.

    A weight is packed at each call, since it may be another by then.
    """
    width = x.shape[-1]
    return 2 * x.numel() >= width * width and kernel.computes(x.dtype)


def projections_compiled(x: Tensor, products: Sequence[Pair]) -> list[Tensor] | None:
    """``x @ weight.T + bias`` of each of ``products``; None where others are to compute it.

    Args:
        x: ``[*, in]``, eager, on a CPU, without gradients, with :func:`enough_rows`.
        products: weights ``[out, in]`` and biases ``[out]``.
    """
    if not _takes(x, [(one, (len(one[0]), x.shape[-1])) for one in products]):
        return None
    return kernel.project(x.contiguous(), products)


def block_compiled(heads: Tensor, residual: Tensor, block: Block) -> Tensor | None:
    """What a layer makes of ``heads`` ``[*, in]``, as ``residual``; None as above.

    It is ``norm(x + second(activation(first(x))))`` with ``x = norm(residual + last(heads))``; or
    with norms first ``x + second(activation(first(norm(x))))`` with ``x = residual + last(heads)``.
    """
    width, hidden = residual.shape[-1], len(block.first[0])
    products = [
        (block.last, (width, heads.shape[-1])),
        (block.first, (hidden, width)),
        (block.second, (width, hidden)),
    ]
    if (
        block.activation not in kernel.ACTIVATIONS
        or residual.dtype is not heads.dtype
        or type(residual) not in _PLAIN
        or residual.shape[:-1] != heads.shape[:-1]
        or not _takes(heads, products, [(norm, (width,)) for norm in (block.middle, block.end)])
    ):
        return None
    return kernel.block(heads.contiguous(), residual.contiguous(), block)


def _takes(x: Tensor, products: Sequence[Shaped], norms: Sequence[Shaped] = ()) -> bool:
    """Tell whether ``x`` is plain, parameters too, of its dtype and the shapes beside them."""
    dtype = x.dtype
    if not x.numel() or not kernel.computes(dtype):
        return False
    rows = x.numel() // x.shape[-1]
    return (
        rows * sum(math.prod(shape) for _, shape in products) >= _WORTH
        and all(shape[1] % 2 == 0 for _, shape in products)
        and type(x) in _PLAIN
        and all(
            _fits(weight, dtype, shape) and _fits(bias, dtype, shape[:1])
            for (weight, bias), shape in (*products, *norms)
        )
    )


def _fits(parameter: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return parameter is None or (
        type(parameter) in _PLAIN
        and parameter.dtype is dtype
        and parameter.shape == shape
        and parameter.is_contiguous()
    )
