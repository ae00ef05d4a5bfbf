"""Sums with the residual: of what a block adds, scaled by columns and dropped with its sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.nn.children import Pending


class Scaled(NamedTuple):
    """``depth(scale * dropout(x + bias)) + residual``: LayerScale and stochastic depth."""

    pending: Pending
    scale: Tensor | float | None
    depth: nn.Module | None

    def added(self) -> Tensor:
        """Compute the sum."""
        inner, bias, dropout, residual = self.pending
        if isinstance(self.scale, float):  # of a form that drops no sequences
            assert self.depth is None
            inner = dropout(inner if bias is None else inner + bias)
            return torch.add(residual, inner, alpha=self.scale)
        factors = None
        if self.depth is not None:  # it draws for each sequence, whatever that has besides
            ones = inner.new_ones(inner.shape[0], *[1] * (inner.dim() - 1))
            factors = self.depth(ones).flatten()
        return functional.dropout_scale_add(
            inner,
            residual,
            self.scale,
            factors,
            input_bias=bias,
            p=dropout.p,
            training=dropout.training,
        )


def pending_sum(
    pending: Pending, scale: Any, depth: Any, divisor: float | None = None
) -> Pending | Scaled:
    """Return the sum that is to be computed: ``pending`` itself where nothing else is done to it.

    Args:
        pending: what is added, and to what.
        scale: a parameter of each column; a number, or None for 1.
        depth: a module of transformers that drops sequences while it trains, or None.
        divisor: of what is added, where there is no ``scale``; None for 1.
    """
    factor: Any = scale
    if not isinstance(scale, Tensor):
        factor = None if scale in (None, 1) else float(scale)
    if divisor is not None and divisor != 1:
        factor = 1 / divisor
    drops = depth if getattr(depth, "drop_prob", 0.0) > 0 and depth.training else None
    return pending if factor is None and drops is None else Scaled(pending, factor, drops)
