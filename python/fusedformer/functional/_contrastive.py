"""Compute contrastive losses over all pairs of two batches of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype, cast
from fusedformer.errors import BadTypeError, BadValueError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    label_offset: int = 0,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute symmetric cross entropy over all pairs: CLIP's loss, InfoNCE in both directions.

    With ``s = logit_scale * a @ b.T`` and p = i + label_offset, the positive of row i,
    ``loss_i = (logsumexp(s[i, :]) + logsumexp(s[:, p])) / 2 - s[i, p]``. No M x N matrix is kept:
    scores are computed in tiles, and computed again in the backward; memory is linear in M and N.

    Args:
        a: ``[M, D]`` embeddings; they are not normalized here. Autocast casts them as it does the
            factors of a product.
        b: ``[N, D]``, N >= M; rows that are the positive of no row are negatives of all.
        logit_scale: factor on the products (CLIP: ``exp`` of a learned parameter); a number, or a
            tensor of one element, which may require a gradient.
        label_offset: row of ``b`` that is the positive of row 0, from 0 to N - M.
        reduction: ``"mean"`` or ``"sum"`` over the rows, or ``"none"``: ``[M]``.
        group: ranks that hold a piece of one batch each, M = N rows on all of them. The loss is
            that of the whole batch, on every rank (with ``"none"`` of its own rows). ``b`` is
            gathered and each rank computes the scores of its rows. Autograd differentiates the sum
            of all ranks' results, so that averaging gradients over them, as
            ``DistributedDataParallel`` does, gives those of one process with the whole batch.

    Returns:
        float32, float64 for float64 input.

    Raises:
        TypeError: ``a``, ``b`` or ``logit_scale`` is not floating-point, or ``a`` and ``b`` differ
            in dtype, but under autocast; ``label_offset`` is not an integer; ``group`` is not a
            process group.
        ValueError: shapes that do not fit; ``label_offset`` out of range; an unknown ``reduction``;
            tensors on different devices; on all ranks, if shapes differ between them (which waits
            for the device).

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    arXiv:2103.00020.
    """
    function = "contrastive_loss"
    a, b = _narrowed(a, b)
    _check_pairs(function, a, b, {"logit_scale": logit_scale}, label_offset, reduction, group)
    return ops.contrastive_loss(
        a, b, logit_scale, label_offset=label_offset, reduction=reduction, group=group
    )


def sigmoid_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    label_offset: int = 0,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Decide for every pair whether it matches: SigLIP's loss.

    With ``s = logit_scale * a @ b.T + logit_bias``,
    ``loss_i = -sum_j log(sigmoid(z_ij * s_ij))``, where z is 1 for the positive of row i,
    j = i + label_offset, and -1 for all others. ``"mean"`` divides by the rows, not by the pairs.

    Args:
        a, b, logit_scale, label_offset, reduction, group: as for :func:`contrastive_loss`.
        logit_bias: added to the scaled products; a number, or a tensor of one element, which may
            require a gradient.

    Returns:
        float32, float64 for float64 input.

    Raises:
        TypeError, ValueError: as :func:`contrastive_loss`, for ``logit_bias`` too.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
    """
    function = "sigmoid_contrastive_loss"
    a, b = _narrowed(a, b)
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    _check_pairs(function, a, b, scalars, label_offset, reduction, group)
    return ops.sigmoid_contrastive_loss(
        a, b, logit_scale, logit_bias, label_offset=label_offset, reduction=reduction, group=group
    )


def _narrowed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cast to the dtype in which autocast has the factors of a product."""
    dtype = autocast_dtype("linear", a, b)
    return (a, b) if dtype is None else (cast(a, dtype), cast(b, dtype))


def _check_pairs(
    function: str,
    a: Tensor,
    b: Tensor,
    scalars: dict[str, float | Tensor],
    label_offset: int,
    reduction: str,
    group: object,
) -> None:
    for name, tensor in (("a", a), ("b", b)):
        checks.check_tensor(function, name, tensor)
        checks.check_floating(function, name, tensor)
        if tensor.dim() != 2:
            raise BadValueError(
                f"{function}(): expected '{name}' to have shape [rows, dims], "
                f"but got {tuple(tensor.shape)}"
            )
    tensors: dict[str, Tensor | None] = {"a": a, "b": b}
    for name, value in scalars.items():
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            continue
        checks.check_tensor(function, name, value)
        checks.check_floating(function, name, value)
        if value.numel() != 1:
            raise BadValueError(
                f"{function}(): expected '{name}' to have 1 element, "
                f"but got shape {tuple(value.shape)}"
            )
        tensors[name] = value
    checks.check_same_device(function, tensors)
    if a.dtype != b.dtype:
        raise BadTypeError(
            f"{function}(): expected 'a' and 'b' to have the same dtype, "
            f"but got {a.dtype} and {b.dtype}"
        )
    (rows, dims), (columns, b_dims) = a.shape, b.shape
    if dims != b_dims or rows > columns:
        raise BadValueError(
            f"{function}(): expected 'a' [M, D] and 'b' [N, D] with M <= N, "
            f"but got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if isinstance(label_offset, bool) or not isinstance(label_offset, (int, torch.SymInt)):
        raise BadTypeError(
            f"{function}(): expected 'label_offset' to be an int, "
            f"but got {type(label_offset).__name__}"
        )
    if not 0 <= label_offset <= columns - rows:
        raise BadValueError(
            f"{function}(): expected 'label_offset' to be from 0 to N - M = {columns - rows}, "
            f"but got {label_offset}"
        )
    if reduction not in REDUCTIONS:
        raise BadValueError(
            f"{function}(): expected 'reduction' to be one of {REDUCTIONS}, but got {reduction!r}"
        )
    if group is not None:
        _check_group(function, group, rows, columns)


def _check_group(function: str, group: object, rows: int, columns: int) -> None:
    import torch.distributed as dist

    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise BadTypeError(
            f"{function}(): expected 'group' to be a ProcessGroup that this rank is in, "
            f"but got {group!r}"
        )
    if rows != columns:
        raise BadValueError(
            f"{function}(): expected 'a' and 'b' to have as many rows where 'group' is given, "
            f"but got {rows} and {columns}"
        )
