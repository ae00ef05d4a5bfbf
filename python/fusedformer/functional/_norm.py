"""Compute LayerNorm and RMSNorm, alone and with the bias, dropout and sum before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype
from fusedformer._internal.plans import planned
from fusedformer.errors import BadTypeError, BadValueError


@planned
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions.

    Args:
        input: ``[..., *normalized_shape]``.
        normalized_shape: sizes of the trailing dimensions that are normalized together.
        weight: gain of shape ``normalized_shape``, or None for 1.
        bias: offset of shape ``normalized_shape``, or None for 0.
        eps: added to the (biased) variance.

    Returns:
        Tensor of the shape and dtype of ``input``; float32 where autocast gives torch's that.

    Raises:
        TypeError: ``input``, ``weight`` or ``bias`` is not a floating-point tensor; ``eps`` is not
            a number, ``normalized_shape`` not a sequence of integers.
        ValueError: shapes of ``input``, ``weight`` or ``bias`` do not end in, or differ from,
            ``normalized_shape``; tensors on different devices.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
    """
    shape = _check_norm("layer_norm", input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, shape, weight, bias, eps, autocast_dtype("layer_norm", input))


@planned
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Compute ``x / sqrt(mean(x**2) + eps) * weight`` over the last dimensions.

    Args:
        input: ``[..., *normalized_shape]``.
        normalized_shape: sizes of the trailing dimensions that are normalized together.
        weight: gain of shape ``normalized_shape``, or None for 1.
        eps: added to the mean square; None for the machine epsilon of float32 (of float64 for
            float64 input), the dtype of the statistics, as in torch.

    Returns, raises: as :func:`layer_norm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    checked_eps = 0.0 if eps is None else eps
    shape = _check_norm("rms_norm", input, normalized_shape, weight, None, checked_eps)
    return ops.rms_norm(input, shape, weight, eps, autocast_dtype("rms_norm", input))


@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    input_bias: Tensor | None = ...,
    p: float = ...,
    training: bool = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    input_bias: Tensor | None = ...,
    p: float = ...,
    training: bool = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@planned
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``layer_norm(dropout(input + input_bias) + residual)`` in one kernel.

    Args:
        input: ``[..., *normalized_shape]``, the output of a projection.
        residual: of the shape of ``input``. The sum is in the wider of both dtypes, as in torch: a
            float32 residual stream takes a bfloat16 product without a copy.
        normalized_shape, weight, bias, eps: as for :func:`layer_norm`.
        input_bias: shape ``normalized_shape``, added to ``input`` before dropout.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.
        return_sum: also return ``dropout(input + input_bias) + residual`` (for pre-norm layers).

    Returns:
        The norm, or with ``return_sum=True`` the pair (norm, sum), of the shape of ``input`` and
        the dtype of the sum; the norm in float32 where autocast gives torch's that.

    Raises:
        TypeError, ValueError: as :func:`layer_norm`; ``p`` outside [0, 1]; ``residual`` not
            floating-point, or of another shape than ``input``.
    """
    shape = _check_fused_norm(
        "dropout_add_layer_norm",
        input,
        residual,
        normalized_shape,
        weight,
        bias,
        eps,
        input_bias,
        p,
    )
    return ops.dropout_add_layer_norm(
        input,
        residual,
        shape,
        weight,
        bias,
        eps,
        input_bias=input_bias,
        p=p if training else 0.0,
        return_sum=return_sum,
        dtype=autocast_dtype("layer_norm", input, residual),
    )


@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    input_bias: Tensor | None = ...,
    p: float = ...,
    training: bool = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    input_bias: Tensor | None = ...,
    p: float = ...,
    training: bool = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@planned
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``rms_norm(dropout(input + input_bias) + residual)`` in one kernel.

    Arguments, result and errors as for :func:`dropout_add_layer_norm`; ``eps`` as for
    :func:`rms_norm`.
    """
    checked_eps = 0.0 if eps is None else eps
    shape = _check_fused_norm(
        "dropout_add_rms_norm",
        input,
        residual,
        normalized_shape,
        weight,
        None,
        checked_eps,
        input_bias,
        p,
    )
    return ops.dropout_add_rms_norm(
        input,
        residual,
        shape,
        weight,
        eps,
        input_bias=input_bias,
        p=p if training else 0.0,
        return_sum=return_sum,
        dtype=autocast_dtype("rms_norm", input, residual),
    )


@planned
def dropout_add(
    input: Tensor,
    residual: Tensor,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute ``dropout(input + input_bias) + residual`` in one kernel, for pre-norm blocks.

    Args:
        input: ``[..., d]``.
        residual: as for :func:`dropout_add_layer_norm`.
        input_bias: ``[d]``, added to ``input`` before dropout.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor of the shape of ``input``, in the wider of the dtypes of ``input`` and ``residual``.

    Raises:
        TypeError, ValueError: as :func:`dropout_add_layer_norm`.
    """
    checks.check_input("dropout_add", "input", input)
    _check_dropout_add("dropout_add", input, residual, tuple(input.shape[-1:]), input_bias, p)
    return ops.dropout_add(input, residual, input_bias=input_bias, p=p if training else 0.0)


@planned
def dropout_scale_add(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute ``sample_scale * scale * dropout(input + input_bias) + residual`` in one kernel.

    It is the residual step of blocks with LayerScale and stochastic depth.

    Args:
        input: ``[batch, ..., d]``.
        residual: as for :func:`dropout_add_layer_norm`.
        scale: ``[d]``, or None for 1. Its gradient comes from the same kernel as that of ``input``.
        sample_scale: ``[batch]``, the first of at least two dimensions, or None for 1: 0 for
            samples whose branch is dropped, and one over the share of those kept for the others. It
            has no gradient by the kernels.
        input_bias: ``[d]``, added to ``input`` before dropout.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor of the shape of ``input``, in the widest of the dtypes of ``input``, ``residual`` and
        ``scale``.

    Raises:
        TypeError, ValueError: as :func:`dropout_add_layer_norm`; ``sample_scale`` not of shape
            ``[batch]``, or requires a gradient on the kernels.

    Source: Touvron et al., Going deeper with Image Transformers, arXiv:2103.17239; Huang et al.,
    Deep Networks with Stochastic Depth, arXiv:1603.09382.
    """
    function = "dropout_scale_add"
    checks.check_input(function, "input", input)
    shape = tuple(input.shape[-1:])
    _check_dropout_add(function, input, residual, shape, input_bias, p)
    _check_scales(input, scale, sample_scale)
    return ops.dropout_scale_add(
        input, residual, scale, sample_scale, input_bias=input_bias, p=p if training else 0.0
    )


@checks.remembered
def _check_scales(input: Tensor, scale: Tensor | None, sample_scale: Tensor | None) -> None:
    function = "dropout_scale_add"
    checks.check_parameter(
        function, "scale", scale, tuple(input.shape[-1:]), "the last dimension of 'input'"
    )
    checks.check_parameter(
        function, "sample_scale", sample_scale, tuple(input.shape[:-1][:1]), "the first of 'input'"
    )
    checks.check_same_device(
        function, {"input": input, "scale": scale, "sample_scale": sample_scale}
    )


@checks.remembered
def _check_norm(
    function: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[int, ...]:
    checks.check_input(function, "input", input)
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str):
        raise BadTypeError(
            f"{function}(): expected 'normalized_shape' to be a sequence of integers, but got "
            f"{type(normalized_shape).__name__}"
        )
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise BadValueError(
            f"{function}(): expected 'input' of shape [*, {', '.join(map(str, shape))}] to end in "
            f"a 'normalized_shape' of at least 1 dimension, but got normalized_shape={shape} and "
            f"input of shape {tuple(input.shape)}"
        )
    checks.check_parameter(function, "weight", weight, shape, "normalized_shape")
    checks.check_parameter(function, "bias", bias, shape, "normalized_shape")
    checks.check_number(function, "eps", eps)
    checks.check_same_device(function, {"input": input, "weight": weight, "bias": bias})
    return shape


@checks.remembered
def _check_fused_norm(
    function: str,
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_bias: Tensor | None,
    p: float,
) -> tuple[int, ...]:
    shape = _check_norm(function, input, normalized_shape, weight, bias, eps)
    _check_dropout_add(function, input, residual, shape, input_bias, p)
    return shape


@checks.remembered
def _check_dropout_add(
    function: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    input_bias: Tensor | None,
    p: float,
) -> None:
    checks.check_tensor(function, "residual", residual)
    checks.check_shape(function, "residual", residual, input.shape, "that of 'input'")
    checks.check_floating(function, "residual", residual)
    of = "the last dimensions of 'input'"
    checks.check_parameter(function, "input_bias", input_bias, shape, of)
    checks.check_same_device(
        function, {"input": input, "residual": residual, "input_bias": input_bias}
    )
    checks.check_probability(function, "p", p)
