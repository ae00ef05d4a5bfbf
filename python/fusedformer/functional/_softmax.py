"""Compute softmax and log_softmax."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype
from fusedformer._internal.plans import planned, unplanned
from fusedformer.errors import BadTypeError, BadValueError


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
    """Normalize ``exp(scale * input + mask)`` to sum to 1 along ``dim``.

    Args:
        input: any shape; read in place by its strides, never copied to be made contiguous.
        dim: the dimension that is normalized. ``None`` warns and picks one as torch does.
        _stacklevel: of the warning for ``dim=None``.
        dtype: dtype of the result; the cast happens before the computation. None for that of
            ``input``, or float32 where autocast gives torch's that.
        scale: factor on ``input`` (dimensionless).
        mask: boolean (True = keep) or floating-point (added after scaling), broadcastable to the
            shape of ``input``; read by strides, never expanded. May require a gradient.
        is_causal: keep column j of row i only if j <= i, with rows along dimension -2; needs
            ``dim`` to be the last.

    Returns:
        Tensor of the shape of ``input``. A row of -inf gives NaN as in torch; a row that ``mask``
        or ``is_causal`` removes entirely gives 0, and gradient 0.

    Raises:
        TypeError: ``input`` is complex, or not floating-point and no ``dtype`` is given; ``dtype``
            is not floating-point; ``mask`` is neither boolean nor floating-point; ``scale`` is
            not a number, ``dim`` not an integer.
        ValueError: ``mask`` does not broadcast, or is on another device; ``is_causal`` on a
            dimension but the last.
        IndexError: ``dim`` is out of range.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """
    if dim is None:
        dim = _implicit_dim("softmax", input, _stacklevel)
    return _softmax(input, "softmax", dim, dtype, scale, mask, is_causal)


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
    """Compute the logarithm of :func:`softmax` without overflow: ``s - log(sum(exp(s)))``.

    Arguments and errors are those of :func:`softmax`. Masked elements, and entirely masked rows,
    are -inf; their gradient is 0.
    """
    if dim is None:
        dim = _implicit_dim("log_softmax", input, _stacklevel)
    return _softmax(input, "log_softmax", dim, dtype, scale, mask, is_causal)


def _implicit_dim(function: str, input: Tensor, stacklevel: int) -> int:
    """The dimension that torch picks, and warns of; ``stacklevel`` as for torch's function."""
    checks.check_tensor(function, "input", input)
    warnings.warn(
        f"Implicit dimension choice for {function} has been deprecated. "
        f"Change the call to include dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return 0 if input.dim() in (0, 1, 3) else 1


@planned
def _softmax(
    input: Tensor,
    function: Literal["softmax", "log_softmax"],
    dim: int,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    checks.check_tensor(function, "input", input)
    checked = _check_softmax(function, input, dim, dtype, scale, mask, is_causal)
    dtype = dtype or autocast_dtype(function, input) or checked
    if not input.is_floating_point():
        unplanned()
        input = input.to(dtype)
    return ops.softmax(
        input,
        dim,
        scale=scale,
        mask=mask,
        is_causal=is_causal,
        dtype=dtype,
        log=function == "log_softmax",
    )


@checks.remembered
def _check_softmax(
    function: str,
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
) -> torch.dtype:
    """Check the arguments; return the dtype of the result without autocast."""
    if not isinstance(dim, (int, torch.SymInt)):
        raise BadTypeError(
            f"{function}(): expected 'dim' to be an int, but got {type(dim).__name__}"
        )
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(
            f"{function}(): Dimension 'dim' out of range (expected to be in range of "
            f"[{-rank}, {rank - 1}], but got {dim})"
        )
    if dtype is None:
        checks.check_floating(function, "input", input)
        dtype = input.dtype
    elif dtype not in checks.FLOATING_DTYPES:
        raise BadTypeError(f"{function}(): expected 'dtype' to be floating-point, but got {dtype}")
    if input.is_complex():
        raise BadTypeError(f"{function}(): expected 'input' to be real, but got {input.dtype}")
    checks.check_number(function, "scale", scale)
    if mask is not None:
        checks.check_mask(function, "mask", mask, input.shape)
        checks.check_same_device(function, {"input": input, "mask": mask})
    if is_causal and (input.dim() < 2 or dim % rank != rank - 1):
        raise BadValueError(
            f"{function}(): is_causal=True needs at least 2 dimensions and dim to be the last, "
            f"but got dim={dim} of a {input.dim()}-D input"
        )
    return dtype
