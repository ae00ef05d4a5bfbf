"""Cross entropy losses: ``torch.nn.CrossEntropyLoss``, and one with the projection inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer import functional
from fusedformer.errors import BadValueError

_WeightedLoss = torch.nn.modules.loss._WeightedLoss
# Torch has this class from 2.13 on.
_Base: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross entropy of logits, as :func:`fusedformer.functional.cross_entropy`.

    Constructor and attributes are those of :class:`torch.nn.CrossEntropyLoss`: ``weight``,
    ``ignore_index=-100``, ``reduction="mean"``, ``label_smoothing=0.0``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of logits ``[N, C, *]``. Errors: those of the functional form."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(_Base):  # type: ignore[misc]
    """A projection to classes and its loss, by :func:`fusedformer.functional.linear_cross_entropy`.

    A subclass of :class:`torch.nn.LinearCrossEntropyLoss`, where torch has that, with its arguments
    and state_dict (``linear.weight``, ``linear.bias``, ``weight``).

    Args:
        in_features: width of the input.
        num_classes: rows of ``linear.weight``.
        out_features: ``()``; there is one dimension of classes.
        bias: whether there is a ``linear.bias``.
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing, static_shapes: of the functional form.
        options: torch's choice of chunks. It is kept and changes nothing, as chunks always are.

    Raises:
        ValueError: ``out_features`` is not empty.

    Shape: input ``[*, in_features]``, target ``[*]``; the loss is ``[]``, or ``[*]`` for
    ``reduction="none"``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        static_shapes: bool = False,
    ) -> None:
        if out_features:
            raise BadValueError(
                "LinearCrossEntropyLoss(): expected 'out_features' to be (), "
                f"but got {out_features}"
            )
        _WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.options = options
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.static_shapes = static_shapes
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss. Errors: those of the functional form."""
        return functional.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            static_shapes=self.static_shapes,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
