"""The public functions: ``torch.nn.functional``'s names and arguments, and the fused forms.

Each function checks its arguments, then calls the op of the same name in :mod:`fusedformer.ops`,
which runs the Triton kernels or the ATen composition (see :func:`fusedformer.backend`). The
definition of each is in :mod:`fusedformer.reference`.

Supported dtypes: float32, float16 and bfloat16 on the triton backend, any floating-point dtype on
the torch backend. Statistics and accumulation are float32 (float64 for float64 input).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fusedformer import _checks, ops

__all__ = [
    "bias_activation",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``exp(scale * input + mask)`` normalized to sum to 1 along ``dim``.

    Args:
        input: any shape; read in place by its strides, never copied to be made contiguous.
        dim: the dimension that is normalized. ``None`` warns and picks one as torch does.
        _stacklevel: of the warning for ``dim=None``.
        dtype: dtype of the result; the cast happens before the computation.
        scale: factor on ``input`` (dimensionless).
        mask: boolean (True = keep) or floating-point (added after scaling), broadcastable to the
            shape of ``input``; read by strides, never expanded. May require a gradient.
        is_causal: keep column j of row i only if j <= i, with rows along dimension -2; needs
            ``dim`` to be the last.

    Returns:
        Tensor of the shape of ``input``. A row of -inf gives NaN as in torch; a row that ``mask``
        or ``is_causal`` removes whole gives 0, and gradient 0.

    Raises:
        TypeError: ``input`` is complex, or not floating-point and no ``dtype`` is given; ``dtype``
            is not floating-point; ``mask`` is neither boolean nor floating-point; ``scale`` is
            not a number, ``dim`` not an integer.
        ValueError: ``mask`` does not broadcast, or is on another device; ``is_causal`` on a
            dimension but the last.
        IndexError: ``dim`` is out of range.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """
    return _softmax("softmax", input, dim, _stacklevel, dtype, scale, mask, is_causal)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Logarithm of :func:`softmax`, computed stably: ``s - log(sum(exp(s)))``.

    Arguments and errors are those of :func:`softmax`. Masked elements, and rows that are masked
    whole, are -inf; their gradient is 0.
    """
    return _softmax("log_softmax", input, dim, _stacklevel, dtype, scale, mask, is_causal)


def _softmax(
    function: Literal["softmax", "log_softmax"],
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    _checks.check_tensor(function, "input", input)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warnings.warn(
            f"Implicit dimension choice for {function} has been deprecated. "
            f"Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
    if not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"{function}(): expected 'dim' to be an int, but got {type(dim).__name__}")
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(
            f"{function}(): Dimension 'dim' out of range (expected to be in range of "
            f"[{-rank}, {rank - 1}], but got {dim})"
        )
    if dtype is None:
        _checks.check_floating(function, "input", input)
        dtype = input.dtype
    elif dtype not in _checks.FLOATING_DTYPES:
        raise TypeError(f"{function}(): expected 'dtype' to be floating-point, but got {dtype}")
    if input.is_complex():
        raise TypeError(f"{function}(): expected 'input' to be real, but got {input.dtype}")
    if not input.is_floating_point():
        input = input.to(dtype)
    _checks.check_number(function, "scale", scale)
    if mask is not None:
        _checks.check_mask(function, "mask", mask, input.shape)
        _checks.check_same_device(function, {"input": input, "mask": mask})
    if is_causal and (input.dim() < 2 or dim % rank != rank - 1):
        raise ValueError(
            f"{function}(): is_causal=True needs at least 2 dimensions and dim to be the last, "
            f"but got dim={dim} of a {input.dim()}-D input"
        )
    return ops.softmax(
        input, dim, scale=scale, mask=mask, is_causal=is_causal, dtype=dtype,
        log=function == "log_softmax",
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions.

    Args:
        input: ``[..., *normalized_shape]``.
        normalized_shape: sizes of the trailing dimensions that are normalized together.
        weight: gain of shape ``normalized_shape``, or None for 1.
        bias: offset of shape ``normalized_shape``, or None for 0.
        eps: added to the (biased) variance.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input``, ``weight`` or ``bias`` is not a floating-point tensor; ``eps`` is not
            a number, ``normalized_shape`` not a sequence of integers.
        ValueError: shapes of ``input``, ``weight`` or ``bias`` do not end in, or differ from,
            ``normalized_shape``; tensors on different devices.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
    """
    shape = _check_norm("layer_norm", input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimensions.

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
    return ops.rms_norm(input, shape, weight, eps)


@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    input_bias: Tensor | None = ..., p: float = ..., training: bool = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    input_bias: Tensor | None = ..., p: float = ..., training: bool = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """``layer_norm(dropout(input + input_bias) + residual)`` in one kernel.

    Args:
        input: ``[..., *normalized_shape]``, the output of a projection.
        residual: like ``input``.
        normalized_shape, weight, bias, eps: as for :func:`layer_norm`.
        input_bias: shape ``normalized_shape``, added to ``input`` before dropout.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.
        return_sum: also return ``dropout(input + input_bias) + residual`` (for pre-norm layers).

    Returns:
        The norm, or with ``return_sum=True`` the pair (norm, sum); shape and dtype of ``input``.

    Raises:
        TypeError, ValueError: as :func:`layer_norm`; ``p`` outside [0, 1]; ``residual`` of
            another shape or dtype than ``input``.
    """
    shape = _check_norm("dropout_add_layer_norm", input, normalized_shape, weight, bias, eps)
    _check_dropout_add("dropout_add_layer_norm", input, residual, shape, input_bias, p)
    return ops.dropout_add_layer_norm(
        input, residual, shape, weight, bias, eps,
        input_bias=input_bias, p=p if training else 0.0, return_sum=return_sum,
    )


@overload
def dropout_add_rms_norm(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = ..., eps: float | None = ..., *, input_bias: Tensor | None = ...,
    p: float = ..., training: bool = ..., return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = ..., eps: float | None = ..., *, input_bias: Tensor | None = ...,
    p: float = ..., training: bool = ..., return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """``rms_norm(dropout(input + input_bias) + residual)`` in one kernel.

    Arguments, result and errors as for :func:`dropout_add_layer_norm`; ``eps`` as for
    :func:`rms_norm`.
    """
    checked_eps = 0.0 if eps is None else eps
    shape = _check_norm("dropout_add_rms_norm", input, normalized_shape, weight, None, checked_eps)
    _check_dropout_add("dropout_add_rms_norm", input, residual, shape, input_bias, p)
    return ops.dropout_add_rms_norm(
        input, residual, shape, weight, eps,
        input_bias=input_bias, p=p if training else 0.0, return_sum=return_sum,
    )


def dropout_add(
    input: Tensor,
    residual: Tensor,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(input + input_bias) + residual`` in one kernel (the end of a pre-norm block).

    Args:
        input: ``[..., d]``.
        residual: like ``input``.
        input_bias: ``[d]``, added to ``input`` before dropout.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError, ValueError: as :func:`dropout_add_layer_norm`.
    """
    _check_input("dropout_add", input)
    _check_dropout_add("dropout_add", input, residual, tuple(input.shape[-1:]), input_bias, p)
    return ops.dropout_add(input, residual, input_bias=input_bias, p=p if training else 0.0)


def bias_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "gelu",
    *,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(activation(input + bias))`` in one kernel, the middle of a feed-forward block.

    Args:
        input: ``[..., d]``, the output of a product without its bias.
        bias: ``[d]``, or None. Its gradient comes from the same kernel as that of ``input``.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` or ``bias`` is not floating-point; ``p`` is not a number.
        ValueError: unknown ``activation``; ``bias`` not of shape ``[d]``; ``p`` outside [0, 1].

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
    """
    function = "bias_activation"
    _check_input(function, input)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}(): expected 'activation' to be one of {ACTIVATIONS}, "
            f"but got {activation!r}"
        )
    _check_parameter(function, "bias", bias, input.shape[-1:], "the last dimension of 'input'")
    _checks.check_same_device(function, {"input": input, "bias": bias})
    _checks.check_probability(function, "p", p)
    return ops.bias_activation(input, bias, activation, p if training else 0.0)


def _check_input(function: str, input: Tensor) -> None:
    _checks.check_tensor(function, "input", input)
    _checks.check_floating(function, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{function}(): expected 'input' to have at least 1 dimension, but got 0")


def _check_parameter(
    function: str, name: str, parameter: Tensor | None, shape: Sequence[int], of: str
) -> None:
    _checks.check_shape(function, name, parameter, shape, of)
    if parameter is not None:
        _checks.check_floating(function, name, parameter)


def _check_norm(
    function: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[int, ...]:
    _check_input(function, input)
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(
            f"{function}(): expected 'normalized_shape' to be a sequence of integers, but got "
            f"{type(sizes).__name__}"
        )
    shape = tuple(sizes)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{function}(): expected 'input' of shape [*, {', '.join(map(str, shape))}] to end in "
            f"a 'normalized_shape' of at least 1 dimension, but got normalized_shape={shape} and "
            f"input of shape {tuple(input.shape)}"
        )
    _check_parameter(function, "weight", weight, shape, "normalized_shape")
    _check_parameter(function, "bias", bias, shape, "normalized_shape")
    _checks.check_number(function, "eps", eps)
    _checks.check_same_device(function, {"input": input, "weight": weight, "bias": bias})
    return shape


def _check_dropout_add(
    function: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    input_bias: Tensor | None,
    p: float,
) -> None:
    _checks.check_tensor(function, "residual", residual)
    _checks.check_shape(function, "residual", residual, input.shape, "that of 'input'")
    if residual.dtype != input.dtype:
        raise TypeError(
            f"{function}(): expected 'residual' to have the dtype of 'input', {input.dtype}, "
            f"but got {residual.dtype}"
        )
    of = "the last dimensions of 'input'"
    _check_parameter(function, "input_bias", input_bias, shape, of)
    _checks.check_same_device(
        function, {"input": input, "residual": residual, "input_bias": input_bias}
    )
    _checks.check_probability(function, "p", p)


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ...,
    dropout_p: float = ..., is_causal: bool = ..., *, scale: float | None = ...,
    enable_gqa: bool = ..., key_mask: Tensor | None = ..., key_lengths: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ...,
    dropout_p: float = ..., is_causal: bool = ..., *, scale: float | None = ...,
    enable_gqa: bool = ..., key_mask: Tensor | None = ..., key_lengths: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``dropout(softmax(scale * query @ key.T + mask)) @ value`` without the score matrix.

    Batch dimensions broadcast. All inputs and masks are read in place by their strides.

    Args:
        query: ``[*batch, heads, L, E]`` (2-D ``[L, E]`` and 3-D ``[batch, L, E]`` too).
        key: ``[*batch, heads, S, E]``, ``E`` from 1 to 256 on the triton backend.
        value: ``[*batch, heads, S, Ev]``, ``Ev`` from 1 to 256; may differ from ``E``.
        attn_mask: boolean (True = keep) or floating-point (added to the scaled scores),
            broadcastable to ``[*batch, heads, L, S]``. May require a gradient.
        dropout_p: probability that an attention weight is dropped, in [0, 1]; applies in eval too.
        is_causal: key j is visible to query i only if j <= i (top-left aligned). On every path
            it may be combined with ``attn_mask``, which some of torch's refuse.
        scale: factor on the scores; ``1/sqrt(E)`` if None.
        enable_gqa: key and value may have fewer heads; each serves a group of query heads.
        key_mask: boolean ``[batch, S]``, True = keep: key padding that needs no combined mask.
        key_lengths: integer ``[batch]``: keys at and beyond a sequence's length are masked.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        ``[*batch, heads, L, Ev]`` in the dtype of ``query``; with ``return_lse=True`` the pair of
        it and the float32 log-sum-exp ``[*batch, heads, L]`` (natural logarithm, differentiable).
        A query with no visible key gets output 0, gradient 0 and log-sum-exp -inf.

    Raises:
        TypeError: dtypes that differ, or that the backend does not support.
        ValueError: shapes that do not fit, masks that do not broadcast, tensors on different
            devices, ``dropout_p`` outside [0, 1].

    Source: Vaswani et al., arXiv:1706.03762; Dao, FlashAttention-2, arXiv:2307.08691.
    """
    _checks.check_attention(
        query, key, value, attn_mask, dropout_p, enable_gqa, key_mask, key_lengths, scale
    )
    return ops.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_mask=key_mask, key_lengths=key_lengths, return_lse=return_lse,
    )
