"""``torch.nn.Softmax`` and ``torch.nn.LogSoftmax`` on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import functional

# Frames between the warning for dim=None and the line that calls the module, which it names: the
# functional form, forward, and torch's two call wrappers.
_STACKLEVEL = 6


class Softmax(torch.nn.Softmax):
    """Softmax along ``dim``, as :func:`fusedformer.functional.softmax`.

    Args:
        dim: the dimension that is normalized. ``None`` warns and picks one as torch does.

    Shape: any; the result has the shape and dtype of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute probabilities along ``dim``. Errors: those of the functional form."""
        return functional.softmax(input, self.dim, _stacklevel=_STACKLEVEL)


class LogSoftmax(torch.nn.LogSoftmax):
    """Logarithm of softmax along ``dim``, as :func:`fusedformer.functional.log_softmax`.

    Args:
        dim: the dimension that is normalized. ``None`` warns and picks one as torch does.

    Shape: any; the result has the shape and dtype of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute log-probabilities along ``dim``. Errors: those of the functional form."""
        return functional.log_softmax(input, self.dim, _stacklevel=_STACKLEVEL)
