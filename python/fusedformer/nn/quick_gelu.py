"""The activation of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import functional


class QuickGELU(torch.nn.Module):
    """``x * sigmoid(1.702 * x)``; as ``activation`` of a layer it is fused.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415, section 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to each element. Errors: those of :func:`functional.bias_activation`."""
        return functional.bias_activation(input, None, "quick_gelu")
