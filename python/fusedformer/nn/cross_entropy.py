"""Cross entropy losses: ``torch.nn.CrossEntropyLoss``, and one with the projection inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross entropy of logits, as :func:`fusedformer.functional.cross_entropy`.

    Constructor and attributes are those of :class:`torch.nn.CrossEntropyLoss`: ``weight``,
    ``ignore_index=-100``, ``reduction="mean"``, ``label_smoothing=0.0``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``[N, C, *]``. Errors: those of the functional form."""
        return functional.cross_entropy(
            input, target, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """A projection to classes and its loss, by :func:`fusedformer.functional.linear_cross_entropy`.

    Names, order and state_dict (``linear.weight``, ``linear.bias``, ``weight``) are those of the
    class that ``torch.nn`` has from 2.13 on; it has no ``out_features`` and no ``options``.

    Args:
        in_features: features of what is projected.
        num_classes: rows of ``linear.weight``.
        bias: whether there is a ``linear.bias``.
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing, static_shapes: of the functional form.

    Shape: input ``[*, in_features]``, target ``[*]``; the loss is ``[]``, or ``[*]`` for
    ``reduction="none"``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        static_shapes: bool = False,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.static_shapes = static_shapes
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss. Errors: those of the functional form."""
        return functional.linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight,
            reduction=self.reduction, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, static_shapes=self.static_shapes,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
