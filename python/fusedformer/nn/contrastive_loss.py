"""Contrastive losses with their learned temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.errors import BadValueError
from fusedformer.functional import REDUCTIONS, Reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Scaled(torch.nn.Module):
    """A base of losses with a learned ``logit_scale`` that has an upper bound."""

    def __init__(
        self, init_logit_scale: float, max_logit_scale: float | None, reduction: Reduction,
        device: Any, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        checks.check_number(name, "init_logit_scale", init_logit_scale)
        if max_logit_scale is not None:
            checks.check_number(name, "max_logit_scale", max_logit_scale)
        if reduction not in REDUCTIONS:
            raise BadValueError(
                f"{name}(): expected 'reduction' to be one of {REDUCTIONS}, but got {reduction!r}"
            )
        super().__init__()
        self.init_logit_scale = init_logit_scale
        self.max_logit_scale = max_logit_scale
        self.reduction = reduction
        self.logit_scale = torch.nn.Parameter(torch.empty((), device=device, dtype=dtype))

    def factor(self) -> Tensor:
        """Return the factor of the products: ``exp(logit_scale)``, bounded."""
        bound = math.inf if self.max_logit_scale is None else self.max_logit_scale
        if not self.training:
            return self.logit_scale.clamp(max=bound).exp()
        with torch.no_grad():  # a clamp that autograd saw would have no gradient above the bound
            self.logit_scale.clamp_(max=bound)
        return self.logit_scale.exp()

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        names = "init_logit_scale", "max_logit_scale", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class ContrastiveLoss(_Scaled):
    """CLIP's loss, as :func:`fusedformer.functional.contrastive_loss`, with its temperature.

    Parameter ``logit_scale``, of no dimensions, is the logarithm of the factor on the products.

    Args:
        init_logit_scale: where it starts.
        max_logit_scale: its upper bound: a forward in training clamps it, as CLIP does
            after each step of the optimizer. None: not bounded.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: ``init_logit_scale`` or ``max_logit_scale`` is not a number.
        ValueError: an unknown ``reduction``.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    arXiv:2103.00020, section 2.4.
    """

    def __init__(
        self,
        init_logit_scale: float = math.log(1 / 0.07),
        max_logit_scale: float | None = math.log(100),
        reduction: Reduction = "mean",
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(init_logit_scale, max_logit_scale, reduction, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``logit_scale`` to its initial value."""
        torch.nn.init.constant_(self.logit_scale, self.init_logit_scale)

    def forward(
        self, a: Tensor, b: Tensor, *, label_offset: int = 0, group: ProcessGroup | None = None
    ) -> Tensor:
        """Compute the loss of normalized embeddings ``[M, D]`` and ``[N, D]``.

        Arguments, result and errors are those of the functional form.
        """
        return functional.contrastive_loss(
            a, b, self.factor(), label_offset=label_offset, reduction=self.reduction, group=group
        )


class SigmoidContrastiveLoss(_Scaled):
    """SigLIP's loss, as :func:`fusedformer.functional.sigmoid_contrastive_loss`.

    Parameters ``logit_scale``, as in :class:`ContrastiveLoss`, and ``logit_bias``.

    Args:
        init_logit_scale, init_logit_bias: where they start.
        max_logit_scale, reduction: as for :class:`ContrastiveLoss`.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
    """

    def __init__(
        self,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        max_logit_scale: float | None = None,
        reduction: Reduction = "mean",
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_number(type(self).__name__, "init_logit_bias", init_logit_bias)
        super().__init__(init_logit_scale, max_logit_scale, reduction, device, dtype)
        self.init_logit_bias = init_logit_bias
        self.logit_bias = torch.nn.Parameter(torch.empty_like(self.logit_scale))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both parameters to their initial values."""
        torch.nn.init.constant_(self.logit_scale, self.init_logit_scale)
        torch.nn.init.constant_(self.logit_bias, self.init_logit_bias)

    def forward(
        self, a: Tensor, b: Tensor, *, label_offset: int = 0, group: ProcessGroup | None = None
    ) -> Tensor:
        """Compute the loss of normalized embeddings ``[M, D]`` and ``[N, D]``.

        Arguments, result and errors are those of the functional form.
        """
        return functional.sigmoid_contrastive_loss(
            a,
            b,
            self.factor(),
            self.logit_bias,
            label_offset=label_offset,
            reduction=self.reduction,
            group=group,
        )

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return f"init_logit_bias={self.init_logit_bias!r}, {super().extra_repr()}"
