"""Sums with the residual: of what a block adds, scaled by columns and dropped with its sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer.nn.children import Pending


class Scaled(NamedTuple):
    """``depth(scale * dropout(x + bias)) + residual``: LayerScale and stochastic depth."""

    pending: Pending
    scale: Tensor | float | None
    depth: nn.Module | None

    def added(self) -> Tensor:
        """Compute the sum; scale and residual in one step where no sequence is dropped."""
        inner, bias, dropout, residual = self.pending
        inner = dropout(inner if bias is None else inner + bias)
        if self.depth is None:
            assert self.scale is not None
            if not isinstance(self.scale, Tensor):
                return torch.add(residual, inner, alpha=self.scale)
            return torch.addcmul(residual, inner, self.scale)
        kept: Tensor = self.depth(inner if self.scale is None else inner * self.scale)
        return kept + residual


def pending_sum(
    pending: Pending, scale: Any, depth: Any, divisor: float | None = None
) -> Pending | Scaled:
    """Return the sum that is to be computed: ``pending`` itself where nothing else is done to it.

    Args:
        pending: what is added, and to what.
        scale: a parameter of each column; a number, which is 1, or None.
        depth: a module of transformers that drops sequences while it trains, or None.
        divisor: of what is added, where there is no ``scale``; None for 1.
    """
    factor: Any = scale if isinstance(scale, Tensor) else None
    if divisor is not None and divisor != 1:
        factor = 1 / divisor
    drops = depth if getattr(depth, "drop_prob", 0.0) > 0 and depth.training else None
    return pending if factor is None and drops is None else Scaled(pending, factor, drops)
