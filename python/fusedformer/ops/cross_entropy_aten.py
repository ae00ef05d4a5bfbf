"""Compute cross entropy of rows of logits by ATen, in place, step by step as the kernels do.

Like the kernels, it computes in at least float32, and keeps the log-sum-exp as two numbers: the
largest logit, and the logarithm of the sum of exponentials relative to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATE = 4  # numbers per row that one block of classes hands on to the next


def cross_entropy_rows_aten(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_total: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    factor: Tensor | None = None,
    *,
    first_class: int,
    n_classes: int,
    state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return (losses, statistics) of rows ``x`` ``[N, c]``; None before the last block.

    Arguments are those of ``fusedformer_kernels.rows.cross_entropy.cross_entropy_rows``. ``x`` is
    overwritten: by its gradient if ``factor`` is given, else by scratch values. ``state`` is
    ``[STATE, N]``: largest logit, sum of exponentials, weighted sum of logits less the largest,
    target's logit.
    """
    last = first_class + x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = target != ignore_index
    here = (target >= first_class) & (target < last)
    index = torch.where(here, target - first_class, 0)[:, None]
    at_target = wide.gather(1, index).squeeze(1)
    top = wide.amax(1)
    if state is not None and first_class:
        before, total, linear, found = state
        top = torch.maximum(before, top)
        at_target = torch.where(here, at_target, found)
    base = torch.where(top == -torch.inf, 0.0, top)  # a later block may be finite
    wide.sub_(base[:, None])
    if label_smoothing:
        part = None if weight is None else weight[first_class:last].to(wide.dtype)
        smooth = wide.sum(1) if part is None else wide @ part
        if first_class:
            seen = first_class if weight is None else weight[:first_class].sum(dtype=wide.dtype)
            smooth += linear + (before - base) * seen
    else:
        smooth = torch.zeros_like(top)
    sums = wide.exp_().sum(1)
    if first_class:
        sums += total * (before - base).exp()
    if state is not None and last < n_classes:
        torch.stack((top, sums, smooth, at_target), out=state)
        return None
    log_total = sums.log()
    row_weight = 1.0 if weight is None else weight.to(wide.dtype)[torch.where(kept, target, 0)]
    losses = (1.0 - label_smoothing) * row_weight * (log_total - (at_target - top))
    if label_smoothing:
        all_weights = n_classes if weight_total is None else weight_total
        losses += label_smoothing / n_classes * (all_weights * log_total - smooth)
    losses = torch.where(kept, losses, 0.0)
    if factor is not None:
        of_all, of_target, everywhere = _factors(
            factor, kept, row_weight, weight_total, label_smoothing, n_classes
        )
        wide.mul_((of_all / sums)[:, None])
        _subtract(wide, index, of_target, everywhere, weight, label_smoothing)
        if wide is not x:
            x.copy_(wide)
    return losses, torch.stack((top, log_total))


def cross_entropy_gradient_aten(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_total: Tensor | None,
    statistics: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    *,
    first_class: int,
    n_classes: int,
) -> None:
    """Overwrite logits ``x`` ``[N, c]`` of the classes from ``first_class`` on by gradients."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    last = first_class + x.shape[1]
    kept = target != ignore_index
    row_weight = 1.0 if weight is None else weight.to(wide.dtype)[torch.where(kept, target, 0)]
    of_all, of_target, everywhere = _factors(
        factor, kept, row_weight, weight_total, label_smoothing, n_classes
    )
    top, log_total = statistics[..., None]
    wide.sub_(top).sub_(log_total).exp_().mul_(of_all[:, None])
    here = (target >= first_class) & (target < last)
    index = torch.where(here, target - first_class, 0)[:, None]
    part = None if weight is None else weight[first_class:last]
    _subtract(wide, index, torch.where(here, of_target, 0.0), everywhere, part, label_smoothing)
    if wide is not x:
        x.copy_(wide)


def _factors(
    factor: Tensor,
    kept: Tensor,
    row_weight: Tensor | float,
    weight_total: Tensor | None,
    label_smoothing: float,
    classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of each row's probabilities, of its target, of the class weights."""
    factor = torch.where(kept, factor, 0.0)
    of_target = (1.0 - label_smoothing) * row_weight * factor
    everywhere = label_smoothing / classes * factor
    return (
        of_target + everywhere * (classes if weight_total is None else weight_total),
        of_target,
        everywhere,
    )


def _subtract(
    x: Tensor,
    index: Tensor,
    of_target: Tensor,
    everywhere: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> None:
    x.scatter_add_(1, index, -of_target[:, None].to(x.dtype))
    if label_smoothing and weight is None:
        x.sub_(everywhere[:, None])
    elif label_smoothing and weight is not None:
        x.addcmul_(everywhere[:, None].to(x.dtype), weight.to(x.dtype), value=-1.0)
