"""Compute cross entropy of given logits, and of a product that is never whole in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype
from fusedformer.errors import BadTypeError, BadValueError

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute ``-log softmax(input)`` at the target classes, as ``F.cross_entropy`` of torch.

    One kernel reads the logits, by their strides; the backward reads them once more and writes
    their gradient. Between the two, two float32 numbers a row are kept, where torch keeps the
    logarithms of all probabilities.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, *]``.
        target: classes, int64 or uint8 ``[]``, ``[N]`` or ``[N, *]``; or probabilities of the
            shape of ``input``, floating-point (these by the kernel of :func:`log_softmax`).
        weight: of each class, ``[C]``, without a gradient.
        size_average, reduce: torch's deprecated forms of ``reduction``.
        ignore_index: rows with this target have loss and gradient 0 and count in no mean.
        reduction: ``"none"``, ``"mean"`` (over the weights of the rows that are not ignored, NaN if
            all are) or ``"sum"``.
        label_smoothing: in [0, 1]: how much of each target is spread over all classes.

    Returns:
        The loss, in the dtype of ``input`` (of ``target`` if it holds probabilities and is wider),
        under autocast in float32; for ``reduction="none"`` one for each row, else ``[]``. Kernels
        compute loss and gradient in float32 and round each once. The torch backend is torch's own
        composition: of half precision it rounds the logarithms of probabilities, too.

    Raises:
        TypeError: ``input`` is not floating-point, ``target`` neither int64, uint8 nor
            floating-point.
        ValueError: shapes that do not belong together, devices that differ, an unknown
            ``reduction``, ``label_smoothing`` outside [0, 1], a ``weight`` that wants a gradient.
        IndexError: on the CPU, a target that is no class. On a GPU, where looking would wait for
            it, the loss of that row is NaN.

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision,
    arXiv:1512.00567 (label smoothing).
    """
    function = "cross_entropy"
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    checks.check_input(function, "input", input)
    checks.check_tensor(function, "target", target)
    classes = input.shape[0 if input.dim() == 1 else 1]
    positions = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    target = _checked_target(function, target, positions, tuple(input.shape))
    _check_settings(function, weight, classes, reduction, label_smoothing)
    checks.check_same_device(function, {"input": input, "target": target, "weight": weight})
    _check_range(function, target, classes, ignore_index)
    return ops.cross_entropy(
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        autocast_dtype("cross_entropy", input) or input.dtype,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    static_shapes: bool = False,
) -> Tensor:
    """Compute ``cross_entropy(input @ linear_weight.T + linear_bias, target)`` by chunks.

    The logits of all rows are never in memory together. Rows that are ignored are dropped before
    any product: masked language modelling projects the masked positions alone. The weight's
    gradient is accumulated in float32.

    With ``"mean"`` and ``"sum"`` the gradients are computed in the forward, while a chunk of logits
    is in memory: three products, as many as without chunks. With ``"none"``, in float16, and in
    bfloat16 where between one and four times as many rows as features are given, the backward
    computes the logits again: four products. Memory is bounded as ``fusedformer.ops.
    linear_cross_entropy`` states: about a quarter of the logits, and in half precision a float32
    sum.

    Args:
        input: ``[*, D]``, the rows to project.
        linear_weight: ``[C, D]``, of the dtype of ``input`` unless autocast is on.
        target: classes, int64 or uint8 ``[*]``; or probabilities ``[*, C]``, for which all logits
            are computed at once.
        linear_bias: ``[C]``, or None.
        weight: of each class, ``[C]``, without a gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, as in :func:`cross_entropy`.
        ignore_index: as in :func:`cross_entropy`; None is -100.
        label_smoothing: in [0, 1].
        static_shapes: compute all rows, ignored ones too, whose ``input`` then must be finite.
            Otherwise a GPU is waited for, once in the forward and once in a backward that computes
            logits again, to learn which rows are not ignored; never while a CUDA graph is captured.

    Returns:
        The loss, as of :func:`cross_entropy`; shaped ``[*]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`; dtypes that differ.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009,
    and Hsu et al., Liger Kernel, arXiv:2410.10989 (gradients in the forward).
    """
    function = "linear_cross_entropy"
    checks.check_input(function, "input", input)
    checks.check_tensor(function, "target", target)
    checks.check_tensor(function, "linear_weight", linear_weight)
    features = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features:
        raise BadValueError(
            f"{function}(): expected 'linear_weight' to have shape [C, {features}] (the last "
            f"dimension of 'input'), but got {tuple(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    of = "one for each row of 'linear_weight'"
    checks.check_parameter(function, "linear_bias", linear_bias, (classes,), of)
    dtype = autocast_dtype("linear", input)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype and dtype is None:
            raise BadTypeError(
                f"{function}(): expected '{name}' to have the dtype of 'input', {input.dtype}, "
                f"but got {tensor.dtype}"
            )
    positions = tuple(input.shape[:-1])
    target = _checked_target(function, target, positions, (*positions, classes))
    _check_settings(function, weight, classes, reduction, label_smoothing)
    tensors = {
        "input": input, "linear_weight": linear_weight, "target": target,
        "linear_bias": linear_bias, "weight": weight,
    }  # fmt: skip
    checks.check_same_device(function, tensors)
    ignored = -100 if ignore_index is None else ignore_index
    _check_range(function, target, classes, ignored)
    return ops.linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        reduction,
        ignored,
        label_smoothing,
        static_shapes,
        dtype or input.dtype,
        autocast_dtype("cross_entropy", input) or input.dtype,
    )


def _checked_target(
    function: str, target: Tensor, positions: tuple[int, ...], logits: tuple[int, ...]
) -> Tensor:
    """Check ``target``; return it with classes in int64."""
    probabilities = target.dtype in checks.FLOATING_DTYPES
    if not probabilities and target.dtype not in (torch.int64, torch.uint8):
        raise BadTypeError(
            f"{function}(): expected 'target' to hold classes (int64, uint8) or "
            f"probabilities (floating-point), but got {target.dtype}"
        )
    of = "a probability for each logit" if probabilities else "a class for each row"
    checks.check_shape(function, "target", target, logits if probabilities else positions, of)
    return target.long() if target.dtype == torch.uint8 else target


def _check_settings(
    function: str, weight: Tensor | None, classes: int, reduction: str, label_smoothing: float
) -> None:
    if not classes:
        raise BadValueError(f"{function}(): expected at least 1 class, but got 0")
    checks.check_parameter(function, "weight", weight, (classes,), "one for each class")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise BadValueError(
            f"{function}(): expected 'weight' not to require a gradient, which it has not"
        )
    if reduction not in REDUCTIONS:
        raise BadValueError(
            f"{function}(): expected 'reduction' to be one of {REDUCTIONS}, but got {reduction!r}"
        )
    checks.check_probability(function, "label_smoothing", label_smoothing)


def _check_range(function: str, target: Tensor, classes: int, ignore_index: int) -> None:
    if target.is_floating_point():
        return
    # Reading values would wait for a GPU.
    if target.device.type != "cpu" or not target.numel() or not checks.has_values(target):
        return
    low, high = (int(bound) for bound in torch.aminmax(target))
    if low >= 0 and high < classes:
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(
            f"{function}(): expected 'target' to be classes from 0 to {classes - 1}, or "
            f"ignore_index={ignore_index}, but got {int(wrong[0])}"
        )
