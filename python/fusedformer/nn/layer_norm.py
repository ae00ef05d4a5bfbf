"""``torch.nn.LayerNorm`` on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import functional


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization, as :func:`fusedformer.functional.layer_norm`.

    Constructor, parameters and initialization are those of :class:`torch.nn.LayerNorm`:
    ``normalized_shape``, ``eps=1e-5``, ``elementwise_affine=True``, ``bias=True``, ``device``,
    ``dtype``.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[*, *normalized_shape]``. Errors: those of the functional form."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
