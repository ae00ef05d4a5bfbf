"""``torch.nn.RMSNorm`` on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import functional


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square normalization, as :func:`fusedformer.functional.rms_norm`.

    Constructor, parameters and initialization are those of :class:`torch.nn.RMSNorm`:
    ``normalized_shape``, ``eps=None``, ``elementwise_affine=True``, ``device``, ``dtype``.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[*, *normalized_shape]``. Errors: those of the functional form."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
